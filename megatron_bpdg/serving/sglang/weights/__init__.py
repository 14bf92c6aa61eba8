"""From Megatron's ranks into SGLang servers: through a file system, shared memory, or a collective group."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_bpdg.config.rollout import WeightSync as WeightSyncConfig
from megatron_bpdg.serving.sglang.weights.base import Update, WeightSync, WeightSyncError
from megatron_bpdg.serving.sglang.weights.disk import DiskSync
from megatron_bpdg.serving.sglang.weights.distributed import DistributedSync
from megatron_bpdg.serving.sglang.weights.tensor import TensorSync

__all__ = ["DiskSync", "DistributedSync", "TensorSync", "WeightSync", "WeightSyncError", "build_weight_sync"]


def build_weight_sync(cfg: WeightSyncConfig, output: Path, api_key: str | None = None) -> WeightSync:
    """The transport that the config names.

    Args:
        output: the run's directory, where weights lie that have no directory of their own.
        api_key: bearer token of the servers, or None.
    """
    update = partial(Update, pause=cfg.pause, timeout_s=cfg.timeout_s, api_key=api_key)
    if cfg.method == "disk":
        directory = (cfg.directory or output / "sampler_weights").resolve()
        return DiskSync(directory, cfg.keep, update)
    if cfg.method == "tensor":
        return TensorSync(cfg.bucket_mb * 10**6, update)
    return DistributedSync(cfg.bucket_mb * 10**6, update, cfg.timeout_s, cfg.master_address, cfg.master_port)
