"""From a config to the parts of a run: the only room that knows how each is made. `fits` has the checks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoTokenizer

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.files import staged_directory
from megatron_bpdg.checkpoint.hf import write_fresh_checkpoint
from megatron_bpdg.checkpoint.live import load_weights
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.config.teacher import Teacher as TeacherConfig
from megatron_bpdg.config.training import Training
from megatron_bpdg.config.weights import GateConfig
from megatron_bpdg.data.end_tokens import end_ids
from megatron_bpdg.data.graders import check_answers, get_grader
from megatron_bpdg.data.prompts import (
    Problem,
    Prompts,
    encode_prompts,
    load_problems,
    load_sft,
)
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.models.qwen3 import DTYPES, ModelShape, build_model
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.head import Head
from megatron_bpdg.parallel.platform import default_device
from megatron_bpdg.parallel.together import on_first, wait_together
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.rollout.engine import RolloutEngine
from megatron_bpdg.rollout.sglang import SGLangEngine
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import api_key
from megatron_bpdg.serving.http.ready import wait_until_ready
from megatron_bpdg.serving.sglang.weights import build_weight_sync
from megatron_bpdg.teacher.megatron import MegatronTeacher
from megatron_bpdg.teacher.sglang import SGLangTeacher, served_model
from megatron_bpdg.teacher.teacher import Teacher
from megatron_bpdg.training.behaviour import SamplerBehaviour, TrainerBehaviour
from megatron_bpdg.training.fits import (
    check_lengths,
    check_objective,
    check_payload_fits,
    check_same_vocabulary,
    fuses_gradient_accumulation,
    token_limits,
)
from megatron_bpdg.training.method import (
    build_factors,
    build_gate,
    build_objective,
    build_partition,
)
from megatron_bpdg.training.optimizer import build_optimizer, wrap
from megatron_bpdg.training.run import Run
from megatron_bpdg.training.step import Updater


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
        run.teacher_hf_config = read_hf_config(teacher_folder)
        teacher_shape = ModelShape.from_hf(run.teacher_hf_config)
        check_same_vocabulary(run.student.shape, run.tokenizer, teacher_shape, teacher_folder)
        ends, teachers = (end_ids(f, run.tokenizer, f.name) for f in (run.hf_folder, teacher_folder))
        if ends != teachers:
            run.warnings.append(
                f"the student's responses end at the ids {_listed(ends)}, the teacher's at {_listed(teachers)} "
                "(eos_token_id of config.json and generation_config.json): one goes on where the other has ended"
            )
        if needs.top_k > teacher_shape.vocab_size:
            raise ValueError(f"objective.top_k = {needs.top_k} exceeds the vocabulary of {teacher_shape.vocab_size}")
        run._teacher = build_teacher(cfg, needs, run.student, run.tokenizer, source, teacher_shape)
        run.prompts = load_prompts(cfg, cfg.data.train, run.tokenizer)
        check_payload_fits(cfg, needs, run.student.shape)
        for role, shape in (("student", run.student.shape), ("teacher", teacher_shape)):
            check_lengths(run.prompts, cfg.rollout.sampling, "rollout.sampling", token_limits(cfg, role, shape))
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
    limits = token_limits(cfg, "student", shape)
    for prompts in benchmarks.values():
        check_lengths(prompts, cfg.evaluation.sampling, "evaluation.sampling", limits)
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


def load_prompts(cfg: RunConfig, path: Path, tokenizer: Any, limit: int | None = None) -> Prompts:
    """Read and tokenize the problems of a file as the config's data section says."""
    problems: Sequence[Problem] = load_problems(path)[:limit]
    check_answers(get_grader(cfg.data.grader), problems, path)
    return encode_prompts(
        problems,
        tokenizer,
        chat_template=cfg.data.chat_template,
        enable_thinking=cfg.data.enable_thinking,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        overlong=cfg.data.overlong_prompts,
    )


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _folder(checkpoint: Path, field_name: str) -> Path:
    """`hf_folder`, naming the config field where there is none."""
    try:
        return hf_folder(checkpoint)
    except FileNotFoundError as error:
        raise ValueError(f"{field_name}: {error}") from error


def _fresh_checkpoint(cfg: RunConfig) -> Path:
    """Seeded weights for `student.init`, written once as an HF checkpoint that every rank then loads its part of."""
    assert cfg.student.init is not None
    config, tokenizer, dtype = cfg.student.init, cfg.student.tokenizer, DTYPES[cfg.student.dtype]
    assert tokenizer is not None
    folder = cfg.output / "init"
    with staged_directory(folder, overwrite=True) as building:
        on_first(lambda: write_fresh_checkpoint(config, tokenizer, building, seed=cfg.seed, dtype=dtype))
    return folder


def wait_for_servers(cfg: RunConfig) -> None:
    """Give servers that the config names and that are still starting their `recovery_s`. Collective."""
    roles = {"rollout": cfg.rollout.servers, "teacher": cfg.teacher.servers if cfg.teacher else None}
    for role, servers in roles.items():
        if servers is None:
            continue
        key = api_key(servers.api_key_env, f"{role}.servers.api_key_env")
        if dist.get_rank() != 0:
            wait_together([])
            continue
        engines = (cfg.rollout.weight_sync.urls or servers.urls) if role == "rollout" else []
        with closing(Background("bpdg-ready")) as background:
            ready = background.submit(wait_until_ready(servers, role, key, Console(stderr=True), engines=engines))
            wait_together([ready])
            ready.result()


def teacher_source(cfg: TeacherConfig) -> Path:
    """Where the teacher's config.json and tokenizer lie, and under teacher.engine: megatron its weights.

    Raises:
        ValueError: the servers' model is not the one that `teacher.checkpoint` describes, or cannot be read from here.
    """
    if cfg.engine == "megatron":
        assert cfg.checkpoint is not None
        return cfg.checkpoint
    assert cfg.servers is not None
    served = served_model(cfg.servers, api_key(cfg.servers.api_key_env, "teacher.servers.api_key_env"))
    readable = (served / "config.json").is_file()
    if cfg.checkpoint is None:
        if not readable:
            raise ValueError(
                f"teacher.checkpoint: the servers' model path {served} cannot be read from here; set it to a directory "
                "with the teacher's config.json and tokenizer"
            )
        return served
    if readable:
        ours, theirs = (ModelShape.from_hf(read_hf_config(hf_folder(path))) for path in (cfg.checkpoint, served))
        if ours != theirs:
            raise ValueError(
                f"teacher.checkpoint: {cfg.checkpoint} is a model of another shape than {served}, which "
                f"{cfg.servers.urls[0]} serves: {ours} and {theirs}"
            )
    return cfg.checkpoint


def build_teacher(
    cfg: RunConfig, needs: TeacherNeeds, student: MegatronPolicy, tokenizer: Any, source: Path, shape: ModelShape
) -> Teacher:
    """The teacher that the config names, its model loaded or its servers asked.

    Args:
        needs: what the objective reads.
        tokenizer: the student's, which the servers must agree with.
        source, shape: the teacher's checkpoint and sizes.

    Raises:
        ValueError: the objective needs what servers do not give, or they do not fit.
    """
    assert cfg.teacher is not None
    temperature = cfg.rollout.sampling.temperature
    if cfg.teacher.engine == "megatron":
        model = build_model(shape, cfg.layout, DTYPES[cfg.teacher.dtype])
        load_weights([model], source)
        policy = MegatronPolicy(model, shape, cfg.layout, packed=student.packed, head=student.head)
        return MegatronTeacher(policy, needs, temperature, offload=cfg.teacher.offload)
    assert cfg.teacher.servers is not None
    teacher = SGLangTeacher(
        cfg.teacher,
        needs,
        temperature,
        vocab_size=shape.vocab_size,
        mesh=student.mesh,
        api_key=api_key(cfg.teacher.servers.api_key_env, "teacher.servers.api_key_env"),
    )
    teacher.check_tokenizer(tokenizer)
    return teacher


def build_engine(cfg: RunConfig, folder: Path, student: MegatronPolicy, tokenizer: Any) -> RolloutEngine:
    """The rollout engine that the config names."""
    ends = end_ids(folder, tokenizer, "student")
    if cfg.rollout.engine == "embedded":
        dtype = DTYPES[cfg.student.dtype]
        return EmbeddedEngine(folder, end_ids=ends, batch_size=cfg.rollout.batch_size, dtype=dtype)
    assert cfg.rollout.servers is not None
    key = api_key(cfg.rollout.servers.api_key_env, "rollout.servers.api_key_env")
    return SGLangEngine(
        cfg.rollout.servers,
        build_weight_sync(cfg.rollout.weight_sync, cfg.output, key),
        sync_urls=cfg.rollout.weight_sync.urls,
        mesh=student.mesh,
        vocab_size=student.shape.vocab_size,
        end_ids=ends,
        api_key=key,
    )
