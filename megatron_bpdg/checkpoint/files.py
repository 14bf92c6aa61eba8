"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_bpdg.parallel.together import on_first
from megatron_bpdg.tracking.files import fsync_path

# Kept next to the weights so that a converted checkpoint serves as a model directory by itself.
_SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_LOCK = ".lock"


def partial_path(destination: Path) -> Path:
    """Where `destination` is being built."""
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def staged_directory(destination: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A sibling directory that becomes `destination` when the with-block ends well on all ranks, else is removed.

    What a process that was killed left there is removed first. Collective over the world.

    Args:
        destination: what it becomes.
        overwrite: replace an existing `destination`.
        needed_bytes: what the file system must be able to take.

    Raises:
        FileExistsError: where `destination` is not empty and `overwrite` is false.
        OSError: not enough disk space, or another process is building it.
    """
    staging = partial_path(destination)

    def claim() -> None:
        _check_free(destination, overwrite)
        _check_disk_space(destination, needed_bytes)
        staging.mkdir(parents=True, exist_ok=True)
        lock = claimed.enter_context((staging / _LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"another process is writing {destination}; its files are in {staging}") from error
        claimed.callback(shutil.rmtree, staging, ignore_errors=True)
        for path in staging.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish() -> None:
        (staging / _LOCK).unlink()
        _check_free(destination, overwrite)
        publish_directory(staging, destination)

    with ExitStack() as claimed:  # the first rank's alone
        on_first(claim)
        yield staging
        on_first(publish)


def _check_free(destination: Path, overwrite: bool) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists: choose another destination or ask to overwrite it")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, not a directory: choose another destination")


def _check_disk_space(destination: Path, needed_bytes: int) -> None:
    parent = destination.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(
            f"not enough disk space for {destination}: {needed_bytes / 2**30:.2f} GiB needed, "
            f"{free / 2**30:.2f} GiB free in {parent}"
        )


def publish_directory(staging: Path, destination: Path) -> None:
    """Rename `staging` to `destination`; what was there is deleted only after the new one stands."""
    fsync_path(staging)
    retired = None
    if destination.exists():
        retired = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.old")
        destination.rename(retired)
    staging.rename(destination)
    fsync_path(destination.parent)
    if retired is not None:
        shutil.rmtree(retired)


def copy_sidecars(source: Path, destination: Path) -> None:
    """Copy config, generation config and tokenizer files."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in {file.name for pattern in _SIDECARS for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(source / name, destination / name)
        fsync_path(destination / name)
