"""Weights through memory that the trainer shares with engines on its own machine."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_bpdg.config.rollout import WeightSync as WeightSyncConfig
from megatron_bpdg.serving.sglang.weights.base import (
    Bucket,
    Update,
    Weights,
    WeightSync,
    buckets,
    raise_failed,
)


class TensorSync(WeightSync):
    """`WeightSync` of colocated engines: handles of tensors go over HTTP, the tensors stay where they are.

    On GPUs a handle (CUDA IPC) can be opened only on its own device: the engines must be given in the order of the
    trainer's ranks, an engine of tensor-parallel size t standing on the devices of t consecutive ranks. On CPU any
    engine can open rank 0's.

    Raises:
        ValueError: handles of GPU memory cannot be made here.
    """

    def __init__(self, cfg: WeightSyncConfig, output: Path, api_key: str | None = None) -> None:
        super().__init__(cfg, output, api_key)
        if torch.cuda.is_available() and importlib.util.find_spec("sglang") is None:
            raise ValueError(
                "rollout.weight_sync.method: tensor makes handles of GPU memory with SGLang's own code, and the "
                "trainer's environment has no sglang: install it there too, or use distributed or disk"
            )

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        failed: dict[str, str] = {}
        if dist.get_rank() == 0:
            with self.update(urls) as update:
                # Which payloads each engine's tensor-parallel ranks get, in order.
                ranks = update.places(0)
                devices = sum(map(len, ranks.values()))
                if torch.cuda.is_available() and devices > dist.get_world_size():
                    for url in update.urls:
                        update.failed[url] = (
                            f"the engines have {devices} devices, the trainer {dist.get_world_size()} ranks: "
                            "rollout.weight_sync.method: tensor is for engines on the trainer's own devices; use "
                            "distributed"
                        )
                update.begin()
                self._send(weights, version, update, ranks)
                update.end()
                update.check_version(version)
            failed = update.failed
        else:
            self._send(weights, version, None, {})
        raise_failed(failed)

    def _send(self, weights: Weights, version: str, update: Update | None, ranks: dict[str, range]) -> None:
        with _shared_by_name():
            for bucket, last in buckets(weights, self.cfg.bucket_mb * 10**6):
                payloads = _payloads(bucket, sum(map(len, ranks.values())))
                if update is None:
                    # Peers keep their bucket until rank 0 has heard that it was read.
                    dist.barrier()
                    continue

                def body(url: str, payloads: Any = payloads, last: bool = last) -> dict[str, Any]:
                    return {
                        "serialized_named_tensors": [payloads[rank] for rank in ranks[url]],
                        "flush_cache": last,
                        "weight_version": version if last else None,
                    }

                update.post("/update_weights_from_tensor", body)
                if dist.get_world_size() > 1:
                    dist.barrier()


def _payloads(bucket: Bucket, receivers: int) -> Any:
    """What `MultiprocessingSerializer` makes of a bucket, by rank. Collective over the world on GPUs."""
    if not torch.cuda.is_available():
        if dist.get_rank() != 0:
            return None
        # Opening a handle uses it up: each engine's rank gets one of its own.
        return [_serialize(bucket) for _ in range(receivers)]
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    # Names devices by UUID: the engine may number them differently.
    monkey_patch_torch_reductions()
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_serialize(bucket), gathered)
    return gathered


def _serialize(bucket: Bucket) -> str:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(bucket)
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Share CPU tensors through named files: a file descriptor cannot be handed to a process that is not our child."""
    before = torch.multiprocessing.get_sharing_strategy()
    if before != "file_system":
        _keep_descriptors()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _keep_descriptors() -> None:
    """Let no descriptor but the standard ones pass to other programs.

    torch starts a program that looks after the named files. It lives as long as a server maps one of them, and
    whoever waits for the end of a pipe that it had inherited from us would wait as long.
    """
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2:
            # The listing's own descriptor is closed by now.
            with suppress(OSError):
                os.set_inheritable(descriptor, False)
