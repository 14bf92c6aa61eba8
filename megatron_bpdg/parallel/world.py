"""Start and stop this process's part of the run: torch.distributed, Megatron-Core's groups, seeds."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Collection, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.parallel.platform import enable_cpu_platform


@contextlib.contextmanager
def world(layout: Layout, seed: int, timeout_minutes: float = 30.0) -> Iterator[None]:
    """The process groups of a layout, under torchrun, or as a single process.

    NCCL where there is CUDA, else gloo with the CPU platform.

    Raises:
        ValueError: where the number of processes is not the layout's.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != layout.world_size:
        raise ValueError(
            f"layout needs tensor_parallel x pipeline_parallel x context_parallel x data_parallel = "
            f"{layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.context_parallel} x "
            f"{layout.data_parallel} = {layout.world_size} processes, but {size} run; start with "
            "`torchrun --nproc-per-node` to match, or change the layout"
        )
    # torch renamed collectives that Megatron-Core still calls by their old names.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
    owns_group = not dist.is_initialized()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        enable_cpu_platform()
    if owns_group:
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    # The models of an earlier world are garbage in reference cycles, which keeps its groups' threads and sockets open.
    gc.collect()
    before = list(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        # A second, gloo copy of each group, for optimizer states in a checkpoint format that nothing here writes.
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    failed = True
    try:
        yield
        failed = False
    finally:
        # After an error on one rank, taking the groups down would wait for the ranks that wait for it.
        if not failed or size == 1:
            destroy_model_parallel(keep=before)
            if owns_group:
                dist.destroy_process_group()


def destroy_model_parallel(keep: Collection[dist.ProcessGroup]) -> None:
    """End Megatron-Core's parallel state, and all process groups of this rank but those to keep. Collective.

    Megatron-Core's own function only forgets its groups: their threads and sockets would stay.
    """
    parallel_state.destroy_model_parallel()
    # Each call is remembered with the module that it was made on, and that module holds a process group.
    RotaryEmbedding.forward.cache_clear()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in keep:
            dist.destroy_process_group(group)
