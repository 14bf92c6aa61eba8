"""What of a config, its checkpoints and its servers goes together; every error names the fields."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.config.training import Training
from megatron_bpdg.data.prompts import Prompts
from megatron_bpdg.models.shape import ModelShape
from megatron_bpdg.objectives.objective import Objective, TeacherNeeds
from megatron_bpdg.serving.http.client import api_key
from megatron_bpdg.serving.sglang.facts import served_token_limits

_WEIGHT_GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"


def check_objective(cfg: RunConfig, objective: Objective) -> None:
    """Whether head and teacher of the config give what the objective reads.

    A server gives log-probs of given tokens at temperature 1, and of the K most likely ids.

    Raises:
        ValueError: naming the fields that do not go together.
    """
    name, needs = cfg.objective.name, objective.needs
    if needs.full and cfg.training.head in ("chunked", "fused"):
        raise ValueError(
            f"training.head: {cfg.training.head} never makes the logits, and objective.name: {name} is a sum over the "
            "whole vocabulary: set training.head to auto or materialised"
        )
    if cfg.teacher is None or cfg.teacher.engine != "sglang":
        return
    if needs.full:
        raise ValueError(
            f"objective.name: {name} needs the teacher's whole distribution, and teacher.engine: sglang gives its top "
            "K: use objective.name: lsm, or teacher.engine: megatron"
        )
    temperature = cfg.rollout.sampling.temperature
    if temperature != 1.0 and needs.normalised:
        raise ValueError(
            f"rollout.sampling.temperature = {temperature:g} with teacher.engine: sglang: servers score given "
            "tokens at temperature 1 only, which is enough for objective.name: lsm with outside: renormalise; use "
            "that, temperature 1, or teacher.engine: megatron"
        )


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


def token_limits(cfg: RunConfig, role: str, shape: ModelShape) -> dict[str, int]:
    """Longest prompt and response together of a role, in tokens, by whose limit it is. Collective over the world."""
    limits = {f"the {role}'s {shape.max_position_embeddings} positions": shape.max_position_embeddings}
    section = cfg.rollout if role == "student" else cfg.teacher
    if section is None or section.servers is None:
        return limits
    name = "rollout" if role == "student" else "teacher"
    urls = (cfg.rollout.weight_sync.urls if role == "student" else None) or section.servers.urls
    served = served_token_limits(urls, api_key(section.servers.api_key_env, f"{name}.servers.api_key_env"))
    # What is longer would be cut or refused, and only in the middle of the run.
    why = "the smaller of its --context-length and --max-total-tokens, less a few that SGLang keeps"
    return limits | {f"the {limit} tokens that {url} has room for ({why})": limit for url, limit in served.items()}


def check_lengths(prompts: Prompts, sampling: Sampling, section: str, limits: Mapping[str, int]) -> None:
    """Raise ValueError where the longest prompt and its response exceed a limit of `token_limits`."""
    longest = max(len(ids) for ids in prompts.ids)
    for whose, limit in limits.items():
        if longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"{section}.max_new_tokens = {sampling.max_new_tokens} after a prompt of {longest} tokens exceeds "
                f"{whose}; lower it or data.max_prompt_tokens"
            )


def check_payload_fits(cfg: RunConfig, needs: TeacherNeeds, student: ModelShape) -> None:
    """A full-vocabulary objective keeps the teacher's distribution of every response token on the host."""
    if not needs.full:
        return
    responses = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt / cfg.layout.data_parallel
    columns = student.vocab_size / cfg.layout.tensor_parallel
    needed = responses * cfg.rollout.sampling.max_new_tokens * columns * 4
    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"objective.name: {cfg.objective.name} keeps up to {needed / 1e9:.0f} GB of teacher log-probs per rank, "
            f"with {available / 1e9:.0f} GB of memory free: use objective.name: lsm, or lower "
            "rollout.prompts_per_step, rollout.samples_per_prompt or rollout.sampling.max_new_tokens"
        )


def check_same_vocabulary(student: ModelShape, tokenizer: Any, teacher: ModelShape, teacher_folder: Path) -> None:
    """Raise ValueError where an id does not mean the same to both."""
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"student and teacher differ in vocabulary: {student.vocab_size} and {teacher.vocab_size} rows; "
            "choose a teacher of the student's family and size of vocabulary"
        )
    if (teacher_folder / "tokenizer_config.json").is_file():
        teachers = AutoTokenizer.from_pretrained(teacher_folder, local_files_only=True)
        if different := set(tokenizer.get_vocab().items()) ^ set(teachers.get_vocab().items()):
            raise ValueError(
                f"student's and teacher's tokenizers disagree on {len(different)} entries, such as "
                f"{min(different)[0]!r}: they must be the same"
            )
