"""A target directory under way: beside its destination, kept over an interruption, never mistaken for the real one."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bpdg.checkpoint.files import check_free, publish_directory, write_text
from megatron_bpdg.checkpoint.ranks import Ranks
from megatron_bpdg.checkpoint.transfer import RECORDS

_PLAN = "plan.json"
_LOCK = "lock"


def partial_path(destination: Path) -> Path:
    """Where the conversion to `destination` is under way."""
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def partial_directory(
    destination: Path, plan: Mapping[str, Any], ranks: Ranks, *, overwrite: bool, restart: bool
) -> Iterator[Path]:
    """The directory in which to build, new or left by an interrupted conversion of the same plan.

    When the with-block ends well on all ranks it becomes `destination`. After an error it is kept if some file in it is
    complete, else removed.

    Args:
        destination: what it becomes.
        plan: JSON of all that decides the result; a partial directory of another plan is not continued.
        ranks: collective over them.
        overwrite: replace an existing `destination`.
        restart: delete a partial directory instead of continuing it.

    Raises:
        FileExistsError: where `destination` is occupied, or a partial directory of another plan is in the way.
        OSError: another process is at it.
    """
    partial = partial_path(destination)
    lock = ranks.on_first(lambda: _prepare(destination, partial, plan, overwrite=overwrite, restart=restart))
    try:
        yield partial

        def publish() -> None:
            shutil.rmtree(partial / RECORDS)
            (partial / _PLAN).unlink()
            (partial / _LOCK).unlink()
            check_free(destination, overwrite=overwrite)
            publish_directory(partial, destination)

        ranks.on_first(publish)
    except BaseException:
        if ranks.first and partial.is_dir() and not _records(partial):
            shutil.rmtree(partial)
        raise
    finally:
        if lock is not None:
            lock.close()


def _records(partial: Path) -> list[Path]:
    return list((partial / RECORDS).glob("*.json"))


def _prepare(destination: Path, partial: Path, plan: Mapping[str, Any], *, overwrite: bool, restart: bool) -> Any:
    """Make or take over the partial directory; returns the open lock."""
    check_free(destination, overwrite=overwrite)
    text = json.dumps(plan, sort_keys=True)
    (partial / RECORDS).mkdir(parents=True, exist_ok=True)
    lock = (partial / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise OSError(f"another process is converting to {destination}; its files are in {partial}") from error
    file = partial / _PLAN
    known = file.read_text(encoding="utf-8") if file.is_file() else None
    if known not in (None, text) and _records(partial) and not restart:
        lock.close()
        raise FileExistsError(
            f"{partial} holds an unfinished conversion of another source or with other options: start again with "
            "--restart to delete it, or choose another destination"
        )
    if restart or known != text:
        for path in partial.iterdir():
            if path.name == _LOCK:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (partial / RECORDS).mkdir()
    write_text(file, text)
    return lock
