"""Weights over a collective group of the trainer's first rank and the engines: NCCL between nodes, gloo on CPU."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
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

from megatron_bpdg.serving.http.client import ServerError
from megatron_bpdg.serving.sglang.weights.base import Bucket, NewUpdate, Update, Weights, buckets, share_outcome


class DistributedSync:
    """`WeightSync` that broadcasts from rank 0 to every engine's ranks.

    The group is made at the first update and used again as long as the same engines are there and remember the last
    update. When an engine dies on the way, the group is made anew without it and everything is sent again: the others
    must not be left with half of the weights.

    Args:
        bucket_bytes: sent at once.
        update: begins an `Update` of some servers.
        timeout_s: for the group and its collectives.
        master_address, master_port: where the engines meet rank 0; None: its address towards them, a free port.
    """

    def __init__(
        self,
        bucket_bytes: int,
        update: NewUpdate,
        timeout_s: float,
        master_address: str | None = None,
        master_port: int | None = None,
    ) -> None:
        self.bucket_bytes, self.update, self.timeout_s = bucket_bytes, update, timeout_s
        self.master_address, self.master_port = master_address, master_port
        self._group: dist.ProcessGroup | None = None
        self._name = ""
        self._members: list[str] = []
        self._version: str | None = None

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        failed: dict[str, str] = {}
        if dist.get_rank() == 0:
            with self.update(urls) as update:
                # Reading the weights is collective: every attempt reads all of them on all ranks, whatever becomes of
                # it here, and after each one the others must hear whether there is another.
                again = True
                while again:
                    again = not self._attempt(weights, version, update)
                    _tell(again)
            failed, self._version = update.failed, version
        else:
            again = True
            while again:
                for _ in weights:  # rank 0's partners in the collectives
                    pass
                again = _tell(False)
        share_outcome(failed)

    def _attempt(self, weights: Weights, version: str, update: Update) -> bool:
        """Send everything once; False where it has to be sent again to the servers that are left."""
        self._check_alive(update)
        asked = update.urls
        stream = iter(weights)
        whole = self._join(update)
        if whole and update.urls:
            update.begin()
            whole = not self._lost(update)
            for bucket, last in buckets(stream, self.bucket_bytes):
                whole = whole and self._broadcast(bucket, version if last else None, update)
            if whole:
                update.end()
                update.check_version(version)
                whole = not self._lost(update)
        for _ in stream:  # the other ranks take part in every collective of the stream
            pass
        if whole:
            return True
        self._leave(update)
        # A broadcast ends for all when one of its ends is gone, so who failed says little about who is to blame. Where
        # an engine died, those that are alive failed because of it: they are asked again, in a group without it. Where
        # all are alive, each refused for a reason of its own, which would be there the next time too. Every attempt
        # that is followed by another has lost an engine, so there are no more attempts than engines.
        hurt = [url for url in asked if url in update.failed]
        alive = [url for url in hurt if update.alive(url)]
        if alive == hurt:
            return True
        for url in alive:
            del update.failed[url]
        return not update.urls

    def _lost(self, update: Update) -> bool:
        return set(self._members) != set(update.urls)

    def _check_alive(self, update: Update) -> None:
        """Leave out servers that are not there, and forget the group where one has been started again since."""
        for url in update.urls:
            try:
                found = update.get(url, "/model_info")["weight_version"]
            except (ServerError, KeyError, TypeError) as error:
                update.failed[url] = str(error)
                continue
            if self._group is not None and found != self._version:
                self._leave(update)

    def _join(self, update: Update) -> bool:
        """Make the group of rank 0 and the engines unless it is there."""
        if self._group is not None and self._members == update.urls:
            return True
        self._leave(update)
        places = update.places(1)
        if not update.urls:
            return True
        address = self.master_address or _address(update.urls)
        port = self.master_port or _free_port()
        name = f"bpdg-{uuid.uuid4().hex[:8]}"
        world = 1 + sum(map(len, places.values()))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._members = list(update.urls)
        joined = update.start(
            "/init_weights_update_group",
            lambda url: {
                "master_address": address,
                "master_port": port,
                "rank_offset": places[url].start,
                "world_size": world,
                "group_name": name,
                "backend": backend,
            },
        )
        try:
            self._group = _make_group(address, port, world, name, backend, self.timeout_s)
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
        received = update.start(
            "/update_weights_from_distributed",
            {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self._name,
                "flush_cache": version is not None,
                "weight_version": version,
            },
        )
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
        body = {"group_name": self._name}
        left = update.start("/destroy_weights_update_group", body, timeout_s=30.0, heed=False)
        # Not after the answers: an engine that waits for a lost bucket hears nothing until our end closes.
        self._abandon()
        left()

    def _abandon(self) -> None:
        """Close our end of the group at once, whatever is still under way."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
        self._group, self._members = None, []

    def close(self) -> None:
        if self._group is not None:
            with self.update(self._members) as update:
                self._leave(update)


def _tell(again: bool) -> bool:
    """Rank 0's word to all ranks. Collective over the world."""
    word = [again]
    dist.broadcast_object_list(word, src=0)
    return word[0]


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
