"""Weights through a file system that the trainer and the servers share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_bpdg.serving.sglang.weights.base import NewUpdate, Weights, share_outcome


class DiskSync:
    """`WeightSync` that writes one HF directory per version and has the servers read it.

    Args:
        directory: of the versions.
        keep: newest versions that are kept; older ones are deleted once the servers have the new one.
        update: begins an `Update` of some servers.
    """

    def __init__(self, directory: Path, keep: int, update: NewUpdate) -> None:
        self.directory, self.keep, self.update = directory, keep, update
        self._kept: list[Path] = []

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        path = self.directory / version
        weights.save(path)
        failed: dict[str, str] = {}
        if dist.get_rank() == 0:
            with self.update(urls) as update:
                body = {"model_path": str(path), "weight_version": version, "flush_cache": True}
                update.post("/update_weights_from_disk", body)
                update.check_version(version)
            failed = update.failed
            self._prune(path)
        share_outcome(failed)

    def _prune(self, newest: Path) -> None:
        """Only what this run wrote is deleted; the servers read during `push` alone."""
        self._kept = [path for path in self._kept if path != newest] + [newest]
        for path in self._kept[: -self.keep]:
            shutil.rmtree(path)
        self._kept = self._kept[-self.keep :]

    def close(self) -> None:
        """The newest versions stay: a server that is started again can be started from them."""
