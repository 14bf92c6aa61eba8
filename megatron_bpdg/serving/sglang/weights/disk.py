"""Weights through a file system that the trainer and the servers share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_bpdg.parallel.together import on_first
from megatron_bpdg.serving.sglang.weights.base import Weights, WeightSync, raise_failed


class DiskSync(WeightSync):
    """`WeightSync` that writes one HF directory per version and has the servers read it.

    The newest versions stay when the run ends: a server that is started again can be started from them.
    """

    _kept: Sequence[Path] = ()

    def push(self, weights: Weights, version: str, urls: Sequence[str]) -> None:
        path = (self.cfg.directory or self.output / "sampler_weights").resolve() / version
        weights.save(path)

        def read() -> dict[str, str]:
            with self.update(urls) as update:
                body = {"model_path": str(path), "weight_version": version, "flush_cache": True}
                update.post("/update_weights_from_disk", body)
                update.check_version(version)
            # Only what this run wrote is deleted; the servers read during `push` alone.
            kept = [old for old in self._kept if old != path] + [path]
            for old in kept[: -self.cfg.keep]:
                shutil.rmtree(old)
            self._kept = kept[-self.cfg.keep :]
            return update.failed

        raise_failed(on_first(read))
