"""Every number that a run reports, on a case small enough to be computed by hand.

Both models say the same about every token, whatever came before it: each position's hidden state is a vector of ones,
and the head's rows hold the logits. The responses and what the sampler said about them are given, so that every
metric is a formula over a dozen tokens. Records are compared whole: a metric that no test states fails these.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.rollout.engine import Request, Response
from megatron_bpdg.training.loop import distill, fine_tune
from tests.integration.miniature import VOCAB, Miniature, change_weights, read_lines, write_model, write_shape

HIDDEN = 32
EOS = 1
A, B, C = 3, 4, 5  # the ids of 1, 2 and 3
LN2 = math.log(2.0)
# Student: A 1/2, B 1/4, the 15 others 1/60 each. Teacher: A and B the other way round.
STUDENT = torch.full((VOCAB,), 1 / 60, dtype=torch.float64)
STUDENT[[A, B]] = torch.tensor([1 / 2, 1 / 4], dtype=torch.float64)
TEACHER = STUDENT.clone()
TEACHER[[A, B]] = STUDENT[[B, A]]
ENTROPY = LN2 / 2 + math.log(4) / 4 + math.log(60) / 4

# Response tokens with log pi - log pi_sampler of each: blocks of two, the drift of a block is |mean|.
TOKENS = [
    [(A, 0.2), (B, 0.4), (A, -0.1), (B, 0.3), (EOS, -0.6)],  # 0.3, 0.1, 0.6
    [(A, 0.5), (A, 0.5), (B, 0.1)],  # 0.5, 0.1; cut off at the length limit
    [(A, -0.3), (B, -0.1), (EOS, 0.2)],  # 0.2, 0.2; the right answer
    [(C, 0.04), (A, 0.04), (B, 1.2), (A, -0.2)],  # 0.04, 0.5
    [],
    [],
]
BLOCK_DRIFT = [[0.3, 0.3, 0.1, 0.1, 0.6], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2], [0.04, 0.04, 0.5, 0.5]]
UNFINISHED = 1
# Of the second response, two tokens were sampled by weights that were a step older.
VERSIONS = {1: [-1, -1, 0]}
# Evaluation: two responses to each of three problems, both right, one right, none.
EVALUATED = [[A, B, EOS], [A, B, EOS], [A, B, EOS], [A], [B, B, A, A], [EOS]]
UNFINISHED_EVALUATED = 4


def exactly(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=2e-5, abs=1e-7)


class Clock:
    """Time that passes only where a test lets it."""

    now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Given:
    """`RolloutStream`: responses that were decided before."""

    responses: list[Response]

    def __iter__(self) -> Iterator[list[tuple[int, Response]]]:
        yield list(enumerate(self.responses))

    def interrupt(self) -> list[tuple[int, Response]]:
        return []


@dataclass
class World:
    """Two models of fixed distributions, three problems with the answer 12, and a clock."""

    miniature: Miniature
    root: Path
    clock: Clock = field(default_factory=Clock)

    def config(self, *layers: dict[str, Any]) -> Any:
        base = {
            "student": {"checkpoint": str(self.root / "student")},
            "teacher": {"checkpoint": str(self.root / "teacher")},
            "data": {"train": str(self.root / "problems.jsonl"), "grader": "operator:eq"},
            "gate": {"tau": 1.0, "partition": {"name": "fixed", "size": 2}},
            "training": {"steps": 1, "micro_batch_size": 1, "max_mismatch": 1.0},
        }
        return self.miniature.config(self.root / "run", base, *layers)

    def records(self) -> list[dict[str, Any]]:
        records = read_lines(self.root / "run" / "metrics.jsonl")
        for record in records:
            assert record.pop("time") > 1e9
        return records


def write_fixed(target: Path, miniature: Miniature, probabilities: Tensor, layers: int) -> None:
    """A model that predicts every token with `probabilities`."""
    shape = write_shape(target.with_name(f"{target.name}-shape"), tie_word_embeddings=False, num_hidden_layers=layers)
    write_model(target, shape, miniature.task / "tokenizer", seed=0)

    def fixed(name: str, tensor: Tensor) -> Tensor:
        if name == "lm_head.weight":
            return (probabilities.log() / HIDDEN).float()[:, None].expand(-1, HIDDEN)
        if name == "model.embed_tokens.weight":
            return torch.ones_like(tensor)
        return torch.zeros_like(tensor) if "o_proj" in name or "down_proj" in name else tensor

    change_weights(target, fixed)


@pytest.fixture
def world(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(miniature, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(miniature.task / "tokenizer")
    assert tokenizer.convert_tokens_to_ids(["1", "2", "3", "<eos>"]) == [A, B, C, EOS]
    write_fixed(tmp_path / "student", miniature, STUDENT, layers=2)
    write_fixed(tmp_path / "teacher", miniature, TEACHER, layers=1)
    problems = [{"id": f"p{i}", "prompt": "1+1=", "answer": "12"} for i in range(3)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def response(ids: list[int], logprobs: list[float], finished: bool, versions: list[int]) -> Response:
        return Response(ids, torch.tensor(logprobs), finished, torch.tensor(versions, dtype=torch.int32))

    def stream(engine: EmbeddedEngine, requests: Sequence[Request], sampling: Any) -> Given:
        assert len(requests) == 6
        if sampling.max_new_tokens == 12:
            made.clock.passes(4.0)
            return Given(
                [
                    response(ids, [-1.0] * len(ids), i != UNFINISHED_EVALUATED, [0] * len(ids))
                    for i, ids in enumerate(EVALUATED)
                ]
            )
        made.clock.passes(2.0)
        engine.retries += 3
        return Given(
            [
                response(
                    [token for token, _ in tokens],
                    [math.log(STUDENT[token]) - drift for token, drift in tokens],
                    i != UNFINISHED,
                    VERSIONS.get(i, [0] * len(tokens)),
                )
                for i, tokens in enumerate(TOKENS)
            ]
        )

    def taking(owner: Any, method: str, seconds: float) -> None:
        honest = getattr(owner, method)

        def slow(*arguments: Any, **named: Any) -> Any:
            made.clock.passes(seconds)
            return honest(*arguments, **named)

        monkeypatch.setattr(owner, method, slow)

    monkeypatch.setattr(EmbeddedEngine, "stream", stream)
    monkeypatch.setattr(time, "perf_counter", lambda: made.clock.now)
    taking(EmbeddedEngine, "load_weights", 0.5)
    taking(MegatronPolicy, "forward", 1.0)
    taking(MegatronPolicy, "forward_backward", 10.0)
    return made


def parameters(layers: int) -> int:
    """Of the miniature shape, untied: heads 4 and 2 of width 8, feed-forward width 48."""
    attention = HIDDEN * (32 + 16 + 16) + 32 * HIDDEN + 8 + 8
    return 2 * VOCAB * HIDDEN + layers * (attention + 3 * HIDDEN * 48 + 2 * HIDDEN) + HIDDEN


SHAPES = {"model/student_parameters": parameters(2), "model/teacher_parameters": parameters(1)}
ROLLOUTS = {
    "rollout/reward_mean": 1 / 4,
    "rollout/response_tokens_mean": 15 / 4,
    "rollout/truncated_fraction": 1 / 4,
    "rollout/empty": 2.0,
    "rollout/retries": 3.0,
    "rollout/version_lag_mean": 2 / 15,
    "rollout/tokens_per_s": 15 / 2.0,
}


def surrogate(token: int, drift: float, now: float = 0.0) -> tuple[float, float]:
    """(loss of a token, its derivative by log pi), `drift` its log pi - log pi_old and `now` that of the weights."""
    advantage = math.log(TEACHER[token] / STUDENT[token]) + drift - now
    ratio = math.exp(drift)
    kept = min(max(ratio, 0.8), 1.2)
    loss = max(-advantage * ratio, -advantage * kept)
    slope = loss if loss == -advantage * ratio else 0.0
    return min((loss, slope), (-3.0 * advantage, 0.0)) if advantage < 0 else (loss, slope)


def logit_gradient(tokens: Sequence[int], slopes: Sequence[float], probabilities: Tensor) -> Tensor:
    """Of ``sum slope * log p(token)`` by the logits, float64 ``[V]``."""
    gradient = -sum(slopes) * probabilities
    for token, slope in zip(tokens, slopes):
        gradient[token] += slope
    return gradient


def weight_gradients(gradient_V: Tensor, logits_V: Tensor) -> tuple[Tensor, float]:
    """From the logits back to a row of the head and to an entry of the last norm, each of them HIDDEN times.

    logit[v] = sum over j of head[v, j] norm[j]. What flows further back is parallel to the hidden state, and a norm
    passes nothing of that on.
    """
    return gradient_V, float(gradient_V @ logits_V) / HIDDEN


def norm_of(gradient_V: Tensor, logits_V: Tensor) -> float:
    rows_V, entry = weight_gradients(gradient_V, logits_V)
    return math.sqrt(HIDDEN * (float(rows_V.square().sum()) + entry**2))


def test_gated_updates_after_drift(world: World) -> None:
    """Two updates, of the first two responses and of the others, which drifted from the sampler as given above."""
    distill(
        world.config(
            {
                "training": {"epochs": 1, "minibatches": 2, "lr": 1e-12, "old_logprobs": "rollout"},
                "evaluation": {
                    "data": {"held_out": str(world.root / "problems.jsonl")},
                    "samples": 2,
                    "k": [1, 2],
                    "sampling": {"max_new_tokens": 12},
                },
            }
        )
    )
    losses, norms, masses, squares = [], [], [], []
    for update in ([0, 1], [2, 3]):
        tokens = [token for i in update for token in TOKENS[i]]
        gates = [math.exp(-drift) for i in update for drift in BLOCK_DRIFT[i]]
        parts = [surrogate(token, drift) for token, drift in tokens]
        mass = sum(gates)
        losses.append(sum(gate * loss for gate, (loss, _) in zip(gates, parts)) / mass)
        slopes = [gate * slope / mass for gate, (_, slope) in zip(gates, parts)]
        norms.append(norm_of(logit_gradient([token for token, _ in tokens], slopes, STUDENT), STUDENT.log()))
        masses.append(mass)
        squares.append(sum(gate**2 for gate in gates))

    evaluation = {"eval/held_out/pass@1": (1 + 1 / 2 + 0) / 3, "eval/held_out/pass@2": (1 + 1 + 0) / 3}
    # The mean over the two updates, of 8 and of 7 tokens; but the least gate.
    expected = {
        "loss/opd": sum(losses) / 2,
        "actor/entropy": ENTROPY,
        # log 2 less on each A, log 2 more on each B.
        "teacher/gap_mean": -(LN2 / 8 + LN2 / 7) / 2,
        "train/tokens": 7.5,
        "train/lr": 1e-12,
        "train/grad_norm": sum(norms) / 2,
        "train/updates": 2.0,
        "gate/mean": (masses[0] / 8 + masses[1] / 7) / 2,
        "gate/ess": (masses[0] ** 2 / (8 * squares[0]) + masses[1] ** 2 / (7 * squares[1])) / 2,
        "gate/mass": sum(masses) / 2,
        # Gates in steps of 1/200: exp(-0.6) = 0.549, then exp(-0.5) = 0.607, exp(-0.3) = 0.741 and so on.
        "gate/min": 0.545,
        "gate/q05": (0.545 + 0.605) / 2,
        "gate/q50": (0.74 + 0.815) / 2,
        "gate/q95": (0.90 + 0.96) / 2,
        "drift/abs_mean": (2.7 / 8 + 2.08 / 7) / 2,
        "drift/mean": (1.3 / 8 + 0.88 / 7) / 2,
        "drift/block_mean": (1.6 / 5 + 0.94 / 4) / 2,
        "drift/block_mean_epoch0": (1.6 / 5 + 0.94 / 4) / 2,
        "drift/cancellation": (2.5 / 2.7 + 1.68 / 2.08) / 2,
        "mismatch/abs_mean": 2.7 / 8,
        "time/rollout_s": 2.0,
        "time/teacher_s": 1.0,
        "time/old_logprobs_s": 0.0,
        "time/update_s": 20.0,
        "time/sync_s": 0.5,
        "time/eval_s": 4.0,
        "time/step_s": 27.5,
    }
    shapes, before, step, after = world.records()
    assert shapes == exactly({"step": 0, **SHAPES})
    assert before == exactly({"step": 0, **evaluation})
    assert step == exactly({"step": 1, **expected, **ROLLOUTS})
    assert after == exactly({"step": 1, **evaluation})

    for drift, (update, by_block, tokens_by_block) in zip(
        read_lines(world.root / "run" / "drift.jsonl"),
        [(0, [(2 * 0.3 + 2 * 0.5) / 4, 0.1, 0.6], [4, 3, 1]), (1, [0.12, (0.2 + 2 * 0.5) / 3], [4, 3])],
        strict=True,
    ):
        assert drift.pop("abs_drift_by_block") == pytest.approx(by_block, rel=1e-5)
        assert drift == {"step": 1, "update": update, "epoch": 0, "tokens_by_block": tokens_by_block}
    for evaluated, at in zip(read_lines(world.root / "run" / "eval.jsonl"), (0, 1), strict=True):
        assert evaluated == {
            "benchmark": "held_out",
            "step": at,
            "samples": 2,
            "problem_ids": ["p0", "p1", "p2"],
            "correct": [2, 1, 0],
            "truncated_fraction": pytest.approx(1 / 6),
            "mean_response_tokens": pytest.approx(15 / 6),
        }
    samples = read_lines(world.root / "run" / "samples.jsonl")
    assert samples == [{"step": 1, "prompt": "1+1=", "response": text, "correct": False} for text in ("1212", "112")]


def test_a_second_epoch_drifts_by_what_the_first_update_changed(world: World) -> None:
    lr, eps = 0.05, 0.1
    distill(
        world.config(
            {"training": {"epochs": 2, "minibatches": 1, "lr": lr, "adam_eps": eps, "clip_grad": 100.0}},
        )
    )
    tokens = [token for response in TOKENS for token, _ in response]
    given = [drift for response in TOKENS for _, drift in response]

    # The trainer's own log-probs are the behaviour: no drift, no gate.
    first = [surrogate(token, 0.0) for token in tokens]
    logits_V = STUDENT.log()
    gradient_V = logit_gradient(tokens, [slope / 15 for _, slope in first], STUDENT)
    # Adam's first step: mean and root mean square of one gradient are it and its absolute value.
    rows_V, entry = weight_gradients(gradient_V, logits_V)
    changed_V = logits_V / HIDDEN - lr * rows_V / (rows_V.abs() + eps)
    logits_after_V = HIDDEN * changed_V * (1 - lr * entry / (abs(entry) + eps))
    logprobs_V = logits_after_V.log_softmax(0)
    drift_V = (logprobs_V - STUDENT.log()).tolist()

    blocks = [[t for t, _ in response[i : i + 2]] for response in TOKENS for i in range(0, len(response), 2)]
    block_drift = [abs(sum(drift_V[t] for t in block)) / len(block) for block in blocks]
    drifts = [drift_V[t] for t in tokens]
    gates = [math.exp(-drift) for block, drift in zip(blocks, block_drift) for _ in block]
    mass = sum(gates)
    second = [surrogate(token, drift_V[token], now=drift_V[token]) for token in tokens]
    slopes = [gate * slope / mass for gate, (_, slope) in zip(gates, second)]
    norms = [
        norm_of(gradient_V, logits_V),
        norm_of(logit_gradient(tokens, slopes, logprobs_V.exp()), logits_after_V),
    ]
    gap = sum(math.log(TEACHER[t] / STUDENT[t]) for t in tokens) / 15
    absolute = sum(abs(drift) for drift in drifts) / 15
    assert absolute > 0.01, "a drift that could be rounding tests nothing"

    def bin_of(quantile: float) -> float:
        return math.floor(200 * sorted(gates)[math.ceil(15 * quantile) - 1]) / 200

    # The older weights' two tokens of the second response are left out of the mismatch.
    fresh = given[:5] + given[7:]
    expected = {
        "loss/opd": (sum(loss for loss, _ in first) / 15 + sum(g * loss for g, (loss, _) in zip(gates, second)) / mass)
        / 2,
        "actor/entropy": (ENTROPY - float(logprobs_V.exp() @ logprobs_V)) / 2,
        "teacher/gap_mean": (gap + gap - sum(drifts) / 15) / 2,
        "train/tokens": 15.0,
        "train/lr": lr,
        "train/grad_norm": sum(norms) / 2,
        "train/updates": 2.0,
        "gate/mean": (1 + mass / 15) / 2,
        "gate/ess": (1 + mass**2 / (15 * sum(gate**2 for gate in gates))) / 2,
        "gate/mass": (15 + mass) / 2,
        "gate/min": math.floor(200 * min(gates)) / 200,
        "gate/q05": (1 + bin_of(0.05)) / 2,
        "gate/q50": (1 + bin_of(0.5)) / 2,
        "gate/q95": (1 + bin_of(0.95)) / 2,
        "drift/abs_mean": absolute / 2,
        "drift/mean": sum(drifts) / 15 / 2,
        "drift/block_mean": sum(block_drift) / len(block_drift) / 2,
        "drift/block_mean_epoch0": 0.0,
        "drift/block_mean_epoch1": sum(block_drift) / len(block_drift),
        # Where nothing drifted there is no cancellation to speak of.
        "drift/cancellation": sum(len(b) * drift for b, drift in zip(blocks, block_drift)) / 15 / absolute,
        "mismatch/abs_mean": sum(abs(drift) for drift in fresh) / 13,
        "mismatch/kl": sum(math.expm1(drift) - drift for drift in fresh) / 13,
        "time/rollout_s": 2.0,
        "time/teacher_s": 1.0,
        "time/old_logprobs_s": 1.0,
        "time/update_s": 20.0,
        "time/sync_s": 0.5,
        "time/eval_s": 0.0,
        "time/step_s": 24.5,
    }
    shapes, step = world.records()
    assert shapes == exactly({"step": 0, **SHAPES})
    assert step == exactly({"step": 1, **expected, **ROLLOUTS})


def test_a_supervised_update(world: World) -> None:
    data = world.root / "sft.jsonl"
    # With the end of each response 3 + 2 tokens: A, B, end, B, end.
    data.write_text('{"id": "a", "prompt": "1+1=", "response": "12"}\n{"id": "b", "prompt": "2+1=", "response": "2"}\n')
    fine_tune(
        world.config(
            {"kind": "sft", "teacher": None, "data": {"train": str(data)}, "objective": {"name": "sft"}, "gate": None},
            {"training": {"minibatches": 1, "batch_size": 2, "lr": 3e-3}},
        )
    )
    gradient_V = logit_gradient([A, B, EOS, B, EOS], [-1 / 5] * 5, STUDENT)
    shapes, step = world.records()
    assert shapes == exactly({"step": 0, "model/student_parameters": parameters(2)})
    assert step == exactly(
        {
            "step": 1,
            "loss/sft": (LN2 + 2 * math.log(4) + 2 * math.log(60)) / 5,
            "actor/entropy": ENTROPY,
            "train/grad_norm": norm_of(gradient_V, STUDENT.log()),
            "train/lr": 3e-3,
            "train/tokens_per_s": 5 / 10.0,
            "time/update_s": 10.0,
        }
    )
