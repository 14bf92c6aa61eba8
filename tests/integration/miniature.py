"""The embedded task in miniature: few problems, two-layer models of width 32, runs of well under a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import Qwen3Config

from megatron_bpdg.checkpoint.hf import write_fresh_checkpoint
from megatron_bpdg.checkpoint.source import iter_checkpoint
from megatron_bpdg.config import RunConfig, load_config
from megatron_bpdg.data.arithmetic import ALPHABET, ArithmeticTask, make_arithmetic

VOCAB = len(ALPHABET) + 2
POSITIONS = 64
TASK = ArithmeticTask(min_operands=2, max_operands=2, operand_digits=1, value_digits=1)


@dataclass(frozen=True)
class Miniature:
    """Data, a model shape and two checkpoints with fresh weights under one folder."""

    root: Path

    @property
    def shape(self) -> Path:
        return self.root / "shape" / "config.json"

    @property
    def task(self) -> Path:
        return self.root / "task"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def config(self, output: Path, *layers: dict[str, Any]) -> RunConfig:
        """A distillation run; later layers are merged over earlier ones, a whole `objective` or `gate` at a time."""
        return RunConfig.model_validate(self.raw(output, *layers))

    def raw(self, output: Path, *layers: dict[str, Any]) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "output": str(output),
            "student": {"checkpoint": str(self.student), "dtype": "float32"},
            "teacher": {"checkpoint": str(self.teacher), "dtype": "float32"},
            "data": {"train": str(self.task / "train.jsonl"), "chat_template": False, "grader": "exact"},
            "rollout": {
                "prompts_per_step": 3,
                "samples_per_prompt": 2,
                "sampling": {"max_new_tokens": 16},
                "batch_size": 8,
            },
            "objective": {"name": "sampled_token"},
            "training": {"steps": 2, "epochs": 2, "minibatches": 2, "micro_batch_size": 2, "lr": 1e-2},
            "logging": {"tensorboard": False},
        }
        for layer in layers:
            for key, value in layer.items():
                merges = isinstance(value, dict) and isinstance(raw.get(key), dict) and key not in ("objective", "gate")
                raw[key] = {**raw[key], **value} if merges else value
        return raw

    def write(self, path: Path, output: Path, *layers: dict[str, Any]) -> Path:
        """The config as a YAML file."""
        path.write_text(yaml.safe_dump(self.raw(output, *layers)))
        load_config(path)
        return path


def make_miniature(root: Path) -> Miniature:
    miniature = Miniature(root)
    make_arithmetic(miniature.task, seed=0, num_train=64, num_test=6, task=TASK)
    tokenizer = miniature.task / "tokenizer"
    write_shape(miniature.shape.parent)
    write_model(miniature.student, miniature.shape, tokenizer, seed=0)
    write_model(miniature.teacher, miniature.shape, tokenizer, seed=1)
    return miniature


def write_shape(folder: Path, **changes: Any) -> Path:
    """A config.json in `folder`."""
    sizes: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    Qwen3Config(**(sizes | changes)).save_pretrained(folder)
    return folder / "config.json"


def write_model(target: Path, shape: Path, tokenizer: Path, seed: int) -> Path:
    """Fresh weights, made larger than HF's initial ones: a model that says something is a better test."""
    write_fresh_checkpoint(shape, tokenizer, target, seed=seed, dtype=torch.float32)
    change_weights(target, lambda name, tensor: tensor if "norm" in name else tensor * 5)
    return target


def change_weights(folder: Path, change: Any) -> None:
    """Replace every tensor of an HF checkpoint by ``change(name, tensor)``."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: change(name, t).contiguous() for name, t in load_file(file).items()}, file, {"format": "pt"})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(output: Path) -> list[dict[str, Any]]:
    """Records of training steps, without what a clock put in."""
    return [
        {
            name: value
            for name, value in record.items()
            if name != "time" and not name.startswith("time/") and not name.endswith("_per_s")
        }
        for record in read_lines(output / "metrics.jsonl")
        if "train/lr" in record
    ]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return dict(iter_checkpoint(checkpoint))
