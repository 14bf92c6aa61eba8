"""A run directory, its checkpoints directory and one step's mean the same checkpoint, in every command."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_bpdg.checkpoint.convert import Options, compare_hf, convert, hf_to_megatron
from megatron_bpdg.checkpoint.describe import describe
from megatron_bpdg.checkpoint.directory import hf_folder
from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.config.teacher import Teacher
from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from tests.checkpoint_fixtures import save_tiny
from tests.legacy_fixture import LegacyLayout, save_legacy

FORMS = ("run", "run/checkpoints", "run/checkpoints/iter_0000007")
OLDER = "run/checkpoints/iter_0000003"


RESPONSES: list[str] = []


def remember(response: str, answer: str) -> bool:
    """A grader that keeps what it is shown."""
    RESPONSES.append(response)
    return False


def save_hf(path: Path, scale: float) -> Path:
    save_tiny(path, tied=True, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor * scale for name, tensor in tensors.items()}, path / "model.safetensors")
    build_char_tokenizer("0123456789+= ").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` with two steps, and the HF checkpoints `newest` and `older` that they hold."""
    folder = tmp_path_factory.mktemp("work")
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name, scale, step in (("older", 1.0, "iter_0000003"), ("newest", 0.1, "iter_0000007")):
        built = hf_to_megatron(save_hf(folder / name, scale), folder / "built")
        (built / "release").rename(checkpoints / step)
        shutil.copytree(built / "hf", checkpoints / "hf", dirs_exist_ok=True)
        shutil.rmtree(built)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("7")
    (folder / "run" / "config.yaml").write_text("a run has more beside its checkpoints")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_folder_and_inspect(work: Path, form: str) -> None:
    assert hf_folder(work / form) == work / "run" / "checkpoints" / "hf"
    found = describe(work / form)
    assert (found["format"], found["iteration"], found["complete"]) == ("torch_dist", 7, True)
    assert describe(work / OLDER)["iteration"] == 3


def test_an_hf_directory_is_its_own(work: Path, tmp_path: Path) -> None:
    assert hf_folder(work / "newest") == work / "newest"
    with pytest.raises(FileNotFoundError, match=r"has neither config\.json .* nor hf/config\.json"):
        hf_folder(tmp_path)


def test_mp_rank_files_too(work: Path, tmp_path: Path) -> None:
    legacy = save_legacy(work / "newest", tmp_path / "run" / "checkpoints", LegacyLayout())
    shutil.copytree(work / "run" / "checkpoints" / "hf", legacy / "hf")
    for form in FORMS:
        assert hf_folder(tmp_path / form) == legacy / "hf"
        assert (describe(tmp_path / form)["format"], describe(tmp_path / form)["iteration"]) == ("mp_rank", 7)


@pytest.mark.parametrize("form", [*FORMS, OLDER])
def test_convert(work: Path, tmp_path: Path, form: str) -> None:
    convert(work / form, tmp_path / "back", Options())
    assert compare_hf(work / ("older" if form == OLDER else "newest"), tmp_path / "back") == []


@pytest.mark.parametrize("form", FORMS)
def test_serve(work: Path, form: str) -> None:
    from megatron_bpdg.serving.sglang.launch import as_hf

    served = as_hf(work / form, None, Console(file=io.StringIO()))
    assert served == work / "run" / "served-7"
    assert compare_hf(work / "newest", served) == []


@pytest.mark.parametrize("form", FORMS)
def test_train(work: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and tokenizer of both roles, and the weights."""
    from megatron_bpdg.checkpoint import live
    from megatron_bpdg.training import build

    assert build._folder(work / form, "student.checkpoint") == work / "run" / "checkpoints" / "hf"
    filled: list[torch.Tensor] = []
    monkeypatch.setattr(
        live,
        "_fill",
        lambda chunks, config, read: filled.append(read(live.mapping_for(config).embedding, 0, 1)),
    )
    assert live.load_weights([], work / form)["vocab_size"] == 98
    assert torch.equal(filled[0], load_file(work / "newest" / "model.safetensors")["model.embed_tokens.weight"])
    monkeypatch.setattr(build, "served_model", lambda servers, key: work / "newest")
    teacher: Any = {"engine": "sglang", "checkpoint": work / form, "servers": {"urls": ["http://localhost:1"]}}
    assert build.teacher_source(Teacher.model_validate(teacher)) == work / form


@pytest.mark.parametrize("form", FORMS)
def test_doctor(work: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bpdg.cli import doctor

    asked = []

    async def ask(url: str, key: str | None, tokenizer: Any, vocab_size: int) -> tuple[dict[str, str], list[str]]:
        asked.append((len(tokenizer), vocab_size))
        return {}, []

    monkeypatch.setattr(doctor, "_ask", ask)
    assert doctor._diagnose_servers(["http://localhost:1"], work / form, None)
    assert asked[0][1] == 98


def test_eval(work: Path, tmp_path: Path) -> None:
    """The same answers from the HF directory and from every form, not those of the older step."""
    from megatron_bpdg.evaluation.evaluate import evaluate_checkpoint

    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "sum", "prompt": "1+1=", "answer": "2"}) + "\n")

    def run(checkpoint: Path) -> None:
        evaluate_checkpoint(
            checkpoint,
            [tmp_path / "data.jsonl"],
            remember,
            Sampling(max_new_tokens=4),
            samples=4,
            chat_template=False,
            batch_size=2,
            seed=0,
        )

    answers = []
    for checkpoint in (work / "newest", *(work / form for form in FORMS), work / OLDER):
        RESPONSES.clear()
        run(checkpoint)
        answers.append(RESPONSES.copy())
    assert answers[0] == answers[1] == answers[2] == answers[3] != answers[4]
