"""Streaming in bounded memory, continuing after an interruption, and never leaving a half-written target."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.checkpoint import convert, files
from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.partial import partial_path
from megatron_bpdg.checkpoint.patterns import Replicated, Weight
from megatron_bpdg.checkpoint.ranks import Ranks
from megatron_bpdg.checkpoint.transfer import Budget, ChecksumStream, OutputFile, is_complete, transfer
from megatron_bpdg.checkpoint.verify import compare_hf, verify_conversion
from tests.checkpoint_fixtures import save_tiny

# Small files: several of them for a tiny model.
SMALL = Options(max_file_size=8000)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "hf", tied=False, num_hidden_layers=2)


def weights(count: int) -> list[Weight]:
    return [Replicated(f"w{i}", (f"w{i}",), ((4,),)) for i in range(count)]


def write_all(stream: ChecksumStream, given: Any) -> dict[str, Any]:
    for _, tensor in given:
        stream.write(tensor.numpy().data)
    return {}


def test_memory_under_way_stays_in_its_bounds(tmp_path: Path) -> None:
    """Reads are counted from their start to the write that follows; the slow writer lets them pile up."""
    lock, held, most = threading.Lock(), [0], [0]

    def make(weight: Weight) -> torch.Tensor:
        with lock:
            held[0] += 10
            most[0] = max(most[0], held[0])
        return torch.full((4,), float(weight.key[1:]))

    def write(stream: ChecksumStream, given: Any) -> dict[str, Any]:
        for _, tensor in given:
            time.sleep(0.001)
            stream.write(tensor.numpy().data)
            with lock:
                held[0] -= 10
        return {}

    (tmp_path / ".done").mkdir()
    outputs = [OutputFile(f"f{i}", 16 * 20, [(w, 10) for w in weights(20)], write) for i in range(6)]
    told: list[int] = []
    transfer(outputs, tmp_path, make, workers=3, memory=45, advance=told.append)
    assert 20 <= most[0] <= 40 + 10, "read ahead, but not past the bound (a written tensor is counted a moment longer)"
    assert sum(told) == 6 * 20 * 16
    for output in outputs:
        assert (
            torch.frombuffer(bytearray((tmp_path / output.name).read_bytes()), dtype=torch.float32).view(20, 4)[7, 0]
            == 7.0
        )


def test_a_tensor_above_the_bound_goes_alone() -> None:
    budget = Budget(10)
    assert budget.acquire(4, wait=False)
    assert not budget.acquire(100, wait=False)
    budget.release(4)
    assert budget.acquire(100, wait=False)
    assert not budget.acquire(1, wait=False)
    budget.release(100)
    assert budget.acquire(10, wait=False)


def test_a_failure_stops_the_other_files(tmp_path: Path) -> None:
    def make(weight: Weight) -> torch.Tensor:
        if weight.key == "w3":
            raise OSError("bad sector")
        time.sleep(0.001)
        return torch.zeros(4)

    (tmp_path / ".done").mkdir()
    outputs = [OutputFile("short", 16, [(weights(4)[3], 1)], write_all)]
    outputs += [OutputFile(f"long{i}", 16, [(w, 1) for w in weights(3) * 500], write_all) for i in range(4)]
    with pytest.raises(OSError, match="bad sector"):
        transfer(outputs, tmp_path, make, workers=2, memory=100, advance=lambda n: None)
    assert not is_complete(tmp_path, "short")
    assert not (tmp_path / "long3").exists()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Make reading `name` fail; returns the names read."""
    read, names = HFCheckpoint.read, []

    def failing(self: HFCheckpoint, asked: str, *args: Any) -> torch.Tensor:
        if asked == name:
            raise OSError("the disk fell out")
        names.append(asked)
        return read(self, asked, *args)

    monkeypatch.setattr(HFCheckpoint, "read", failing)
    return names


def test_an_interrupted_conversion_continues(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "model.layers.1.mlp.down_proj.weight")
        with pytest.raises(OSError, match="the disk fell out"):
            hf_to_megatron(hf, target, options=SMALL)
    assert not target.exists()
    done = sorted(file.name for file in partial_path(target).glob("release/*.distcp"))
    assert len(done) >= 3
    stamps = {name: (partial_path(target) / "release" / name).stat().st_mtime_ns for name in done}
    # One of the files was damaged meanwhile: it is written again, the others are kept.
    damaged = partial_path(target) / "release" / done[1]
    with damaged.open("r+b") as stream:
        stream.seek(700)
        stream.write(b"\xff\xff\xff")
    with monkeypatch.context() as patch:
        read_again = interrupt_after(patch, "")
        hf_to_megatron(hf, target, options=SMALL)
    assert "model.embed_tokens.weight" not in read_again
    assert not partial_path(target).exists()
    assert not list(target.rglob("*.part"))
    assert not (target / ".done").exists()
    for name in done:
        unchanged = (target / "release" / name).stat().st_mtime_ns == stamps[name]
        assert unchanged == (name != done[1])
    assert verify_conversion(hf, target) == []


def test_the_other_direction_continues_too(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bpdg.checkpoint import convert

    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    write = convert.write_shard
    count = [0]

    def failing(*args: Any) -> dict[str, Any]:
        count[0] += 1
        if count[0] == 4:
            raise OSError("no space left on device")
        return write(*args)

    monkeypatch.setattr(convert, "write_shard", failing)
    with pytest.raises(OSError, match="no space left"):
        megatron_to_hf(megatron, tmp_path / "back", options=SMALL)
    kept = list(partial_path(tmp_path / "back").glob("*.safetensors"))
    assert kept
    with pytest.raises(FileNotFoundError):
        HFCheckpoint(partial_path(tmp_path / "back"))
    before = count[0]
    back = megatron_to_hf(megatron, tmp_path / "back", options=SMALL)
    assert count[0] - before == len(list(back.glob("*.safetensors"))) - len(kept)
    assert compare_hf(hf, back) == []


def test_a_file_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    (tmp_path / ".done").mkdir()
    output = OutputFile("f", 16, [(weights(1)[0], 10)], write_all)
    transfer([output], tmp_path, lambda weight: torch.ones(4), workers=1, memory=100, advance=lambda n: None)
    assert is_complete(tmp_path, "f")
    content = bytearray((tmp_path / "f").read_bytes())
    content[5] ^= 1
    (tmp_path / "f").write_bytes(content)
    assert not is_complete(tmp_path, "f")
    (tmp_path / "f").write_bytes(content[:-1])
    assert not is_complete(tmp_path, "f")


def test_everything_is_flushed_before_it_gets_its_name(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name on disk without its content would look like a checkpoint after a power failure."""
    flushed: set[str] = set()
    fsync, rename = os.fsync, Path.rename
    renamed = []

    def recording_fsync(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def checked_rename(self: Path, target: Path) -> Path:
        assert str(self) in flushed, self
        renamed.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", checked_rename)
    target = hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)
    assert {file.name for file in target.rglob("*.distcp")} | {"megatron"} == set(renamed)
    assert str(tmp_path) in flushed


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


def test_another_conversion_is_not_continued(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "model.layers.1.mlp.down_proj.weight")
        with pytest.raises(OSError, match="the disk fell out"):
            hf_to_megatron(hf, target, options=SMALL)
    other = Options(max_file_size=8000, dtype=torch.bfloat16)
    with pytest.raises(
        FileExistsError, match=r"unfinished conversion of another source or with other options.*--restart"
    ):
        hf_to_megatron(hf, target, options=other)
    os.utime(hf / "model.safetensors")
    with pytest.raises(FileExistsError, match="unfinished conversion of another source"):
        hf_to_megatron(hf, target, options=SMALL)
    hf_to_megatron(hf, target, options=Options(max_file_size=8000, restart=True))
    assert verify_conversion(hf, target) == []


def test_two_at_once_do_not_mix(hf: Path, tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "megatron")
    (partial / ".done").mkdir(parents=True)
    with (partial / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is converting"):
            hf_to_megatron(hf, tmp_path / "megatron")
    hf_to_megatron(hf, tmp_path / "megatron")


def test_a_killed_process_leaves_a_continuable_partial_directory(hf: Path, tmp_path: Path) -> None:
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
    assert json.loads((partial_path(target) / "plan.json").read_text())["target"] == "to Megatron"
    hf_to_megatron(hf, target, options=SMALL)
    assert verify_conversion(hf, target) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_disk_space_is_checked_first_and_counts_what_is_done(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    margin = 64 * 2**20
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(margin + 1000))
    with pytest.raises(OSError, match="not enough disk space"):
        hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: usage(2**40))
        interrupt_after(patch, "model.norm.weight")
        with pytest.raises(OSError, match="the disk fell out"):
            hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)
    # Less than for all of it, but enough for the rest.
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(margin + HFCheckpoint(hf).num_bytes - 1))
    hf_to_megatron(hf, tmp_path / "megatron", options=SMALL)


def test_an_error_of_one_rank_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ValueError("layer 3 is missing")
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, failed])
    with pytest.raises(RuntimeError, match="rank 1 of the conversion failed: layer 3 is missing"):
        Ranks(0, 2).each(lambda: 1)


def test_options_are_checked() -> None:
    for name in ("workers", "memory", "max_file_size"):
        with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
            Options(**{name: 0})
