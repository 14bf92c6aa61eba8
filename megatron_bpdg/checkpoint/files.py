"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bpdg.tracking.files import fsync_path
from megatron_bpdg.tracking.files import write_text as write_text

# Kept next to the weights so that a converted checkpoint serves as a model directory by itself.
SIDECAR_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def check_free(destination: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError where `destination` is occupied and may not be replaced."""
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists: choose another destination or ask to overwrite it")
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, not a directory: choose another destination")


def check_disk_space(destination: Path, needed_bytes: int) -> None:
    """Raise OSError where the file system of `destination` cannot take `needed_bytes` more."""
    parent = destination.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(
            f"not enough disk space for {destination}: {needed_bytes / 2**30:.2f} GiB needed, "
            f"{free / 2**30:.2f} GiB free in {parent}"
        )


@contextmanager
def staged_directory(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling directory that becomes `destination` when the with-block ends well, else is removed.

    Raises:
        FileExistsError: where `destination` is not empty and `overwrite` is false.
    """
    check_free(destination, overwrite=overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        yield staging
        publish_directory(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def copy_sidecars(source: Path, destination: Path) -> list[str]:
    """Copy config, generation config and tokenizer files; returns their names."""
    destination.mkdir(parents=True, exist_ok=True)
    names = sorted({file.name for pattern in SIDECAR_PATTERNS for file in source.glob(pattern) if file.is_file()})
    for name in names:
        shutil.copyfile(source / name, destination / name)
        fsync_path(destination / name)
    return names
