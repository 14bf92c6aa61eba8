"""What importing a part of the package loads: the method is for other people's trainers, and `bpdg --help` is quick."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

import megatron_bpdg
from megatron_bpdg import cli

HEAVY = {"megatron", "transformers", "pydantic", "matplotlib"}
USES = {
    "the library names": (f"from megatron_bpdg import {', '.join(megatron_bpdg.__all__)}", HEAVY),
    "the rollout protocol": ("import megatron_bpdg.rollout.engine", {"megatron"}),
    "the commands": ("import megatron_bpdg.cli.app", HEAVY | {"torch", "aiohttp"}),
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


# What `pip install megatron-bpdg` without the extra `train` leaves out cannot be imported in what follows.
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def without(names: Iterable[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = WITHOUT.format(names=sorted(names)) + code
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_the_extra_of_the_commands_is_named_by_them() -> None:
    extra = {re.split(r"[<>=\[]", item)[0] for item in PYPROJECT["project"]["optional-dependencies"]["train"]}
    imported = {"megatron-core": "megatron", "pyyaml": "yaml"}
    assert {imported.get(name, name.replace("-", "_")) for name in extra} == cli.TRAIN


def test_the_librarys_names_need_torch_and_numpy_alone() -> None:
    assert {re.split(r"[<>=]", item)[0] for item in PYPROJECT["project"]["dependencies"]} == {"torch", "numpy"}
    ran = without(cli.TRAIN, f"from megatron_bpdg import {', '.join(megatron_bpdg.__all__)}")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("absent", ["typer", "rich", "pydantic", "yaml", "all"])
def test_a_command_says_which_extra_is_missing(absent: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("kind: opd")
    names = cli.TRAIN if absent == "all" else {absent}
    ran = without(names, "from megatron_bpdg.cli import main; main()", "train", str(tmp_path / "x.yaml"))
    assert ran.returncode == 1
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith(f"error: {'typer' if absent == 'all' else absent}")
    assert line.endswith("is not installed and the commands need it: pip install 'megatron-bpdg[train]'")
