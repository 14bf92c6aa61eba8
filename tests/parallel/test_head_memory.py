"""No tensor of the logits' size is ever made in a whole training step: every operation's outputs are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.parallel.models import SIZES, trajectories, write_checkpoint
from tests.parallel.spawn import run_ranks

# So that a micro-batch's logits, N x V / TP numbers, are more than all weights together.
VOCAB, RESPONSES, TOP_K = 512, 18, 16
CHUNK_MB = 0.03
KINDS = ("chunked", "fused", "materialised")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled_token": {"name": "sampled_token"},
    "lsm": {"name": "lsm", "top_k": TOP_K, "append_sampled": True},
    "lsm_tail": {"name": "lsm", "top_k": TOP_K, "outside": "tail_bucket"},
}


class Largest(TorchDispatchMode):
    """The largest output of any operation, views included, and how many operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.name, self.operations = 0, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.name = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return result


def causal_bias(*sizes: int) -> Any:
    """torch cannot make this tensor subclass under a dispatch mode; it holds no data."""
    with _disable_current_modes():
        return causal_lower_right(*sizes)


def largest_tensors(layout_fields: dict[str, Any], models: Path) -> dict[str, tuple[int, str]]:
    """The largest tensor of teacher scoring, old log-probs and one update, by head and objective; and the limits."""
    from megatron_bpdg.checkpoint.live import load_weights
    from megatron_bpdg.config.layout import Layout
    from megatron_bpdg.config.objective import ObjectiveConfig
    from megatron_bpdg.config.training import Training
    from megatron_bpdg.drift.gate import Gate
    from megatron_bpdg.models.hf_config import read_hf_config
    from megatron_bpdg.models.policy import MegatronPolicy, to_batches
    from megatron_bpdg.models.qwen3 import ModelShape, build_model
    from megatron_bpdg.objectives.objective import TeacherNeeds
    from megatron_bpdg.parallel.head import Head
    from megatron_bpdg.parallel.world import world
    from megatron_bpdg.teacher.megatron import MegatronTeacher
    from megatron_bpdg.teacher.scoring import score
    from megatron_bpdg.training.method import build_objective
    from megatron_bpdg.training.optimizer import build_optimizer, wrap
    from megatron_bpdg.training.step import Updater

    layout = Layout(**layout_fields)
    found: dict[str, tuple[int, str]] = {}
    with (
        world(layout, seed=0),
        mock.patch("megatron_bpdg.models.specs.causal_lower_right", causal_bias),
        # It refuses a CPU, where only Triton's interpreter runs its kernels.
        mock.patch.object(Head, "check_device"),
    ):
        shape = ModelShape.from_hf(read_hf_config(models))
        model = build_model(shape, layout, torch.float32)
        load_weights([model], models)
        teacher_model = build_model(shape, layout, torch.float32)
        load_weights([teacher_model], models)
        module = wrap(model, layout)
        optimizer, _ = build_optimizer(module, layout, Training(), torch.float32, total_updates=10)
        for kind in KINDS:
            head = Head(kind, CHUNK_MB)  # type: ignore[arg-type]
            student = MegatronPolicy(module, shape, layout, head=head)
            teacher = MegatronTeacher(
                MegatronPolicy(teacher_model, shape, layout, head=head), TeacherNeeds(top_k=TOP_K), 0.9, offload=False
            )
            batch = trajectories(RESPONSES, VOCAB)
            with Largest() as scoring:
                teacher.score([batch])
                score(student, [batch], TeacherNeeds(), 0.9, lambda _, scores: None)
            for name, section in OBJECTIVES.items():
                objective = build_objective(TypeAdapter(ObjectiveConfig).validate_python(section))
                updater = Updater(student, module, optimizer, objective, Gate(), 0.9)
                with Largest() as updating:
                    updater.accumulate(to_batches([batch], student))
                assert scoring.operations > 0
                assert updating.operations > 0
                largest = max(scoring, updating, key=lambda mode: mode.numel)
                found[f"{kind} {name}"] = largest.numel, largest.name
        num_tokens = to_batches([batch], student)[0].position_N.numel()
        found["logits"] = num_tokens * len(model.head_weight()), ""
        found["rows"] = num_tokens * TOP_K * shape.hidden_size, ""
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tied=True, seed=1, layers=1, vocab=VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, {}), (2, {"tensor_parallel": 2, "sequence_parallel": True})], ids=["one", "tp2_sp"]
)
def test_no_tensor_reaches_the_size_of_the_logits(
    world_size: int, layout: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs the fused head")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found in run_ranks(largest_tensors, world_size, layout, model):
        logits, rows = found["logits"][0], found["rows"][0]
        assert logits > 120 * VOCAB / world_size
        assert rows == logits * TOP_K * SIZES["hidden_size"] * world_size / VOCAB
        for name in OBJECTIVES:
            for kind in ("chunked", "fused"):
                assert found[f"{kind} {name}"][0] < min(logits, rows), found[f"{kind} {name}"][1]
            # The same eyes see them where they exist.
            assert found[f"materialised {name}"][0] >= logits
