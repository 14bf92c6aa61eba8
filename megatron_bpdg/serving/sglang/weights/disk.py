"""Weights through a file system that the trainer and the servers share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bpdg.parallel.together import on_first
from megatron_bpdg.serving.sglang.weights.base import NewUpdate, Weights, WeightSync, raise_failed


@dataclass
class DiskSync(WeightSync):
    """`WeightSync` that writes one HF directory per version and has the servers read it.

    The newest versions stay when the run ends: a server that is started again can be started from them.

    Args:
        directory: of the versions.
        keep: newest versions that are kept; older ones are deleted once the servers have the new one.
        update: begins an `Update` of some servers.
    """

    directory: Path
    keep: int
    update: NewUpdate
    _kept: list[Path] = field(default_factory=list, init=False)

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        path = self.directory / version
        weights.save(path)

        def read() -> dict[str, str]:
            with self.update(urls) as update:
                body = {"model_path": str(path), "weight_version": version, "flush_cache": True}
                update.post("/update_weights_from_disk", body)
                update.check_version(version)
            # Only what this run wrote is deleted; the servers read during `push` alone.
            self._kept = [kept for kept in self._kept if kept != path] + [path]
            for old in self._kept[: -self.keep]:
                shutil.rmtree(old)
            self._kept = self._kept[-self.keep :]
            return update.failed

        raise_failed(on_first(read))
