"""From a config to the parts of a run, with every mismatch between them found before the first step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.hf import write_fresh_checkpoint
from megatron_bpdg.checkpoint.live import load_weights
from megatron_bpdg.config.schema import RunConfig, Sampling, Training
from megatron_bpdg.config.weights import GateConfig
from megatron_bpdg.data.graders import get_grader
from megatron_bpdg.data.prompts import BOXED_SUFFIX, Problem, Prompts, encode_prompts, load_problems, load_sft
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.models.qwen3 import DTYPES, ModelShape, build_model
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.head import Head
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.serving.http.client import api_key
from megatron_bpdg.serving.sglang.facts import served_room
from megatron_bpdg.training.behaviour import SamplerBehaviour, TrainerBehaviour
from megatron_bpdg.training.engines import (
    build_engine,
    build_teacher,
    teacher_source,
    wait_for_servers,
)
from megatron_bpdg.training.method import (
    build_factors,
    build_gate,
    build_objective,
    build_partition,
    check_objective,
)
from megatron_bpdg.training.optimizer import build_optimizer, wrap
from megatron_bpdg.training.run import Run
from megatron_bpdg.training.step import Updater

_WEIGHT_GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"


def build_run(cfg: RunConfig) -> Run:
    """Student, teacher, sampler and data of an on-policy distillation run.

    Raises:
        ValueError: naming the field whose value does not fit the rest.
    """
    assert cfg.teacher is not None
    if cfg.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("logging.wandb is set but the package is missing: pip install 'megatron-bpdg[wandb]'")
    wait_for_servers(cfg)
    updates = cfg.training.steps * cfg.training.epochs * cfg.training.minibatches
    run = _build_student(cfg, updates)
    with ExitStack() as on_failure:
        on_failure.callback(run.close)
        needs = run.updater.objective.needs
        source = teacher_source(cfg.teacher)
        teacher_folder = _folder(source, "teacher.checkpoint")
        teacher_shape = run.teacher_shape = ModelShape.from_hf(read_hf_config(teacher_folder))
        _check_same_vocabulary(run, teacher_shape, teacher_folder)
        if needs.top_k > teacher_shape.vocab_size:
            raise ValueError(f"objective.top_k = {needs.top_k} exceeds the vocabulary of {teacher_shape.vocab_size}")
        run._teacher = build_teacher(cfg, needs, run.student, run.tokenizer, source, teacher_shape)
        run.prompts = load_prompts(cfg, cfg.data.train, run.tokenizer)
        _check_payload_fits(cfg, run)
        for role, shape in (("student", run.student.shape), ("teacher", teacher_shape)):
            _check_room(run.prompts, cfg.rollout.sampling, "rollout.sampling", _rooms(cfg, role, shape))
        on_failure.pop_all()
    return run


def build_supervised(cfg: RunConfig) -> tuple[Run, list[Trajectory]]:
    """Student and worked examples of a supervised run."""
    run = _build_student(cfg, cfg.training.steps)
    examples = []
    for index, example in enumerate(load_sft(cfg.data.train, run.tokenizer, chat_template=cfg.data.chat_template)):
        trajectory = Trajectory(
            problem=index,
            sample=0,
            prompt_ids=example.prompt_ids,
            response_ids=example.response_ids,
            sampler_logprobs_R=torch.zeros(len(example.response_ids)),
            finished=True,
            block_R=torch.zeros(len(example.response_ids), dtype=torch.int64),
        )
        trajectory.check(run.student.shape.vocab_size)
        positions, tokens = run.student.shape.max_position_embeddings, len(example.prompt_ids + example.response_ids)
        if tokens > positions:
            raise ValueError(
                f"data.train: example {example.id!r} has {tokens} tokens but the student only {positions} positions; "
                "shorten it or leave it out"
            )
        examples.append(trajectory)
    return run, examples


def _build_student(cfg: RunConfig, total_updates: int) -> Run:
    objective = build_objective(cfg.objective)
    check_objective(cfg, objective)
    fusion = fuses_gradient_accumulation(cfg.training, default_device())
    source = cfg.student.checkpoint or _fresh_checkpoint(cfg)
    folder = _folder(source, "student.checkpoint")
    hf_config = read_hf_config(folder)
    shape = ModelShape.from_hf(hf_config)
    dtype = DTYPES[cfg.student.dtype]
    tokenizer = AutoTokenizer.from_pretrained(cfg.student.tokenizer or folder, local_files_only=True)
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(
            f"student.tokenizer has {len(tokenizer)} ids but the model only {shape.vocab_size} rows: "
            "they do not belong together"
        )
    benchmarks = {
        name: load_prompts(cfg, path, tokenizer, limit=cfg.evaluation.limit)
        for name, path in cfg.evaluation.data.items()
    }
    rooms = _rooms(cfg, "student", shape)
    for prompts in benchmarks.values():
        _check_room(prompts, cfg.evaluation.sampling, "evaluation.sampling", rooms)
    model = build_model(shape, cfg.layout, dtype, recompute=cfg.training.recompute, gradient_accumulation_fusion=fusion)
    load_weights([model], source)
    module = wrap(model, cfg.layout)
    optimizer, scheduler = build_optimizer(module, cfg.layout, cfg.training, dtype, total_updates)
    student = MegatronPolicy(
        module,
        shape,
        cfg.layout,
        packed=cfg.training.micro_batch_tokens is not None,
        head=build_head(cfg.training, objective.needs),
    )
    live, prepared = build_factors(cfg)
    return Run(
        cfg=cfg,
        hf_folder=folder,
        hf_config=hf_config,
        tokenizer=tokenizer,
        grader=get_grader(cfg.data.grader),
        student=student,
        module=module,
        updater=Updater(
            student,
            module,
            optimizer,
            objective,
            build_gate(cfg),
            temperature=1.0 if cfg.kind == "sft" else cfg.rollout.sampling.temperature,
            live=live,
            prepared=prepared,
        ),
        scheduler=scheduler,
        behaviour=SamplerBehaviour()
        if cfg.training.old_logprobs == "rollout"
        else TrainerBehaviour(student, cfg.rollout.sampling.temperature),
        partition=build_partition((cfg.drift_gate or GateConfig()).partition, tokenizer),
        engine=build_engine(cfg, folder, student, tokenizer),
        benchmarks=benchmarks,
    )


def build_head(cfg: Training, needs: TeacherNeeds) -> Head:
    """The head that a config section names, one for all passes of a run.

    Old log-probs and the first update must read the vocabulary alike, for drift to be exactly zero there.
    """
    if cfg.head == "auto":
        return Head("materialised" if needs.full else "chunked", cfg.head_chunk_mb, cfg.head_keep_mb)
    return Head(cfg.head, cfg.head_chunk_mb, cfg.head_keep_mb)


def fuses_gradient_accumulation(cfg: Training, device: torch.device) -> bool:
    """Whether the student's linear layers and head add to its main gradients themselves.

    Megatron-Core refuses to build without apex's extension, whichever layers it builds.

    Raises:
        ValueError: the config asks for it where it cannot be.
    """
    if cfg.gradient_accumulation_fusion is False:
        return False
    lacking = None if device.type == "cuda" else "a CUDA device, and there is none"
    try:
        importlib.import_module(_WEIGHT_GRADIENT_EXTENSION)
    except ImportError as error:
        lacking = lacking or f"{_WEIGHT_GRADIENT_EXTENSION}, which does not load ({error}): build apex with --cuda_ext"
    if lacking and cfg.gradient_accumulation_fusion is True:
        raise ValueError(f"training.gradient_accumulation_fusion: true needs {lacking}; or set it to auto")
    return lacking is None


def load_prompts(cfg: RunConfig, path: Path, tokenizer: Any, limit: int | None = None) -> Prompts:
    """Read and tokenize the problems of a file as the config's data section says."""
    problems: Sequence[Problem] = load_problems(path, suffix=BOXED_SUFFIX)[:limit]
    return encode_prompts(
        problems,
        tokenizer,
        chat_template=cfg.data.chat_template,
        enable_thinking=cfg.data.enable_thinking,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        overlong=cfg.data.overlong_prompts,
    )


def _folder(checkpoint: Path, field_name: str) -> Path:
    """`hf_folder`, naming the config field where there is none."""
    try:
        return hf_folder(checkpoint)
    except FileNotFoundError as error:
        raise ValueError(f"{field_name}: {error}") from error


def _rooms(cfg: RunConfig, role: str, shape: ModelShape) -> dict[str, int]:
    """Longest prompt and response together of a role, in tokens, by whose limit it is. Collective over the world."""
    rooms = {f"the {role}'s {shape.max_position_embeddings} positions": shape.max_position_embeddings}
    section = cfg.rollout if role == "student" else cfg.teacher
    if section is None or section.servers is None:
        return rooms
    name = "rollout" if role == "student" else "teacher"
    urls = (cfg.rollout.weight_sync.urls if role == "student" else None) or section.servers.urls
    served = served_room(urls, api_key(section.servers.api_key_env, f"{name}.servers.api_key_env"))
    # What is longer would be cut or refused, and only in the middle of the run.
    why = "the smaller of its --context-length and --max-total-tokens, less a few that SGLang keeps"
    return rooms | {f"the {room} tokens that {url} has room for ({why})": room for url, room in served.items()}


def _check_room(prompts: Prompts, sampling: Sampling, section: str, rooms: Mapping[str, int]) -> None:
    longest = max(len(ids) for ids in prompts.ids)
    for whose, room in rooms.items():
        if longest + sampling.max_new_tokens > room:
            raise ValueError(
                f"{section}.max_new_tokens = {sampling.max_new_tokens} after a prompt of {longest} tokens exceeds "
                f"{whose}; lower it or data.max_prompt_tokens"
            )


def _check_payload_fits(cfg: RunConfig, run: Run) -> None:
    """A full-vocabulary objective keeps the teacher's distribution of every response token on the host."""
    if not run.updater.objective.needs.full:
        return
    responses = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt / cfg.layout.data_parallel
    columns = run.student.shape.vocab_size / cfg.layout.tensor_parallel
    needed = responses * cfg.rollout.sampling.max_new_tokens * columns * 4
    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"objective.name: {cfg.objective.name} keeps up to {needed / 1e9:.0f} GB of teacher log-probs per rank, "
            f"with {available / 1e9:.0f} GB of memory free: use objective.name: lsm, or lower "
            "rollout.prompts_per_step, rollout.samples_per_prompt or rollout.sampling.max_new_tokens"
        )


def _check_same_vocabulary(run: Run, teacher: ModelShape, teacher_folder: Path) -> None:
    student = run.student.shape
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student and teacher differ in vocabulary: {student.vocab_size} and {teacher.vocab_size} rows; "
            "choose a teacher of the student's family and size of vocabulary"
        )
    if (teacher_folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(teacher_folder, local_files_only=True)
        if different := set(run.tokenizer.get_vocab().items()) ^ set(tokenizer.get_vocab().items()):
            raise ValueError(
                f"student's and teacher's tokenizers disagree on {len(different)} entries, such as "
                f"{min(different)[0]!r}: they must be the same"
            )


def _fresh_checkpoint(cfg: RunConfig) -> Path:
    """Seeded weights for `student.init`, written once as an HF checkpoint that every rank then loads its part of."""
    assert cfg.student.init is not None
    folder = cfg.output / "init"
    assert cfg.student.tokenizer is not None
    if dist.get_rank() == 0:
        dtype = DTYPES[cfg.student.dtype]
        write_fresh_checkpoint(cfg.student.init, cfg.student.tokenizer, folder, seed=cfg.seed, dtype=dtype)
    dist.barrier()
    return folder
