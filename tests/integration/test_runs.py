"""Whole runs: every variant from config alone, the same twice, and the command line from data to report."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_bpdg.cli.app import app
from megatron_bpdg.evaluation.pass_at_k import pass_at_k
from megatron_bpdg.training.loop import distill
from tests.integration.miniature import VOCAB, Miniature, metrics, read_lines, weights
from tests.parallel.spawn import run_ranks

SAMPLED: dict[str, Any] = {"objective": {"name": "sampled_token"}}
LSM: dict[str, Any] = {"objective": {"name": "lsm", "top_k": 8}}
FIXED: dict[str, Any] = {"gate": {"partition": {"name": "fixed", "size": 4}}}
NEWLINE: dict[str, Any] = {"gate": {"partition": {"name": "newline", "min_size": 2, "max_size": 6}}}
UNGATED: dict[str, Any] = {"gate": None}


def lsm(**fields: Any) -> dict[str, Any]:
    return {"objective": {**LSM["objective"], **fields}}


def gate(**fields: Any) -> dict[str, Any]:
    return {"gate": {**FIXED["gate"], **fields}}


# The six of the paper: two losses, each without a gate, with fixed blocks and with newline spans.
SIX = {
    f"{loss}-{controller}": (*objective, *gating)
    for loss, objective in (("sampled_token", [SAMPLED]), ("lsm", [LSM]))
    for controller, gating in (("ungated", [UNGATED]), ("fixed", [FIXED]), ("newline", [NEWLINE]))
}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    **SIX,
    **{f"aggregator-{name}": (LSM, gate(aggregator=name)) for name in ("mean_abs", "rms", "k3")},
    **{f"unit_mean-{scope}": (LSM, gate(unit_mean=scope)) for scope in ("sequence", "microbatch")},
    **{f"partition-{name}": (SAMPLED, gate(partition={"name": name})) for name in ("token", "sequence")},
    "clip_min": (LSM, gate(tau=30.0, clip_min=0.25)),
    "lsm-tail_bucket": (lsm(outside="tail_bucket"), FIXED),
    "lsm-append_sampled": (lsm(append_sampled=True), FIXED),
    "lsm-forward_kl": (lsm(divergence="forward_kl"), FIXED),
    "lsm-jsd": (lsm(divergence="jsd", jsd_beta=0.3), FIXED),
    "lsm-whole-vocabulary": (lsm(top_k=VOCAB), FIXED),
    **{f"full-{name}": ({"objective": {"name": name}}, FIXED) for name in ("forward_kl", "reverse_kl", "jsd")},
    "advantage-online": (
        {"objective": {"name": "sampled_token", "advantage": "online", "advantage_clamp": 5.0}},
        FIXED,
    ),
    "no-dual-clip": ({"objective": {"name": "sampled_token", "dual_clip": None}}, FIXED),
    "top-p": (LSM, FIXED, {"rollout": {"sampling": {"top_p": 0.9, "temperature": 0.8, "max_new_tokens": 16}}}),
    "bfloat16": (LSM, FIXED, {"student": {"dtype": "bfloat16"}, "teacher": {"dtype": "bfloat16"}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_from_config_alone(name: str, miniature: Miniature, tmp_path: Path) -> None:
    distill(miniature.config(tmp_path / "run", *VARIANTS[name]))

    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert "nonfinite" not in record
        assert all(math.isfinite(value) for value in record.values())
        assert record["train/grad_norm"] > 0
        assert record["train/updates"] == 4
        # pi_old comes from the trainer: the sampler disagrees by rounding alone.
        assert record["mismatch/abs_mean"] < (0.2 if name == "bfloat16" else 1e-5)

    drift = read_lines(tmp_path / "run" / "drift.jsonl")
    assert [(row["step"], row["update"], row["epoch"]) for row in drift] == [
        (step, update, update // 2) for step in (1, 2) for update in range(4)
    ]
    for row in drift:
        # The policy that sampled is the policy: drift is exactly zero, so every gate is exactly 1.
        assert (set(row["abs_drift_by_block"]) == {0.0}) == (row["update"] == 0)

    ungated = name.endswith("ungated")
    assert all((record["gate/mean"] == 1.0) == ungated for record in records)


def test_one_update_per_rollout_is_the_ungated_update_bit_for_bit(miniature: Miniature, tmp_path: Path) -> None:
    """At zero drift the gate changes nothing; from the second update on it does."""
    losses = {}
    for updates, training in (("one", {"steps": 1, "epochs": 1, "minibatches": 1}), ("four", {"steps": 1})):
        for name, controller in (("ungated", UNGATED), ("gated", gate(tau=5.0))):
            output = tmp_path / f"{updates}-{name}"
            distill(miniature.config(output, LSM, controller, {"training": training}))
            losses[updates, name] = metrics(output)[0]["loss/opd"]
    assert losses["one", "gated"] == losses["one", "ungated"]
    (record,) = metrics(tmp_path / "one-gated")
    assert record["gate/min"] == record["gate/mean"] == 1.0
    assert losses["four", "gated"] != losses["four", "ungated"]
    gated, ungated = (weights(tmp_path / f"one-{name}" / "checkpoints") for name in ("gated", "ungated"))
    assert all(torch.equal(gated[name], ungated[name]) for name in gated)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(miniature: Miniature, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(miniature.config(tmp_path / name, LSM, FIXED, {"seed": seed}))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    for file in ("drift.jsonl", "samples.jsonl"):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()
    first, second = (weights(tmp_path / name / "checkpoints") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert metrics(tmp_path / "a")[0]["loss/opd"] != metrics(tmp_path / "c")[0]["loss/opd"]
    assert (tmp_path / "a" / "samples.jsonl").read_text() != (tmp_path / "c" / "samples.jsonl").read_text()
    before = weights(miniature.student)
    assert any(not torch.equal(first[name], before[name]) for name in first)


def test_how_the_work_is_done_does_not_change_the_run(miniature: Miniature, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "reference": {},
        "micro-batches": {"training": {"micro_batch_size": 3}},
        "packed": {"training": {"micro_batch_size": 1, "micro_batch_tokens": 45}},
        "recompute": {"training": {"recompute": True}},
        "offload": {"teacher": {"offload": True}},
        "sampler-batch": {"rollout": {"batch_size": 3}},
    }
    for name, way in ways.items():
        distill(miniature.config(tmp_path / name, LSM, FIXED, way))
        for record, expected in zip(metrics(tmp_path / name), metrics(tmp_path / "reference"), strict=True):
            assert record["loss/opd"] == pytest.approx(expected["loss/opd"], rel=1e-4), name
            assert record["gate/mean"] == pytest.approx(expected["gate/mean"], rel=1e-4), name
        assert (tmp_path / name / "samples.jsonl").read_text() == (tmp_path / "reference" / "samples.jsonl").read_text()


def test_old_logprobs_of_the_sampler(miniature: Miniature, tmp_path: Path) -> None:
    distill(miniature.config(tmp_path / "run", LSM, FIXED, {"training": {"old_logprobs": "rollout", "steps": 1}}))
    (record,) = metrics(tmp_path / "run")
    assert "mismatch/kl" not in record
    first = read_lines(tmp_path / "run" / "drift.jsonl")[0]
    # The first update's drift is the mismatch between sampler and trainer: rounding, but not exactly nothing.
    assert 0 < max(first["abs_drift_by_block"]) < 1e-5


def test_evaluations_checkpoints_and_schedule(miniature: Miniature, tmp_path: Path) -> None:
    output = tmp_path / "run"
    test = str(miniature.task / "test.jsonl")
    distill(
        miniature.config(
            output,
            SAMPLED,
            FIXED,
            {
                "training": {"steps": 3, "save_every": 2, "lr_warmup_updates": 4, "lr_schedule": "cosine"},
                "evaluation": {
                    "data": {"held_out": test},
                    "every": 2,
                    "samples": 3,
                    "k": [1, 3],
                    "limit": 5,
                    "sampling": {"max_new_tokens": 12},
                },
            },
        )
    )
    evaluations = read_lines(output / "eval.jsonl")
    assert [record["step"] for record in evaluations] == [0, 2, 3]
    assert all(len(record["correct"]) == 5 for record in evaluations)
    steps = sorted(path.name for path in (output / "checkpoints").glob("iter_*"))
    assert steps == ["iter_0000002", "iter_0000003"]
    logged = {r["step"]: r for r in read_lines(output / "metrics.jsonl") if "eval/held_out/pass@3" in r}
    for record in evaluations:
        scores = [pass_at_k(3, correct, 1) for correct in record["correct"]]
        assert logged[record["step"]]["eval/held_out/pass@1"] == pytest.approx(sum(scores) / 5)
    rates = [record["train/lr"] for record in metrics(output)]
    # The mean of the rates its updates were made with: 0 to 3 quarters of the way up, then down a cosine.
    assert rates[0] == pytest.approx(1e-2 * (0 + 1 + 2 + 3) / 4 / 4)
    assert 0 < rates[2] < rates[1] < 1e-2


# --- the command line ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    sft: Path
    opd: Path
    opd_config: Path
    sharded: Path


def bpdg(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_bpdg.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def as_a_rank(arguments: list[str]) -> None:
    """`bpdg` as torchrun starts it: one of the ranks that are there."""
    app(arguments, standalone_mode=False)


OPD_TRAINING = {"steps": 2, "lr": 2e-3}


@pytest.fixture(scope="module")
def runs(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Supervised training on two replicas from fresh weights, then distillation at tensor parallelism 2.

    `sharded` is the same distillation of packed sequences at context parallelism 2. The first command starts its ranks
    itself, the others are ranks already.
    """
    root = tmp_path_factory.mktemp("runs")
    test = str(miniature.task / "test.jsonl")
    supervised = {
        "kind": "sft",
        "layout": {"data_parallel": 2, "distributed_optimizer": True},
        "student": {"init": str(miniature.shape), "tokenizer": str(miniature.task / "tokenizer"), "checkpoint": None},
        "teacher": None,
        "data": {"train": str(miniature.task / "sft.jsonl")},
        "objective": {"name": "sft"},
        "training": {"steps": 20, "minibatches": 1, "batch_size": 7, "micro_batch_size": 2},
        "evaluation": {"data": {"held_out": test}, "samples": 2, "k": [1], "sampling": {"max_new_tokens": 16}},
    }
    result = bpdg("train", miniature.write(root / "sft.yaml", root / "sft", supervised))
    assert result.returncode == 0, result.stdout + result.stderr
    config = miniature.write(
        root / "opd.yaml",
        root / "opd",
        {
            "layout": {"tensor_parallel": 2, "sequence_parallel": True},
            "student": {"checkpoint": str(root / "sft" / "checkpoints")},
            "evaluation": {"data": {"held_out": test}, "samples": 2, "k": [1, 2], "sampling": {"max_new_tokens": 16}},
            "logging": {"tensorboard": True},
        },
        NEWLINE,
        LSM,
        {"training": OPD_TRAINING},
    )
    run_ranks(as_a_rank, 2, ["train", str(config), "training.minibatches=3", "--overwrite"])
    overrides = [f"output={root / 'sharded'}", "layout={context_parallel: 2}"]
    overrides += [f"training.{field}" for field in ("minibatches=3", "micro_batch_size=1", "micro_batch_tokens=24")]
    run_ranks(as_a_rank, 2, ["train", str(config), *overrides])
    return Runs(root / "sft", root / "opd", config, root / "sharded")


def test_supervised_training_on_two_replicas_learns(runs: Runs) -> None:
    losses = [record["loss/sft"] for record in metrics(runs.sft)]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    assert [record["step"] for record in read_lines(runs.sft / "eval.jsonl")] == [20]


@pytest.fixture(scope="module")
def single(runs: Runs, miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distillation of `runs` in one process."""
    output = tmp_path_factory.mktemp("single") / "run"
    distill(
        miniature.config(
            output,
            {"student": {"checkpoint": str(runs.sft / "checkpoints")}},
            NEWLINE,
            LSM,
            {"training": {**OPD_TRAINING, "minibatches": 3}},
        )
    )
    return output


@pytest.mark.parametrize("name", ["opd", "sharded"])
def test_parallel_run_equals_one_process(name: str, runs: Runs, single: Path) -> None:
    run: Path = getattr(runs, name)
    parallel, reference = metrics(run), metrics(single)
    assert [record["train/updates"] for record in parallel] == [6, 6]
    for record, expected in zip(parallel, reference, strict=True):
        for metric in ("loss/opd", "actor/entropy", "gate/mean", "gate/ess", "drift/abs_mean", "train/grad_norm"):
            assert record[metric] == pytest.approx(expected[metric], abs=1e-4), metric
        assert record["train/tokens"] == expected["train/tokens"]
    assert (run / "samples.jsonl").read_text() == (single / "samples.jsonl").read_text()
    for row, expected_row in zip(read_lines(run / "drift.jsonl"), read_lines(single / "drift.jsonl"), strict=True):
        assert row["tokens_by_block"] == expected_row["tokens_by_block"]
        assert row["abs_drift_by_block"] == pytest.approx(expected_row["abs_drift_by_block"], abs=1e-4)
        if row["update"] == 0:
            assert set(row["abs_drift_by_block"]) == {0.0}
    other = weights(single / "checkpoints")
    for weight, tensor in weights(run / "checkpoints").items():
        torch.testing.assert_close(tensor, other[weight], rtol=0, atol=1e-3)


def test_report_of_a_run(runs: Runs) -> None:
    result = CliRunner().invoke(app, ["report", str(runs.opd), "--compare", str(runs.sft)])
    assert result.exit_code == 0, result.output
    page = (runs.opd / "report.html").read_text()
    assert "<svg" in page
    assert "held_out" in page
    assert list((runs.opd / "tensorboard").glob("events*"))


def test_eval_of_a_checkpoint_equals_the_run_s_own_evaluation(runs: Runs, miniature: Miniature, tmp_path: Path) -> None:
    command = ["eval", runs.opd / "checkpoints", "--data", miniature.task / "test.jsonl", "--samples", 2, "--grader"]
    command += ["exact", "--no-chat-template", "--max-new-tokens", 16, "--output", tmp_path / "eval"]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    assert "pass@2 %" in result.output
    (record,) = read_lines(tmp_path / "eval" / "eval.jsonl")
    expected = read_lines(runs.opd / "eval.jsonl")[-1]
    assert record["problem_ids"] == expected["problem_ids"]
    assert record["correct"] == expected["correct"]
    assert record["mean_response_tokens"] == expected["mean_response_tokens"]


def test_convert_both_ways(runs: Runs, tmp_path: Path) -> None:
    source, hf, megatron = runs.opd / "checkpoints", tmp_path / "hf", tmp_path / "megatron"
    for arguments in ([source, hf], [hf, megatron]):
        result = CliRunner().invoke(app, ["convert", "--verify", *map(str, arguments)])
        assert result.exit_code == 0, result.output
    original = weights(source)
    for copy in (hf, megatron):
        converted = weights(copy)
        assert converted.keys() == original.keys()
        assert all(torch.equal(converted[name], original[name]) for name in original)
    # At tensor parallelism 2 the 17 rows of the vocabulary were padded to 18; the filler stays behind.
    rows = [TorchDistCheckpoint(path).shapes["embedding.word_embeddings.weight"][0] for path in (source, megatron)]
    assert rows == [VOCAB + 1, VOCAB]


def test_the_config_a_run_leaves_behind_starts_the_same_run(runs: Runs) -> None:
    again = f"output={runs.opd.with_name('again')}"
    result = CliRunner().invoke(app, ["train", "--check", str(runs.opd / "config.yaml"), again])
    assert result.exit_code == 0, result.output
    assert "minibatches: 3" in (runs.opd / "config.yaml").read_text()
