"""What importing a part of the package loads: the method is for other people's trainers, and `bpdg --help` is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

import megatron_bpdg

HEAVY = {"megatron", "transformers", "pydantic", "matplotlib"}
USES = {
    "the library names": (f"from megatron_bpdg import {', '.join(megatron_bpdg.__all__)}", HEAVY),
    "the rollout protocol": ("import megatron_bpdg.rollout.engine", {"megatron"}),
    "the commands": ("import megatron_bpdg.cli", HEAVY | {"torch", "aiohttp"}),
}


@pytest.mark.parametrize("use", USES)
def test_what_is_not_loaded(use: str) -> None:
    statement, never = USES[use]
    code = f"import sys; {statement}; print(*(name.partition('.')[0] for name in sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "megatron_bpdg" in loaded
    assert not never & loaded


def test_every_library_name_is_there() -> None:
    assert all(hasattr(megatron_bpdg, name) for name in megatron_bpdg.__all__)
    assert not hasattr(megatron_bpdg, "Gates")
