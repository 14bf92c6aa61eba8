"""A world that ends gives back what it took: ranks that go through many layouts do not drown in threads and sockets."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.parallel.layouts import Case, run_case, write_models
from tests.parallel.spawn import run_ranks

LAYOUTS = (
    {"tensor_parallel": 2, "sequence_parallel": True},
    {"pipeline_parallel": 2},
    {"context_parallel": 2},
    {"data_parallel": 2},
    {"data_parallel": 2, "distributed_optimizer": True},
)


def held_after_each(models: Path) -> tuple[int, list[tuple[int, int]]]:
    """Process groups that are left, and (threads, file descriptors) after each of ten layouts with a step each."""
    process = psutil.Process()
    held = []
    for layout in LAYOUTS * 2:
        run_case(Case(layout), models, updates=("lsm",), train_steps=0)
        gc.collect()  # the models, which hold their groups, were this function's
        held.append((process.num_threads(), process.num_fds()))
    return len(dist.distributed_c10d._world.pg_map), held


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def test_a_second_round_of_layouts_in_one_process_holds_no_more_than_the_first(models: Path) -> None:
    for groups, held in run_ranks(held_after_each, 2, models):
        assert groups == 1  # the one that was there before
        # The first round starts what a process keeps, such as autograd's own threads.
        first, second = (list(zip(*part)) for part in (held[: len(LAYOUTS)], held[len(LAYOUTS) :]))
        assert max(second[0]) <= max(first[0]), f"threads: {held}"
        assert max(second[1]) <= max(first[1]), f"file descriptors: {held}"
