"""A run's directory: never another's files, never two runs at once, an earlier run deleted only when all is right."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bpdg.tracking.run_directory import LOCK, MARKER, claimed
from tests.integration.conftest import Refuse
from tests.integration.miniature import Miniature, metrics, write_shape
from tests.integration.test_runs import bpdg

ONE = {"training": {"steps": 1, "epochs": 1, "minibatches": 1}}


@pytest.fixture
def config(miniature: Miniature, tmp_path: Path) -> Path:
    return miniature.write(tmp_path / "run.yaml", tmp_path / "run", ONE)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_s_files_are_never_deleted(
    config: Path,
    refused: Refuse,
    miniature: Miniature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = config.parent / "run"
    for name in ("config.yaml", "init/model.safetensors", "thesis.tex"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    before = snapshot(output)
    for arguments in (["train", config], ["train", config, "--check"]):
        assert "is not empty; choose another directory or pass --overwrite" in refused(*arguments)
        message = refused(*arguments, "--overwrite")
        assert f"was not written by bpdg train (it has no {MARKER}); --overwrite does not delete it" in message
    # Under torchrun as well.
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert "is not empty" in refused("train", config)
    assert "is a file; choose a directory" in refused("train", config, f"output={output / 'thesis.tex'}")
    assert snapshot(output) == before


def test_an_earlier_run_is_deleted_when_all_else_was_right(
    config: Path,
    refused: Refuse,
    miniature: Miniature,
) -> None:
    output = config.parent / "run"
    assert bpdg("train", config, "training.steps=3", "training.save_every=1").returncode == 0
    assert {path.name for path in (output / "checkpoints").glob("iter*")} == {f"iter_000000{i}" for i in (1, 2, 3)}
    (output / "notes.txt").write_text("mine")
    (output / "report.html").write_text("old")
    before = snapshot(output)
    wide = write_shape(config.parent / "wide", vocab_size=99)
    for wrong in (
        "data.train=nothing.jsonl",
        f"data.train={miniature.task / 'tokenizer' / 'tokenizer.json'}",
        f"student={{init: {wide}, tokenizer: {miniature.task / 'tokenizer'}, dtype: float32}}",
        "rollout.sampling.max_new_tokens=1000",
        f"student.checkpoint={output / 'checkpoints'}",
    ):
        refused("train", config, wrong, "--overwrite")
        after = snapshot(output)
        assert {name: after[name] for name in before} == before, wrong
        assert not (output / LOCK).exists()
    assert "--overwrite would delete student.checkpoint" in refused(
        "train", config, f"student.checkpoint={output / 'checkpoints'}", "--overwrite"
    )
    done = bpdg("train", config, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(output)] == [1]
    assert {path.name for path in (output / "checkpoints").glob("iter*")} == {"iter_0000001"}
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "report.html").exists()


def test_two_runs_into_one_directory(config: Path, refused: Refuse) -> None:
    output = config.parent / "run"
    with claimed(output):
        message = refused("train", config)
        assert f"is being written by process {os.getpid()} on {socket.gethostname()}; choose another" in message
        done = bpdg("train", config, "layout.data_parallel=2", "--overwrite")
        assert done.returncode == 1
        assert "is being written by process" in done.stderr
    assert not output.exists()
    assert bpdg("train", config).returncode == 0


def test_locks_of_the_dead_are_taken_over_and_those_of_other_machines_are_not(
    config: Path,
    refused: Refuse,
) -> None:
    """A killed run on this machine leaves its lock's file; of another machine's process nothing is known."""
    output = config.parent / "run"
    code = (
        "import time\nfrom megatron_bpdg.tracking.run_directory import *\n"
        f"with claimed(Path({str(output)!r})):\n    time.sleep(600)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code])
    while not (output / LOCK).exists() or not (output / LOCK).read_text():
        time.sleep(0.05)
    assert f"process {killed.pid} on" in refused("train", config)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert json.loads((output / LOCK).read_text())["pid"] == killed.pid
    with claimed(output):
        assert json.loads((output / LOCK).read_text())["pid"] == os.getpid()
    output.mkdir(exist_ok=True)
    (output / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    message = refused("train", config)
    assert f"process 7 on elsewhere; choose another directory. If that run is over, delete {output / LOCK}" in message
    (output / LOCK).write_text("")
    assert bpdg("train", config).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(config: Path, refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    for arguments in (["train", config], ["train", config, "--check"]):
        assert "no permission in" in refused(*arguments, f"output={tmp_path / 'closed' / 'run'}")
