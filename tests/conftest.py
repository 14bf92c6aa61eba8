"""Settings of the whole suite: one thread per process, strict warnings, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported, and inherited by the ranks that tests spawn: ranks with several spinning OpenMP threads
# each slow one another down by an order of magnitude.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# The same examples in every run: a red build is reproducible, and a green one stays green.
# The small cases that break a property come first.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    # A collective that autograd cannot see gives silently wrong gradients.
    config.addinivalue_line("filterwarnings", "error:.*autograd kernel was not registered.*:UserWarning")


# The long ones go first, so that at the end no worker waits for another.
_LONG_FIRST = ("serving", "parallel", "integration", "unit")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one worker, which makes its fixtures once; all files that share the servers stay together."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "serving" if "/serving/" in file else file

    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {folder: place for place, folder in enumerate(_LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
