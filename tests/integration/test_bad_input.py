"""What cannot work is refused early, in one message that names the field and the remedy."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.models.qwen3 import ModelShape, check_layout
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.rollout.engine import Response
from megatron_bpdg.training.build import build_run
from megatron_bpdg.training.loop import distill
from megatron_bpdg.training.plan import Update, plan_updates
from megatron_bpdg.training.run import MismatchError, Run
from megatron_bpdg.training.source import RolloutSource
from megatron_bpdg.training.step import NonFiniteError
from tests.integration.conftest import Refuse
from tests.integration.miniature import (
    POSITIONS,
    VOCAB,
    Miniature,
    change_weights,
    metrics,
    weights,
    write_model,
    write_shape,
)
from tests.integration.test_runs import bpdg


@pytest.fixture
def config(miniature: Miniature, tmp_path: Path) -> Path:
    return miniature.write(tmp_path / "run.yaml", tmp_path / "run")


def _other_vocabulary(miniature: Miniature, root: Path) -> Path:
    shape = write_shape(root / "wide", vocab_size=VOCAB + 3)
    return write_model(root / "other", shape, miniature.task / "tokenizer", seed=2)


def _other_tokenizer(miniature: Miniature, root: Path) -> Path:
    build_char_tokenizer("\n#=-+9876543210").save_pretrained(root / "reversed")
    return write_model(root / "other", miniature.shape, root / "reversed", seed=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lrr=1", r"training\.lrr: unknown key; did you mean (training\.)?lr"),
        ("trainning.lr=1", r"trainning: unknown key; did you mean training"),
        (
            "gate={partition: {name: fixd}}",
            r"gate\.partition\.name = 'fixd': should be one of fixed.*did you mean fixed",
        ),
        ("training.lr=fast", r"training\.lr = 'fast': should be a valid number"),
        ("training.epochs=0", r"training\.epochs = 0: should be greater than or equal to 1"),
        ("training.lr=.nan", r"training\.lr = nan: should be a finite number"),
        ("evaluation={samples: 2, k: [1, 4]}", r"evaluation: k \[4\] outside 1\.\.samples \(2\)"),
        ("training.minibatches=7", r"training\.minibatches = 7 exceeds the 6 responses of a step"),
        ("layout.sequence_parallel=true", r"sequence_parallel: true needs tensor_parallel > 1"),
        ("student.checkpoint=nowhere", r"student\.checkpoint: nowhere does not exist"),
        ("teacher.checkpoint=nowhere", r"teacher\.checkpoint: nowhere does not exist"),
        ("data.train=nothing.jsonl", r"data\.train: nothing\.jsonl does not exist"),
    ],
)
def test_configs_that_cannot_be_used(config: Path, refused: Refuse, override: str, message: str) -> None:
    assert re.search(message, refused("train", config, override))
    assert not (config.parent / "run").exists()


def test_a_directory_that_is_no_checkpoint(config: Path, refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for role in ("student", "teacher"):
        message = refused("train", config, f"{role}.checkpoint={tmp_path}/empty")
        assert f"{role}.checkpoint: {tmp_path}/empty has neither config.json" in message
    assert "empty has neither config.json" in refused("eval", tmp_path / "empty", "--data", tmp_path / "x.jsonl")


def test_a_checkpoint_without_weights(config: Path, refused: Refuse, miniature: Miniature, tmp_path: Path) -> None:
    shutil.copytree(miniature.student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "bare has neither" in refused("train", config, f"student.checkpoint={tmp_path}/bare")


def test_vocabularies_that_differ(config: Path, refused: Refuse, miniature: Miniature, tmp_path: Path) -> None:
    wide = _other_vocabulary(miniature, tmp_path / "a")
    message = refused("train", config, f"teacher.checkpoint={wide}")
    assert f"student and teacher differ in vocabulary: {VOCAB} and {VOCAB + 3} rows; choose a teacher" in message

    reversed_ids = _other_tokenizer(miniature, tmp_path / "b")
    message = refused("train", config, f"teacher.checkpoint={reversed_ids}")
    assert "student's and teacher's tokenizers disagree on" in message

    build_char_tokenizer("0123456789+-=#\nabcdef").save_pretrained(tmp_path / "large")
    message = refused("train", config, f"student.tokenizer={tmp_path}/large")
    assert f"student.tokenizer has {VOCAB + 6} ids but the model only {VOCAB} rows" in message


def test_layouts_that_do_not_divide_the_model() -> None:
    shape = ModelShape(2, 32, 48, 4, 2, tie_word_embeddings=True, head_dim=8, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"layout\.tensor_parallel: 4 does not divide num_key_value_heads = 2; choose"):
        check_layout(shape, Layout(tensor_parallel=4))
    with pytest.raises(ValueError, match=r"pipeline_parallel: 3 does not divide num_hidden_layers = 2"):
        check_layout(shape, Layout(pipeline_parallel=3))
    check_layout(shape, Layout(tensor_parallel=2, pipeline_parallel=2))


def test_an_error_of_the_ranks_is_shown_once(miniature: Miniature, tmp_path: Path) -> None:
    shape = write_shape(tmp_path / "odd", num_key_value_heads=1)
    odd = write_model(tmp_path / "student", shape, miniature.task / "tokenizer", seed=3)
    path = miniature.write(
        tmp_path / "run.yaml",
        tmp_path / "run",
        {"layout": {"tensor_parallel": 2}, "student": {"checkpoint": str(odd)}},
    )
    result = bpdg("train", path)
    assert result.returncode == 1
    message = "error: layout.tensor_parallel: 2 does not divide num_key_value_heads = 1; choose a divisor"
    assert (result.stdout + result.stderr).strip() == message


def test_responses_longer_than_the_models(config: Path, refused: Refuse, miniature: Miniature) -> None:
    message = refused("train", config, "rollout.sampling.max_new_tokens=100")
    assert "rollout.sampling.max_new_tokens = 100 after a prompt of" in message
    assert f"exceeds the student's {POSITIONS} positions; lower it or data.max_prompt_tokens" in message

    test = miniature.task / "test.jsonl"
    message = refused("train", config, f"evaluation={{data: {{held_out: {test}}}, sampling: {{max_new_tokens: 100}}}}")
    assert "evaluation.sampling.max_new_tokens = 100 after a prompt of" in message

    message = refused("eval", miniature.student, "--data", test, "--no-chat-template", "--max-new-tokens", POSITIONS)
    assert f"--max-new-tokens {POSITIONS} leaves no room for a prompt in {POSITIONS} positions" in message


def test_supervised_examples_longer_than_the_model(refused: Refuse, miniature: Miniature, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text('{"id": "long", "prompt": "1+1=", "response": "' + "1" * POSITIONS + '"}\n')
    path = miniature.write(
        tmp_path / "sft.yaml",
        tmp_path / "run",
        {"kind": "sft", "teacher": None, "data": {"train": str(data)}, "objective": {"name": "sft"}},
        {"training": {"minibatches": 1}},
        {"training": {"batch_size": 1}},
    )
    message = refused("train", path)
    assert f"example 'long' has {POSITIONS + 5} tokens but the student only {POSITIONS} positions" in message


def test_world_size_and_layout(
    config: Path, refused: Refuse, miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"3 x 1 x 1 x 2 = 6 processes, but 1 run; start with `torchrun"):
        distill(miniature.config(tmp_path / "run", {"layout": {"tensor_parallel": 3, "data_parallel": 2}}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert "= 1 processes, but 4 run" in refused("train", config)


def test_more_k_than_samples(refused: Refuse, miniature: Miniature) -> None:
    command = ["eval", miniature.student, "--data", miniature.task / "test.jsonl", "--samples", 2]
    assert "--k [3]: must lie in 1..2 (--samples)" in refused(*command, "--k", 3)


def test_a_support_larger_than_the_vocabulary(config: Path, refused: Refuse) -> None:
    message = refused("train", config, "objective={name: lsm, top_k: 99}")
    assert f"objective.top_k = 99 exceeds the vocabulary of {VOCAB}" in message


def test_more_prompts_per_step_than_problems(config: Path, refused: Refuse) -> None:
    assert "rollout.prompts_per_step" in refused("train", config, "rollout.prompts_per_step=65")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "prompt": "1+1=", "answer": "2"}\n{"id": "b", "prompt"', "line 2: not JSON"),
        ('{"id": "a", "prompt": "1+1="}\n', "line 1: answer is missing, should be a text"),
        ("", "has no rows"),
        ('{"id": "a", "prompt": "one", "answer": "2"}\n', "problem 'a': the tokenizer refuses 'one'"),
    ],
)
def test_malformed_data(config: Path, refused: Refuse, tmp_path: Path, text: str, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    assert message in refused("train", config, f"data.train={data}", "rollout.prompts_per_step=1")


def test_prompts_without_a_template(config: Path, refused: Refuse) -> None:
    assert "set data.chat_template to false" in refused("train", config, "data.chat_template=true")


def test_an_occupied_target_of_convert_and_init(refused: Refuse, miniature: Miniature) -> None:
    assert "choose another destination or ask to overwrite" in refused("convert", miniature.student, miniature.teacher)
    tokenizer = miniature.task / "tokenizer"
    assert "choose a new directory" in refused("init", miniature.teacher, "--tokenizer", tokenizer)


# --- numbers that are no numbers ----------------------------------------------------------------------------------


def _broken(source: Path, target: Path, value: float) -> Path:
    shutil.copytree(source, target)

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, value) if name == "model.norm.weight" else tensor

    change_weights(target, spoil)
    return target


def test_a_teacher_with_nan_weights(miniature: Miniature, tmp_path: Path) -> None:
    broken = _broken(miniature.teacher, tmp_path / "broken", torch.nan)
    for objective in ({"name": "sampled_token"}, {"name": "lsm", "top_k": 4}, {"name": "reverse_kl"}):
        cfg = miniature.config(
            tmp_path / objective["name"], {"teacher": {"checkpoint": str(broken)}, "objective": objective}
        )
        with pytest.raises(NonFiniteError, match=r"the teacher's log-probs of (\d+) .*of \1 tokens in this update"):
            distill(cfg)
        # The student had not been updated yet; what is saved is what it started from.
        saved, start = weights(cfg.output / "checkpoints"), weights(miniature.student)
        assert all(torch.equal(tensor, start[name]) for name, tensor in saved.items())


def test_a_student_with_nan_weights(config: Path, refused: Refuse, miniature: Miniature, tmp_path: Path) -> None:
    broken = _broken(miniature.student, tmp_path / "broken", torch.nan)
    message = refused("train", config, f"student.checkpoint={broken}")
    assert re.search(r"problem \d+, sample 0: the sampler's log-prob of response token 0 is nan", message)

    path = miniature.write(
        tmp_path / "sft.yaml",
        tmp_path / "sft",
        {"kind": "sft", "teacher": None, "data": {"train": str(miniature.task / "sft.jsonl")}},
        {
            "objective": {"name": "sft"},
            "student": {"checkpoint": str(broken)},
            "training": {"minibatches": 1, "batch_size": 4},
        },
    )
    message = refused("train", path)
    assert "NaN or infinite: the student's log-probs of" in message
    assert "This update was not applied. Lower training.lr, use float32" in message


def scored(run: Run, groups: int) -> tuple[list[Trajectory], Update]:
    """Responses of the first prompts of step 1, and one update of them, ready to be made."""
    batch = RolloutSource(run).take(1, lambda group: None)[: groups * run.cfg.rollout.samples_per_prompt]
    (update,) = plan_updates(batch, run.cfg, run.student.mesh, step=1)
    run.teacher.score(update.micro_batches)
    run.behaviour.score(update.micro_batches, version=0)
    return batch, update


def test_a_gradient_that_is_not_finite_is_never_applied(miniature: Miniature, tmp_path: Path) -> None:
    """A finite loss can have a NaN gradient; Megatron-Core's optimizer would step on it."""
    cfg = miniature.config(tmp_path / "run", {"training": {"minibatches": 1, "epochs": 1}})
    with world(cfg.layout, cfg.seed):
        run = build_run(cfg)
        run.sync_weights(version=0)
        _, update = scored(run, groups=1)
        before = [parameter.detach().clone() for parameter in run.module.parameters()]
        spoil = next(run.module.parameters()).register_hook(lambda grad: grad * torch.nan)
        with pytest.raises(NonFiniteError, match=r"NaN or infinite: \d+ gradient entries"):
            run.update(update.micro_batches)
        spoil.remove()
        for parameter, expected in zip(run.module.parameters(), before, strict=True):
            assert torch.equal(parameter, expected)


def test_an_update_that_fails_leaves_every_weight_as_it_was(miniature: Miniature, tmp_path: Path) -> None:
    cfg = miniature.config(tmp_path / "run", {"training": {"minibatches": 1, "epochs": 1}})
    with world(cfg.layout, cfg.seed):
        run = build_run(cfg)
        run.sync_weights(version=0)
        trajectories, update = scored(run, groups=2)
        before = [parameter.detach().clone() for parameter in run.module.parameters()]
        old_logprobs_R = trajectories[1].old_logprobs_R
        assert old_logprobs_R is not None
        for bad in (torch.nan, -torch.inf):
            good = float(old_logprobs_R[0])
            old_logprobs_R[0] = bad
            with pytest.raises(NonFiniteError, match=r"the behaviour policy's log-probs of 1"):
                run.update(update.micro_batches)
            old_logprobs_R[0] = good
            for parameter, expected in zip(run.module.parameters(), before, strict=True):
                assert torch.equal(parameter, expected)
        # The failed step leaves nothing behind: the next one is as good as the first.
        report = run.update(update.micro_batches)
        assert report.statistics["train/grad_norm"] > 0
        assert any(not torch.equal(p, expected) for p, expected in zip(run.module.parameters(), before, strict=True))


def test_a_sampler_that_claims_the_impossible(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EmbeddedEngine.decode

    def decode(self: EmbeddedEngine, *arguments: Any) -> list[Response]:
        responses = honest(self, *arguments)
        responses[3].logprobs[0] = -torch.inf
        return responses

    monkeypatch.setattr(EmbeddedEngine, "decode", decode)
    with pytest.raises(ValueError, match=r"sample 1: the sampler's log-prob of response token 0 is -inf; a sampled"):
        distill(miniature.config(tmp_path / "run"))


@pytest.mark.parametrize("old_logprobs", ["trainer", "rollout"])
def test_a_sampler_of_another_model(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_logprobs: str
) -> None:
    """Whatever the cause, log-probs that are not the trainer's stop the run at step 1, before anything is saved."""
    honest = EmbeddedEngine.decode

    def decode(self: EmbeddedEngine, *arguments: Any) -> list[Response]:
        return [replace(response, logprobs=response.logprobs - 0.002) for response in honest(self, *arguments)]

    monkeypatch.setattr(EmbeddedEngine, "decode", decode)
    training = {"old_logprobs": old_logprobs, "steps": 1}
    with pytest.raises(MismatchError, match=r"0\.002 nats a token apart .* allowed 0\.001 \(training\.max_mismatch\)"):
        distill(miniature.config(tmp_path / "stopped", {"training": training}))
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    distill(miniature.config(tmp_path / "allowed", {"training": {**training, "max_mismatch": 0.0021}}))
    (record,) = metrics(tmp_path / "allowed")
    assert record["mismatch/abs_mean"] == pytest.approx(0.002, rel=1e-2)


def test_responses_that_are_all_empty(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: EmbeddedEngine, requests: Any, sampling: Any) -> list[Response]:
        return [Response.empty() for _ in requests]

    monkeypatch.setattr(EmbeddedEngine, "decode", decode)
    with pytest.raises(ValueError, match="all 6 responses of this step are empty: check the rollout engine"):
        distill(miniature.config(tmp_path / "run"))


def test_a_few_empty_responses_are_counted(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EmbeddedEngine.decode

    def decode(self: EmbeddedEngine, *arguments: Any) -> list[Response]:
        responses = honest(self, *arguments)
        for index in (0, 2, 3, 4):
            responses[index] = Response.empty()
        return responses

    monkeypatch.setattr(EmbeddedEngine, "decode", decode)
    # Six responses in six mini-batches, of which two are left.
    distill(miniature.config(tmp_path / "run", {"training": {"minibatches": 6, "steps": 1, "epochs": 2}}))
    (record,) = metrics(tmp_path / "run")
    assert (record["rollout/empty"], record["train/updates"]) == (4, 4)
