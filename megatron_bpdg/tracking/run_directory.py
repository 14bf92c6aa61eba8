"""A run's directory: whose it is, who writes into it now, and what of it may be deleted.

`bpdg train` checks and claims it before anything is loaded; the recorder starts it once everything else was right.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_bpdg.tracking.files import write_text

MARKER = ".bpdg_run"
LOCK = ".bpdg_lock"
# What a run writes, and all that `--overwrite` deletes.
NAMES = (
    *("config.yaml", "metrics.jsonl", "drift.jsonl", "eval.jsonl", "samples.jsonl", "report.html"),
    *("checkpoints", "init", "sampler_weights", "tensorboard", "wandb"),
)


def check_output(output: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Refuse a directory that a run may not be written into; nothing is changed.

    Args:
        inputs: what the run reads, by name.
        overwrite: an earlier run may be there.

    Raises:
        ValueError: naming what is in the way.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; choose a directory")
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output: {output} cannot be written: no permission in {existing}")
    if not output.exists() or not any(path.name != LOCK for path in output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output: {output} is not empty; choose another directory or pass --overwrite")
    if not (output / MARKER).is_file():
        raise ValueError(
            f"output: {output} was not written by bpdg train (it has no {MARKER}); --overwrite does not delete it"
        )
    ours = [(output / name).resolve() for name in NAMES]
    if inside := [name for name, path in inputs.items() if any(path.resolve().is_relative_to(one) for one in ours)]:
        raise ValueError(f"--overwrite would delete {', '.join(inside)}, inside output: {output}")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold a run's directory for this process; what a dead process of this machine left of a claim is taken over.

    Raises:
        ValueError: another process writes there.
        OSError: naming the directory that cannot be made or written.
    """
    path = output / LOCK
    fresh = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with _locked(path) as stream:
        # The kernel forgets the lock of a process that is gone, on this machine. Between machines not every file system
        # passes locks on: there the name inside counts.
        holder = _read(stream)
        if holder and holder.get("host") != socket.gethostname():
            raise ValueError(_taken(path, holder))
        stream.seek(0)
        stream.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, stream)
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if fresh and output.is_dir() and not any(output.iterdir()):
                output.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    while True:
        with path.open("a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(_taken(path, _read(stream))) from None
            try:
                current = os.path.samestat(path.stat(), os.fstat(stream.fileno()))
            except FileNotFoundError:
                current = False
            if current:  # and not one whose holder has just deleted it
                yield stream
                return


def start(output: Path, *, overwrite: bool) -> None:
    """Make the directory a run's, an earlier run in it deleted where that was asked for. `init` is new already."""
    output.mkdir(parents=True, exist_ok=True)
    if overwrite and (output / MARKER).is_file():
        for path in (output / name for name in NAMES if name != "init"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    write_text(output / MARKER, "written by bpdg train: --overwrite may delete this run's files\n")


def _read(stream: TextIO) -> dict[str, Any]:
    """Who holds the lock; empty where its holder did not come to write that."""
    stream.seek(0)
    try:
        found = json.load(stream)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _taken(path: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
    return (
        f"output: {path.parent} is being written by {who}; choose another directory. If that run is over, delete {path}"
    )
