"""Streaming in bounded memory, in several threads, and never leaving a half-written target."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.checkpoint import convert, files
from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf, verify_conversion
from megatron_bpdg.checkpoint.files import partial_path
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.transfer import Transfer
from tests.checkpoint_fixtures import save_tiny

# Small files: several of them for a tiny model.
SMALL = Options(max_file_size=8000)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "hf", tied=False, num_hidden_layers=2)


def test_memory_under_way_stays_in_its_bounds() -> None:
    """Held from the start of a read to the end of its write; slow writes let them pile up."""
    lock, held, most = threading.Lock(), [0], [0]
    told: list[int] = []
    transfer = Transfer(workers=6, memory=45, advance=told.append)

    def job(number: int) -> int:
        for _ in range(20):
            with transfer.tensor(16, 10):
                with lock:
                    held[0] += 10
                    most[0] = max(most[0], held[0])
                time.sleep(0.001)
                with lock:
                    held[0] -= 10
        return number

    assert transfer.run(partial(job, number) for number in range(6)) == list(range(6))
    assert 20 <= most[0] <= 40, "several at once, but not past the bound"
    assert sum(told) == 6 * 20 * 16


def test_a_tensor_above_the_bound_goes_alone() -> None:
    transfer, alone, order = Transfer(workers=2, memory=10), threading.Event(), []

    def large() -> None:
        with transfer.tensor(0, 100):
            order.append("large")
            alone.wait(10)
            order.append("large done")

    def small() -> None:
        with transfer.tensor(0, 1):
            order.append("small")

    threads = [threading.Thread(target=large), threading.Thread(target=small)]
    with transfer.tensor(0, 4):
        threads[0].start()
        time.sleep(0.05)
        order.append("first done")
    while "large" not in order:
        time.sleep(0.001)
    threads[1].start()
    time.sleep(0.05)
    alone.set()
    for thread in threads:
        thread.join()
    assert order == ["first done", "large", "large done", "small"]
    with transfer.tensor(0, 10):
        pass


def test_a_failure_stops_the_other_threads() -> None:
    transfer = Transfer(workers=2, memory=100)
    done: list[str] = []

    def fails() -> None:
        raise OSError("bad sector")

    def long(name: str) -> None:
        for _ in range(1500):
            with transfer.tensor(1, 1):
                time.sleep(0.001)
        done.append(name)

    with pytest.raises(OSError, match="bad sector"):
        transfer.run([fails, *(partial(long, f"long{i}") for i in range(4))])
    assert done == []


def test_threads_see_the_options_of_who_called_them() -> None:
    """torch keeps those of `torch.save` in context variables."""
    option = ContextVar("option", default="the default")
    option.set("the caller's")
    assert Transfer(workers=2, memory=1).run([option.get] * 3) == ["the caller's"] * 3


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Make reading `name` fail."""
    read = HFCheckpoint.read

    def failing(self: HFCheckpoint, asked: str, *args: Any) -> torch.Tensor:
        if asked == name:
            raise error
        return read(self, asked, *args)

    monkeypatch.setattr(HFCheckpoint, "read", failing)


@pytest.mark.parametrize("error", [OSError("the disk fell out"), KeyboardInterrupt("Ctrl-C")], ids=repr)
def test_an_interrupted_conversion_leaves_nothing_and_starts_again(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        fail_at(patch, "model.layers.1.mlp.down_proj.weight", error)
        with pytest.raises(type(error), match=str(error)):
            hf_to_megatron(hf, target, options=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    hf_to_megatron(hf, target, options=SMALL)
    assert verify_conversion(hf, target) == []


def test_the_other_direction_leaves_nothing_either(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    write, calls = convert.write_shard, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise OSError("no space left on device")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_shard", failing)
        with pytest.raises(OSError, match="no space left"):
            megatron_to_hf(megatron, tmp_path / "back", options=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    megatron_to_hf(megatron, tmp_path / "back", options=SMALL)
    assert verify_conversion(megatron, tmp_path / "back") == []


def test_everything_is_flushed_before_it_gets_its_name(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name on disk without its content would look like a checkpoint after a power failure."""
    flushed: set[int] = set()
    fsync, rename = os.fsync, Path.rename
    renamed = []

    def recording_fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked_rename(self: Path, target: Path) -> Path:
        assert [part for part in (self, *self.rglob("*")) if part.stat().st_ino not in flushed] == []
        renamed.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    target = hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)
    megatron_to_hf(target, tmp_path / "back", options=SMALL)
    assert renamed == [".metadata", "megatron", "back"]
    assert tmp_path.stat().st_ino in flushed


def test_a_target_that_appears_meanwhile_is_not_replaced(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "megatron"
    write = convert.write_dist_common

    def appear(building: Path, config: dict[str, Any]) -> None:
        write(building, config)
        target.mkdir()
        (target / "mine").write_text("precious")

    monkeypatch.setattr(convert, "write_dist_common", appear)
    with pytest.raises(FileExistsError, match="megatron exists: choose another destination"):
        hf_to_megatron(hf, target)
    assert [file.name for file in target.iterdir()] == ["mine"]


def test_two_at_once_do_not_mix(hf: Path, tmp_path: Path) -> None:
    partial_path(tmp_path / "megatron").mkdir()
    with (partial_path(tmp_path / "megatron") / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another process is writing .*megatron; its files are in"):
            hf_to_megatron(hf, tmp_path / "megatron")
    hf_to_megatron(hf, tmp_path / "megatron")


def test_what_a_killed_process_left_is_replaced(hf: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron\n"
        "from megatron_bpdg.checkpoint.hf import HFCheckpoint\n"
        "read = HFCheckpoint.read\n"
        "def slow(self, name, *args):\n"
        "    if 'layers.1.mlp.down_proj' in name:\n"
        "        print('here', flush=True); time.sleep(60)\n"
        "    return read(self, name, *args)\n"
        "HFCheckpoint.read = slow\n"
        "hf_to_megatron(sys.argv[1], sys.argv[2], options=Options(max_file_size=8000))\n"
    )
    target = tmp_path / "megatron"
    command = [sys.executable, "-c", script, str(hf), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert list(partial_path(target).rglob("*.distcp"))
    (partial_path(target) / "release" / "__0_999.distcp").touch()
    hf_to_megatron(hf, target, options=SMALL)
    assert verify_conversion(hf, target) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
    assert not (target / "release" / "__0_999.distcp").exists()


def test_disk_space_is_checked_first(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    needed = 64 * 2**20 + sum(size for _, size in HFCheckpoint(hf).stored_sizes)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(OSError, match="not enough disk space"):
        hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(needed))
    hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)


def test_options_are_checked() -> None:
    for name in ("workers", "memory", "max_file_size"):
        with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
            Options(**{name: 0})
