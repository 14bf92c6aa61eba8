"""One pydantic model per YAML section. Unknown keys are errors; every field states its unit or source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_bpdg.config.objective import ObjectiveConfig
from megatron_bpdg.config.section import Section
from megatron_bpdg.config.user import ByName, UserClass
from megatron_bpdg.config.weights import DriftGate, GateConfig, WeightConfig


class Layout(Section):
    """How model and tokens are spread over ranks; tensor x pipeline x context x data parallel is their number."""

    tensor_parallel: int = Field(1, ge=1, description="ranks that share each layer's matrices and the vocabulary")
    pipeline_parallel: int = Field(1, ge=1, description="ranks that share the stack of layers")
    context_parallel: int = Field(
        1, ge=1, description="ranks that share each sequence's tokens, attention included; for long responses"
    )
    data_parallel: int = Field(1, ge=1, description="replicas of the model")
    expert_parallel: int = Field(
        1,
        ge=1,
        description="ranks that share the experts of a layer, out of the tensor-, context- and data-parallel ones; "
        "dense models take no notice",
    )
    expert_tensor_parallel: int = Field(
        1, ge=1, description="ranks that share each expert's matrices, out of the same ones"
    )
    sequence_parallel: bool = Field(
        False, description="shard activations between tensor-parallel regions along the sequence"
    )
    distributed_optimizer: bool = Field(False, description="shard optimizer state over the data-parallel ranks")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @model_validator(mode="after")
    def _sequence_parallel_needs_tp(self) -> Layout:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel: true needs tensor_parallel > 1; set one of the two")
        return self

    @model_validator(mode="after")
    def _experts_divide_the_ranks(self) -> Layout:
        ranks = self.tensor_parallel * self.context_parallel * self.data_parallel
        wanted = self.expert_parallel * self.expert_tensor_parallel
        if ranks % wanted:
            raise ValueError(
                f"expert_parallel x expert_tensor_parallel = {self.expert_parallel} x {self.expert_tensor_parallel} = "
                f"{wanted} must divide tensor_parallel x context_parallel x data_parallel = {self.tensor_parallel} x "
                f"{self.context_parallel} x {self.data_parallel} = {ranks}: experts are spread over those ranks"
            )
        return self


class Model(Section):
    """A Qwen3 model: either a checkpoint (HF directory or Megatron torch_dist) or fresh weights for a shape."""

    checkpoint: Path | None = Field(None, description="HF directory (config.json + safetensors) or a bpdg checkpoint")
    init: Path | None = Field(None, description="HF config.json whose shape gets fresh seeded weights")
    tokenizer: Path | None = Field(None, description="HF tokenizer directory; default: the checkpoint's own")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="compute dtype of weights and activations")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.checkpoint is None) == (self.init is None):
            raise ValueError("give exactly one of `checkpoint` (existing weights) and `init` (a config.json)")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("`init` has no tokenizer of its own: set `tokenizer` to an HF tokenizer directory")
        return self


class Servers(Section):
    """SGLang servers of one role, and how patient to be with them."""

    urls: list[str] = Field(min_length=1, description="http://host:port of each server, or of an sglang router")
    concurrency: int = Field(256, ge=1, description="requests in flight per URL and data-parallel replica")
    timeout_s: float = Field(1800.0, gt=0.0, description="seconds one request may take")
    attempts: int = Field(4, ge=1, description="tries of one request, over all servers, before the run stops")
    backoff_s: float = Field(1.0, gt=0.0, description="pause after a failure; doubles each time, to at most 30 s")
    recovery_s: float = Field(600.0, gt=0.0, description="how long to wait for a server when none is left")
    api_key_env: str | None = Field(None, description="environment variable with the servers' API key")

    @model_validator(mode="after")
    def _urls(self) -> Servers:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"url {url!r} should start with http:// or https://")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError(f"urls {self.urls} has a URL twice")
        return self


class Teacher(Section):
    """Where the teacher's signal comes from. Its top-K supports are never touched by the gate."""

    engine: Literal["megatron", "sglang"] = Field(
        "megatron", description="in the trainer's processes (megatron), or servers (sglang)"
    )
    checkpoint: Path | None = Field(
        None,
        description="HF directory or bpdg checkpoint; engine: sglang reads its config.json and tokenizer only, and "
        "where it is null, those of the servers' model path",
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    offload: bool = Field(False, description="engine: megatron: keep the weights in host memory between uses")
    servers: Servers | None = Field(None, description="engine: sglang: where the teacher is served")
    tokens_per_request: int = Field(65_536, ge=1, description="engine: sglang: prompt and response tokens per request")
    payload_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="engine: sglang: width in which the teacher's log-probs are kept; ids are int32"
    )

    @model_validator(mode="after")
    def _engine_fits(self) -> Teacher:
        defaults = {name: field.default for name, field in Teacher.model_fields.items()}
        other = {
            "megatron": ["servers", "tokens_per_request", "payload_dtype"],
            "sglang": ["offload", "dtype"],
        }[self.engine]
        if unused := [name for name in other if getattr(self, name) != defaults[name]]:
            raise ValueError(f"engine: {self.engine} does not use {', '.join(unused)}: remove it")
        if self.engine == "megatron" and self.checkpoint is None:
            raise ValueError("engine: megatron needs `checkpoint`")
        if self.engine == "sglang" and self.servers is None:
            raise ValueError("engine: sglang needs `servers: {urls: [...]}`; start them with `bpdg serve teacher`")
        return self


class BuiltInGrader(Section):
    """A grader that comes with the program."""

    name: Literal["math_verify", "exact"]


def _named(value: Any) -> Any:
    """A bare name is short for a section with nothing else."""
    return {"name": value} if isinstance(value, str) else value


GraderConfig = Annotated[BuiltInGrader | UserClass, ByName()]


class Data(Section):
    """Prompts: parquet (DAPO layout) or JSONL."""

    train: Path = Field(description="training prompts (.parquet or .jsonl); for kind: sft, lines with `response`")
    chat_template: bool = Field(True, description="render messages with the tokenizer's chat template")
    enable_thinking: bool | None = Field(None, description="passed to the chat template where it knows the switch")
    max_prompt_tokens: int = Field(2048, ge=1)
    overlong_prompts: Literal["error", "drop", "truncate_left"] = Field(
        "error", description="what to do with prompts over max_prompt_tokens; drops are counted and logged"
    )
    grader: Annotated[
        GraderConfig,
        BeforeValidator(_named, json_schema_input_type=str | GraderConfig),
    ] = Field(
        BuiltInGrader(name="math_verify"),
        description="math_verify | exact | module:function, or {name: module:Class, args: {...}}",
    )


class Sampling(Section):
    """How responses are drawn. Log-probs always refer to the full distribution at `temperature`."""

    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(16384, ge=1)


class WeightSync(Section):
    """How the student's weights get into SGLang servers after every step."""

    method: Literal["disk", "tensor", "distributed"] = Field(
        "disk",
        description="disk: through a shared file system; tensor: shared memory of engines on the trainer's own "
        "devices; distributed: a collective group of the trainer's first rank and the engines",
    )
    urls: list[str] | None = Field(None, description="engines behind a router; null: rollout.servers.urls")
    directory: Path | None = Field(None, description="disk: shared directory; null: `sampler_weights` in the output")
    keep: int = Field(2, ge=1, description="disk: versions that are kept")
    bucket_mb: int = Field(512, ge=1, description="tensor, distributed: megabytes sent at once")
    pause: Literal["retract", "abort"] = Field(
        "retract", description="what the engines do with requests under way: redo their caches, or cut them off"
    )
    master_address: str | None = Field(
        None, description="distributed: the trainer's address; null: the one that leads to the engines"
    )
    master_port: int | None = Field(None, ge=1, le=65_535, description="distributed: null: a free one")
    timeout_s: float = Field(
        600.0,
        gt=0.0,
        le=1500.0,
        description="seconds an engine may take to read its weights (disk) or one bucket, for which all ranks wait; to "
        "pause and go on it has at most 60",
    )
    probe_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="largest mean difference in nats between an engine's and the trainer's log-probs of a probe text "
        "after an update; null: 1e-3 for float32 and 0.1 for bfloat16",
    )


class Rollout(Section):
    """On-policy samples of one step: prompts_per_step x samples_per_prompt responses."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="HF generate in the trainer's processes (embedded), or servers (sglang)"
    )
    prompts_per_step: int = Field(4, ge=1)
    samples_per_prompt: int = Field(8, ge=1)
    sampling: Sampling = Sampling()
    batch_size: int = Field(128, ge=1, description="engine: embedded: sequences decoded at once")
    servers: Servers | None = Field(None, description="engine: sglang: where the student is served")
    weight_sync: WeightSync = WeightSync()
    extra_prompts: int = Field(
        0,
        ge=0,
        description="engine: sglang: prompts sampled beside prompts_per_step; a step takes the groups that finish "
        "first and goes on with the others in the next one (partial rollouts, with mixed weight versions)",
    )

    @model_validator(mode="after")
    def _engine_fits(self) -> Rollout:
        defaults = {name: field.default for name, field in Rollout.model_fields.items()}
        other = {"embedded": ["servers", "weight_sync", "extra_prompts"], "sglang": ["batch_size"]}[self.engine]
        if unused := [name for name in other if getattr(self, name) != defaults[name]]:
            raise ValueError(f"engine: {self.engine} does not use {', '.join(unused)}: remove it")
        if self.engine == "sglang" and self.servers is None:
            raise ValueError("engine: sglang needs `servers: {urls: [...]}`; start them with `bpdg serve student`")
        return self


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


class Evaluation(Section):
    """pass@k on held-out problems (Chen et al. 2021), with paired bootstrap intervals over problems."""

    data: dict[str, Path] = Field(default_factory=dict, description="name -> .parquet or .jsonl")
    every: int = Field(0, ge=0, description="evaluate every N steps; 0: only before and after")
    samples: int = Field(8, ge=1, description="responses per problem (n of pass@k)")
    k: list[int] = Field(default_factory=lambda: [1, 8])
    sampling: Sampling = Sampling()
    limit: int | None = Field(None, ge=1, description="use only the first N problems of each file")

    @model_validator(mode="after")
    def _k_fits(self) -> Evaluation:
        if too_large := [k for k in self.k if not 1 <= k <= self.samples]:
            raise ValueError(f"k {too_large} outside 1..samples ({self.samples})")
        return self


class Logging(Section):
    tensorboard: bool = True
    wandb: str | None = Field(None, description="W&B project; needs the [wandb] extra")


class RunConfig(Section):
    """The whole YAML file."""

    kind: Literal["opd", "sft"] = "opd"
    output: Path = Field(description="run directory; must be new or empty")
    seed: int = Field(0, ge=0)
    layout: Layout = Layout()
    student: Model
    teacher: Teacher | None = None
    data: Data
    rollout: Rollout = Rollout()
    objective: ObjectiveConfig
    gate: GateConfig | None = Field(None, description="short for a drift_gate among the weights; null: none here")
    weights: list[WeightConfig] = Field(
        default_factory=list, description="factors of the tokens' weights; they multiply (docs/concepts.md)"
    )
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @property
    def drift_gate(self) -> GateConfig | None:
        """The one gate of the run, wherever it is given."""
        return next((weight for weight in self.weights if isinstance(weight, DriftGate)), self.gate)

    @model_validator(mode="after")
    def _one_gate(self) -> RunConfig:
        gates = sum(isinstance(weight, DriftGate) for weight in self.weights) + (self.gate is not None)
        if gates > 1:
            raise ValueError(f"gate and weights hold {gates} drift gates: a run measures one drift; keep one of them")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.kind == "sft") != (self.objective.name == "sft"):
            raise ValueError(f"kind: {self.kind} does not go with objective.name: {self.objective.name}")
        if self.kind == "opd" and self.teacher is None:
            raise ValueError("kind: opd needs a `teacher` section")
        defaults = Training()
        sections, fields = {
            "sft": (["gate", "weights", "teacher"], ["epochs", "minibatches", "old_logprobs"]),
            "opd": ([], ["batch_size"]),
        }[self.kind]
        unused = [name for name in sections if getattr(self, name)]
        unused += [f"training.{x}" for x in fields if getattr(self.training, x) != getattr(defaults, x)]
        if unused:
            raise ValueError(f"kind: {self.kind} does not use {', '.join(unused)}: remove it")
        if self.teacher is not None and self.teacher.servers is not None and self.rollout.servers is not None:
            both = {url.rstrip("/") for url in self.teacher.servers.urls} & {
                url.rstrip("/") for url in [*self.rollout.servers.urls, *(self.rollout.weight_sync.urls or [])]
            }
            if both:
                raise ValueError(
                    f"{', '.join(sorted(both))} is in teacher.servers and in rollout.servers: the student's weights "
                    "would replace the teacher's"
                )
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.kind == "opd" and samples < self.training.minibatches:
            raise ValueError(
                f"training.minibatches = {self.training.minibatches} exceeds the {samples} responses of a step "
                "(rollout.prompts_per_step * rollout.samples_per_prompt)"
            )
        return self
