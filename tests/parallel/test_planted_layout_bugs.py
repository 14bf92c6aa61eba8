"""The layout tests catch the bugs that trainers have had under context parallelism and with packed sequences.

Each is planted in a line or two; a step that has it must differ from one process by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron_bpdg.data.batch import MicroBatch
from tests.parallel.layouts import Case, run_case, worst_gradient, write_models
from tests.parallel.spawn import run_ranks

UPDATE = "lsm"
CP2 = {"context_parallel": 2}
SOUND = {
    "qwen3": Case(CP2),
    "packed": Case(CP2, packed=True),
    "qwen3_moe": Case({"expert_parallel": 2, **CP2}, kind="qwen3_moe"),
}

Plant = Callable[[Any], Any]
"""What is put in the place of the sound function, made from it."""


def on_batches(change: Callable[[MicroBatch], MicroBatch]) -> Plant:
    return lambda collate: lambda *args, **kwargs: change(collate(*args, **kwargs))


def next_local_token(batch: MicroBatch) -> MicroBatch:
    shifted_BS = batch.input_ids_BS.roll(-1, 1)
    return replace(batch, sampled_N=shifted_BS.t().flatten()[batch.position_N])


def blocks_of_one_sequence(batch: MicroBatch) -> MicroBatch:
    """Counted through the row: a block may hold the end of one response and the beginning of the next."""
    return replace(batch, block_N=(batch.token_N // 4).clamp(max=batch.num_blocks - 1))


def halved(loss: Any) -> Any:
    def scaled(*args: Any) -> tuple[Tensor, Tensor]:
        loss_sum, sums = loss(*args)
        return loss_sum / 2, sums

    return scaled


def contiguous(zigzag: Any) -> Any:
    return lambda length, rank, size: torch.arange(length).chunk(size)[rank]


def local_positions(_: Any) -> Any:
    return lambda emb, dim, group: emb[: len(emb) // group.size()]


def one_sequence(packing: Any) -> Any:
    def leaking(batch: MicroBatch) -> Any:
        assert batch.cu_seqlens is not None
        return packing(replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], max_seqlen=int(batch.cu_seqlens[-1])))

    return leaking


def like_any_weight(_: Any) -> Any:
    def mark(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]

    return mark


@dataclass(frozen=True)
class Bug:
    """`plant` takes the place of `target`."""

    target: str
    plant: Plant
    packed: bool = False
    kind: str = "qwen3"

    @property
    def case(self) -> Case:
        return SOUND["packed" if self.packed else self.kind]


POLICY = "megatron_bpdg.models.policy"
STEP = "megatron_bpdg.training.step"
ROPE = "megatron.core.models.common.embeddings"
BUGS = {
    "labels_shifted_within_shards": Bug(f"{POLICY}.collate", on_batches(next_local_token)),
    "labels_shifted_within_packed_shards": Bug(f"{POLICY}.collate", on_batches(next_local_token), packed=True),
    "block_sums_of_this_shard": Bug(f"{STEP}.sum_over", lambda sum_over: lambda groups: sum_over(groups[:-1])),
    "blocks_across_packed_sequences": Bug(f"{POLICY}.collate", on_batches(blocks_of_one_sequence), packed=True),
    "loss_over_ranks": Bug(f"{STEP}.Updater.loss", halved),
    "contiguous_shards": Bug("megatron_bpdg.data.batch.zigzag", contiguous),
    "positions_of_the_shard": Bug(f"{ROPE}.rotary_pos_embedding.get_pos_emb_on_this_cp_rank", local_positions),
    "positions_of_the_packed_shard": Bug(
        f"{ROPE}.rope_utils._get_thd_freqs_on_this_cp_rank",
        lambda _: lambda rank, size, x, freqs, offset=0: freqs[: len(x)],
        packed=True,
    ),
    "attention_across_packed_sequences": Bug(f"{POLICY}._packing", one_sequence, packed=True),
    "attention_within_the_shard": Bug(
        "megatron_bpdg.models.specs.unzigzag", lambda _: lambda shards: torch.cat([shards[0], shards[0]])
    ),
    # Ranks of one context-parallel group hold different experts.
    "experts_summed_with_other_experts": Bug(
        "megatron_bpdg.models.qwen3._mark_experts", like_any_weight, kind="qwen3_moe"
    ),
    # The forward is right: of the gradients of keys and values only this rank's own part arrives.
    "gradients_of_other_ranks_queries_lost": Bug(
        "megatron_bpdg.models.specs.gather_from_sequence_parallel_region",
        lambda gather: partial(gather, tensor_parallel_output_grad=False),
    ),
}


ONLY_GRADIENTS = ("loss_over_ranks", "gradients_of_other_ranks_queries_lost", "experts_summed_with_other_experts")


def run_bugs(models: Path) -> dict[str, Any]:
    results = {name: one_update(case, models) for name, case in SOUND.items()}
    for name, bug in BUGS.items():
        with mock.patch(bug.target, bug.plant(resolve_name(bug.target))):
            results[name] = one_update(bug.case, models)
    return results


def one_update(case: Case, models: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_case(case, models, updates=[UPDATE], train_steps=0)[UPDATE]
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    measured: dict[str, Any] = run_ranks(run_bugs, 2, write_models(tmp_path_factory.mktemp("models")))[0]
    return measured


def test_without_a_bug_nothing_differs(results: dict[str, Any]) -> None:
    """What the others are held against is itself held against one process by test_layouts.py."""
    assert worst_gradient(results["packed"]["gradients"], results["qwen3"]["gradients"])[0] < 2e-5


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, results: dict[str, Any]) -> None:
    broken, sound = results[name], results[BUGS[name].kind]
    assert worst_gradient(broken["gradients"], sound["gradients"])[0] > 0.01
    same_loss = broken["statistics"]["loss/opd"] == pytest.approx(sound["statistics"]["loss/opd"], rel=2e-5)
    # Where only gradients are wrong, the loss cannot tell.
    assert same_loss == (name in ONLY_GRADIENTS)
