"""Megatron-Core's DistributedDataParallel, optimizer and schedule, set up for summed (not averaged) gradients."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.training import Training
from megatron_bpdg.models.qwen3 import HiddenStateGPTModel


def wrap(model: HiddenStateGPTModel, layout: Layout) -> DistributedDataParallel:
    """Data parallelism that sums float32 gradients; the step divides by its exact global mass."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=layout.distributed_optimizer,
        average_in_collective=False,
    )
    return DistributedDataParallel(model.config, config, model)


def build_optimizer(
    module: DistributedDataParallel, layout: Layout, training: Training, dtype: torch.dtype, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with the run's schedule, counted in optimizer updates."""
    min_lr = 0.0 if training.lr_schedule == "cosine" else training.lr
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.lr,
            min_lr=min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        [module],
        use_gloo_process_groups=False,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if training.lr_warmup_updates else training.lr,
        max_lr=training.lr,
        min_lr=min_lr,
        lr_warmup_steps=training.lr_warmup_updates,
        lr_decay_steps=max(total_updates, training.lr_warmup_updates + 1),
        lr_decay_style=training.lr_schedule,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
