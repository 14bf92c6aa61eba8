"""Where the responses of a run end, and that nothing else of a checkpoint's files reaches the sampler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.data.arithmetic import ALPHABET
from megatron_bpdg.training.loop import distill
from tests.integration.miniature import Miniature, metrics, read_lines

ONE: dict[str, Any] = {"training": {"steps": 1, "epochs": 1, "minibatches": 1}}


def copy(source: Path, target: Path, name: str, **fields: Any) -> str:
    """A checkpoint with changed fields in one of its files."""
    shutil.copytree(source, target)
    file = target / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **fields}))
    return str(target)


def test_every_named_id_ends_a_response(
    miniature: Miniature, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def responses(run: str) -> list[str]:
        return [row["response"] for row in read_lines(tmp_path / run / "samples.jsonl")]

    distill(miniature.config(tmp_path / "one", ONE))
    assert "responses end at the ids" not in capfd.readouterr().err
    character = responses("one")[0][2]
    other = 2 + ALPHABET.index(character)
    student = copy(miniature.student, tmp_path / "student", "generation_config.json", eos_token_id=[1, other])
    distill(miniature.config(tmp_path / "two", ONE, {"student": {"checkpoint": student}}))
    warning = capfd.readouterr().err.replace("\n", " ")
    assert f"warning: the student's responses end at the ids 1, {other}, the teacher's at 1 " in warning
    # The same random numbers up to the end.
    expected = [r[: r.index(character) + 1] if character in r else r for r in responses("one")]
    assert responses("two") == expected != responses("one")
    (longer,), (shorter,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert shorter["train/tokens"] < longer["train/tokens"]
    assert shorter["rollout/truncated_fraction"] <= longer["rollout/truncated_fraction"]


def test_what_a_config_says_of_sampling_does_not_reach_the_sampler(miniature: Miniature, tmp_path: Path) -> None:
    """transformers 4 kept generation's settings in config.json, and `generate` would follow them."""
    student = copy(miniature.student, tmp_path / "student", "config.json", repetition_penalty=50.0, num_beams=3)
    distill(miniature.config(tmp_path / "plain", ONE))
    distill(miniature.config(tmp_path / "penalty", ONE, {"student": {"checkpoint": student}}))
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "penalty")
