"""`bpdg`: one file per command; each checks its options and hands over to the room that does the work.

`app` has the commands together. Nothing here needs more than Python: the command is also there where the package was
installed for the losses alone, without the extra `train`.
"""

from __future__ import annotations

import sys

# What the extra brings, by import name.
TRAIN = {
    "aiohttp",
    "jinja2",
    "math_verify",
    "matplotlib",
    "megatron",
    "packaging",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "tensorboard",
    "transformers",
    "typer",
    "yaml",
}


def text_of(error: Exception) -> str:
    """What to tell the user: the remedy too, where a package of the extra `train` is missing."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN:
        return f"{error.name} is not installed and the commands need it: pip install 'megatron-bpdg[train]'"
    return str(error)


def main() -> None:
    """Entry point of `bpdg`."""
    try:
        from megatron_bpdg.cli.app import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {text_of(error)}")
    run()
