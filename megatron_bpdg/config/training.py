"""The optimizer's side of a step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_bpdg.config.section import Section


class Training(Section):
    """The optimizer's side of a step."""

    steps: int = Field(200, ge=1)
    epochs: int = Field(2, ge=1, description="passes over each rollout batch; drift comes from here")
    minibatches: int = Field(1, ge=1, description="optimizer updates per epoch")
    batch_size: int = Field(64, ge=1, description="kind: sft only: examples per optimizer update")
    micro_batch_size: int = Field(1, ge=1, description="sequences per forward pass per data-parallel rank")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="instead of micro_batch_size: pack sequences without padding up to this many prompt and response "
        "tokens per rank and forward pass; a longer sequence gets a forward pass of its own",
    )
    lr: float = Field(2e-6, gt=0.0)
    lr_warmup_updates: int = Field(
        0, ge=0, description="optimizer updates of linear warm-up; as in Megatron-Core the first one has rate 0"
    )
    lr_schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.98, ge=0.0, lt=1.0)
    adam_eps: float = Field(1e-8, gt=0.0)
    clip_grad: float = Field(1.0, gt=0.0)
    old_logprobs: Literal["trainer", "rollout"] = Field(
        "trainer", description="who computes log pi_old: the trainer (recomputed) or the sampler (as recorded)"
    )
    max_mismatch: float | None = Field(
        None,
        gt=0.0,
        description="largest mismatch/abs_mean at step 1, in nats; above it sampler and trainer are not the same model "
        "and the run stops; null: 1e-3 for student.dtype float32, 0.1 for bfloat16",
    )
    recompute: bool = Field(False, description="recompute activations in the backward pass")
    head: Literal["auto", "materialised", "chunked", "fused"] = Field(
        "auto",
        description="how the loss reads the vocabulary: with materialised logits, in chunks that never make them, or "
        "with Triton kernels (GPU); auto: materialised for objectives on the whole vocabulary, else chunked",
    )
    head_chunk_mb: float = Field(128.0, gt=0.0, description="bound on a chunk of float32 logits, in units of 1e6 bytes")
    head_keep_mb: float = Field(
        512.0,
        ge=0.0,
        description="chunked: logits that a micro-batch's forward may keep for its backward, in units of 1e6 bytes; "
        "those beyond are made again",
    )
    gradient_accumulation_fusion: Literal["auto", True, False] = Field(
        "auto",
        description="add the gradients of weights to the main gradients as they are computed, without a tensor of "
        "their own; needs a GPU and apex's fused_weight_gradient_mlp_cuda; auto: where both are there",
    )
    deterministic: bool = Field(
        False,
        description="the same bits again from the same responses, on the same devices and software, at some cost in "
        "speed; sets CUBLAS_WORKSPACE_CONFIG, NCCL_ALGO and NVTE_ALLOW_NONDETERMINISTIC_ALGO where they are not set",
    )
    save_every: int = Field(0, ge=0, description="checkpoint every N steps; 0: only at the end")

    @model_validator(mode="after")
    def _one_measure_of_micro_batches(self) -> Training:
        if self.micro_batch_tokens is not None and self.micro_batch_size != 1:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} and micro_batch_tokens: {self.micro_batch_tokens} exclude "
                "each other: remove micro_batch_size to fill micro-batches by tokens"
            )
        return self
