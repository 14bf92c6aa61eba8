"""What the documentation names is there: links, modules, files, and every field of the config."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# A path in backticks is one of the repository where it starts with one of these, or with a room of the package.
TOP = ("docs/", "examples/", "scripts/", "tools/", "tests/", "benchmarks/", "megatron_bpdg/")
ROOMS = tuple(f"{path.name}/" for path in (ROOT / "megatron_bpdg").iterdir() if (path / "__init__.py").is_file())


def missing(text: str, page: Path) -> list[str]:
    """What a page names and the repository does not have."""
    absent = []
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link and not (page.parent / link).exists():
            absent.append(f"link {link}")
    for name in re.findall(r"(?<![\w/-])megatron_bpdg(?:\.\w+)+", text):
        if not importable(name):
            absent.append(name)
    for quoted in re.findall(r"`([\w./-]+)`", text):
        base = ROOT if quoted.startswith(TOP) else ROOT / "megatron_bpdg" if quoted.startswith(ROOMS) else None
        if base is not None and not (base / quoted).exists():
            absent.append(f"`{quoted}`")
    return absent


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(module) and "." in module and hasattr(importlib.import_module(module), last)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_named_is_there(page: Path) -> None:
    assert missing(page.read_text(), page) == []


@pytest.mark.parametrize("folder", ["examples", "scripts", "tools", "benchmarks"])
def test_modules_named_in_scripts_are_there(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in {".py", ".sh", ".sbatch", ".yaml"}:
            assert missing(path.read_text(), path) == [], path


def test_a_wrong_name_is_noticed() -> None:
    text = "[a](docs/none.md) megatron_bpdg.drift.none megatron_bpdg.none.gate `drift/none.py` `tests/none.py`"
    assert len(missing(text, ROOT / "README.md")) == 5


def test_the_page_of_the_configuration_is_what_the_schema_says() -> None:
    tool = ROOT / "tools/configuration_page.py"
    made = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "docs/configuration.md").read_text(), (
        "python tools/configuration_page.py > docs/configuration.md"
    )
