"""Weights over a collective group of the trainer's first rank and the engines: NCCL between nodes, gloo on CPU."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from megatron_bpdg.parallel.together import everyone
from megatron_bpdg.serving.http.client import Server
from megatron_bpdg.serving.sglang.weights.base import (
    Bucket,
    Update,
    Weights,
    WeightSync,
    buckets,
    posting,
    raise_failed,
)


class DistributedSync(WeightSync):
    """`WeightSync` that broadcasts from rank 0 to every engine's ranks.

    The group is made at the first update and used again as long as the same engines are there and remember the last
    update. When an engine dies on the way, the group is made anew without it and everything is sent again: the others
    must not be left with half of the weights.
    """

    _group: dist.ProcessGroup | None = None
    _name = ""
    _members: Sequence[str] = ()
    _version: str | None = None

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        update = self.update(urls) if dist.get_rank() == 0 else None
        with update or nullcontext():
            again = True
            while again:
                # Reading the weights is collective: every attempt reads all of them on all ranks, whatever becomes of
                # it on rank 0, and after each one the others must hear whether there is another.
                if update is not None:
                    again = self._attempt(weights, version, update)
                else:
                    for _ in weights:
                        pass
                again = everyone(again)[0]
        self._version = version
        raise_failed(update.failed if update is not None else {})

    def _attempt(self, weights: Weights, version: str, update: Update) -> bool:
        """Send everything once; True where it has to be sent again to the servers that are left."""
        # Who is not there is left out, and a group forgotten of which one has been started again since.
        if any(found != self._version for found in update.ask(Server.weight_version).values()):
            self._leave(update)
        asked = update.urls
        stream = iter(weights)
        whole = self._join(update)
        if whole and update.urls:
            update.begin()
            whole = not self._lost(update)
            for bucket, last in buckets(stream, self.cfg.bucket_mb * 10**6):
                whole = whole and self._broadcast(bucket, version if last else None, update)
            if whole:
                update.end()
                update.check_version(version)
                whole = not self._lost(update)
        for _ in stream:  # the other ranks take part in every collective of the stream
            pass
        if whole:
            return False
        self._leave(update)
        # A broadcast ends for all when one of its ends is gone, so who failed says little about who is to blame. Where
        # an engine died, those that are alive failed because of it: they are asked again, in a group without it. Where
        # all are alive, each refused for a reason of its own, which would be there the next time too. Every attempt
        # that is followed by another has lost an engine, so there are no more attempts than engines.
        hurt = [url for url in asked if url in update.failed]
        alive = list(update.ask(Server.model_info, to=hurt, heed=False))
        if alive == hurt:
            return False
        for url in alive:
            del update.failed[url]
        return bool(update.urls)

    def _lost(self, update: Update) -> bool:
        return set(self._members) != set(update.urls)

    def _join(self, update: Update) -> bool:
        """Make the group of rank 0 and the engines unless it is there."""
        if self._group is not None and self._members == update.urls:
            return True
        self._leave(update)
        places = update.places(1)
        if not update.urls:
            return True
        address = self.cfg.master_address or _address(update.urls)
        port = self.cfg.master_port or _free_port()
        name = f"bpdg-{uuid.uuid4().hex[:8]}"
        world = 1 + sum(map(len, places.values()))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._members = list(update.urls)
        body = {
            "master_address": address,
            "master_port": port,
            "world_size": world,
            "group_name": name,
            "backend": backend,
        }
        joined = update.start(
            posting("/init_weights_update_group", lambda url: body | {"rank_offset": places[url].start})
        )
        try:
            self._group = _make_group(address, port, world, name, backend, self.cfg.timeout_s)
            self._name = name
        except (RuntimeError, ValueError) as error:
            joined()
            for url in update.urls:
                update.failed[url] = f"no group with {url}: {error}"
            return False
        joined()
        return not self._lost(update)

    def _broadcast(self, bucket: Bucket, version: str | None, update: Update) -> bool:
        """Send one bucket; False where an engine was lost."""
        assert self._group is not None
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "flush_cache": version is not None,
            "weight_version": version,
        }
        received = update.start(posting("/update_weights_from_distributed", body))
        problem: str | None = None
        try:
            pending = [dist.broadcast(t, src=0, group=self._group, async_op=True) for _, t in bucket]
            for work in pending:
                assert work is not None
                work.wait()
        except RuntimeError as error:
            # What is under way would keep the connections open, at which engines wait for the rest of the bucket.
            problem = str(error)
            pending.clear()
            del work
            self._abandon()
        received()
        if problem is None:
            return not self._lost(update)
        for url in update.urls:
            update.failed[url] = f"broadcast to {url}: {problem}"
        return False

    def _leave(self, update: Update) -> None:
        if self._group is None:
            return
        # An engine that is gone or was started again has no group to leave: its answer does not matter.
        leave = posting("/destroy_weights_update_group", {"group_name": self._name})
        left = update.start(leave, timeout_s=30.0, heed=False)
        # Not after the answers: an engine that waits for a lost bucket hears nothing until our end closes.
        self._abandon()
        left()

    def _abandon(self) -> None:
        """Close our end of the group at once, whatever is still under way."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
        self._group, self._members = None, ()

    def close(self) -> None:
        if self._group is not None:
            with self.update(self._members) as update:
                self._leave(update)


def _make_group(address: str, port: int, world: int, name: str, backend: str, timeout_s: float) -> dist.ProcessGroup:
    """A process group beside the default one, as SGLang makes its side of it (`init_custom_process_group`)."""
    timeout = timedelta(seconds=timeout_s)
    # Not torch's rendezvous: under torchrun it waits for torchrun's own store at this address, which nobody serves.
    store = dist.TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    prefixed = PrefixStore(name, store)
    group, _ = _new_process_group_helper(
        world, 0, [], Backend(backend), prefixed, group_name=GroupName(name), backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def _address(urls: Sequence[str]) -> str:
    """Of this machine, on its way to an engine on another one if there is one."""
    ways = []
    for url in urls:
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            ways.append(str(probe.getsockname()[0]))
    return next((way for way in ways if not ip_address(way).is_loopback), ways[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
