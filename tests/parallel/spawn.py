"""Run a function on N gloo ranks in fresh processes and return what each rank returned."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Importing these takes a rank longer than most of what it is then asked.
_IMPORTED_ONCE = ("megatron_bpdg.training.loop", "transformers.models.qwen3_moe.modeling_qwen3_moe")


def _main(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    # A collective that autograd cannot see gives silently wrong gradients: never acceptable here.
    warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save(fn(*args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.err").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def _start_method(fresh: bool) -> str:
    """How to make processes that have run nothing yet.

    They are forked from a server that did nothing but import: as clean as a new interpreter, in a hundredth of its
    time. The server has the environment of its first use, and Triton decides as it is imported whether to interpret
    its kernels: such ranks start from nothing.
    """
    if fresh or "TRITON_INTERPRET" in os.environ:
        return "spawn"
    # The server passes over what it cannot import.
    assert all(find_spec(name) for name in _IMPORTED_ONCE)
    mp.get_context("forkserver").set_forkserver_preload(list(_IMPORTED_ONCE))
    return "forkserver"


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, fresh: bool = False) -> list[Any]:
    """Results of ``fn(*args)`` on every rank; a failing rank's traceback is raised here.

    `fn` must be importable (module level), as the ranks are other processes. With `fresh` ones nothing is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            how = _start_method(fresh)
            mp.start_processes(_main, args=(fn, world_size, folder, args), nprocs=world_size, start_method=how)
        except Exception as failure:
            errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.err")))
            raise AssertionError(errors or str(failure)) from failure
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]
