"""The parts of a run that may live on servers: the rollout engine and the teacher."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.checkpoint.live import load_weights
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.config.schema import Teacher as TeacherConfig
from megatron_bpdg.data.prompts import special_ids
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.models.qwen3 import DTYPES, ModelShape, build_model
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.parallel.together import everyone, wait_together
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.rollout.engine import Probe, RolloutEngine
from megatron_bpdg.rollout.sglang import SGLangEngine
from megatron_bpdg.serving.http.background import Background
from megatron_bpdg.serving.http.client import api_key
from megatron_bpdg.serving.http.ready import wait_until_ready
from megatron_bpdg.serving.sglang.weights import build_weight_sync
from megatron_bpdg.teacher.megatron import MegatronTeacher
from megatron_bpdg.teacher.scoring import score
from megatron_bpdg.teacher.sglang import SGLangTeacher, served_model
from megatron_bpdg.teacher.teacher import Teacher

# The text by which a sampler's copy of the weights is checked, and how far right answers to it may be apart (nats).
PROBE_TOKENS = 64
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


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
        groups=student.groups,
        api_key=api_key(cfg.teacher.servers.api_key_env, "teacher.servers.api_key_env"),
    )
    teacher.check_tokenizer(tokenizer)
    return teacher


def build_engine(cfg: RunConfig, folder: Path, student: MegatronPolicy, tokenizer: Any) -> RolloutEngine:
    """The rollout engine that the config names."""
    if cfg.rollout.engine == "embedded":
        eos_id, pad_id = special_ids(tokenizer, "student.tokenizer")
        dtype = DTYPES[cfg.student.dtype]
        return EmbeddedEngine(folder, eos_id=eos_id, pad_id=pad_id, batch_size=cfg.rollout.batch_size, dtype=dtype)
    assert cfg.rollout.servers is not None
    groups = student.groups
    key = api_key(cfg.rollout.servers.api_key_env, "rollout.servers.api_key_env")
    return SGLangEngine(
        cfg.rollout.servers,
        build_weight_sync(cfg.rollout.weight_sync, cfg.output, key),
        sync_urls=cfg.rollout.weight_sync.urls,
        replica=groups.data_rank,
        replicas=groups.data_size,
        leader=groups.leads,
        vocab_size=student.shape.vocab_size,
        api_key=key,
    )


def make_probe(student: MegatronPolicy, tolerance: float) -> Probe:
    """A fixed text of random ids and what the student says about it. Collective."""
    shape = student.shape
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, shape.max_position_embeddings // 2)
    ids: list[int] = torch.randint(shape.vocab_size, (length,), generator=generator).tolist()
    text = Trajectory(0, 0, ids[:1], ids[1:], torch.zeros(length - 1), finished=True)
    text.block_R = torch.zeros(length - 1, dtype=torch.int64)
    heard: list[torch.Tensor] = []
    score(student, [[text]], TeacherNeeds(), 1.0, lambda _, scores: heard.append(scores["logprobs"].float()))
    return Probe(ids, next(found[0] for found in everyone(heard) if found), tolerance)
