"""From Megatron's ranks into SGLang servers: through a file system, shared memory, or a collective group."""

from __future__ import annotations

from pathlib import Path

from megatron_bpdg.config.rollout import WeightSync as WeightSyncConfig
from megatron_bpdg.serving.sglang.weights.base import WeightSync, WeightSyncError
from megatron_bpdg.serving.sglang.weights.disk import DiskSync
from megatron_bpdg.serving.sglang.weights.distributed import DistributedSync
from megatron_bpdg.serving.sglang.weights.tensor import TensorSync

__all__ = ["DiskSync", "DistributedSync", "TensorSync", "WeightSync", "WeightSyncError", "build_weight_sync"]


def build_weight_sync(cfg: WeightSyncConfig, output: Path, api_key: str | None = None) -> WeightSync:
    """The transport that the config names; see `WeightSync`."""
    kinds: dict[str, type[WeightSync]] = {"disk": DiskSync, "tensor": TensorSync, "distributed": DistributedSync}
    return kinds[cfg.method](cfg, output, api_key)
