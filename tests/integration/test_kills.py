"""Real runs at tensor parallelism 2, killed in every way: no process stays, and the message says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integration.miniature import Miniature
from tests.integration.test_runs import LSM

# A net for what would hang for ever, on machines however busy.
DEADLINE_S = 600.0


@contextmanager
def training(miniature: Miniature, folder: Path) -> Iterator[tuple[psutil.Popen, list[psutil.Process]]]:
    """A long run, in its first steps: its launcher and its ranks, in order."""
    config = miniature.write(
        folder / "run.yaml", folder / "run", {"layout": {"tensor_parallel": 2}, "training": {"steps": 100000}}, LSM
    )
    with psutil.Popen(
        [sys.executable, "-m", "megatron_bpdg.cli", "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    ) as launcher:
        started: list[psutil.Process] = []
        try:
            file = folder / "run" / "metrics.jsonl"
            while not file.exists() or '"step": 2' not in file.read_text():
                assert launcher.poll() is None, launcher.stderr.read()
            started = launcher.children(recursive=True)
            yield launcher, sorted(launcher.children(), key=lambda process: int(process.environ()["RANK"]))
            # All of it is gone: the ranks, and whatever they had started.
            launcher.wait(DEADLINE_S)
            assert len(started) >= 2
            assert not psutil.wait_procs(started, timeout=60.0)[1]
            assert not (folder / "run" / ".bpdg_lock").exists() or launcher.returncode == -signal.SIGKILL
        finally:
            for process in [*started, launcher]:
                if process.is_running():
                    process.kill()


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGTERM, 1), (signal.SIGSEGV, 1)])
def test_a_rank(miniature: Miniature, tmp_path: Path, number: signal.Signals, rank: int) -> None:
    with training(miniature, tmp_path) as (launcher, ranks):
        ranks[rank].send_signal(number)
        assert launcher.wait(DEADLINE_S) == 1
        error = launcher.stderr.read()
    assert f"error: rank {rank} was ended by {number.name}" in error
    assert error.count("error:") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_the_launcher(miniature: Miniature, tmp_path: Path, number: signal.Signals) -> None:
    with training(miniature, tmp_path) as (launcher, _):
        launcher.send_signal(number)
        launcher.wait(DEADLINE_S)
        error = launcher.stderr.read()
    if number == signal.SIGKILL:
        assert launcher.returncode == -number
    else:
        assert launcher.returncode == 1
        assert f"error: stopped by {number.name}; so were the ranks" in error
        assert "Traceback" not in error
