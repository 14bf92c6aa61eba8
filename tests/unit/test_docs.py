"""What the documentation names is there: links, modules, files, and every field of the config."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# What a path in backticks starts with when it is one of the repository; modules may start with their room, too.
TOP = ("docs/", "examples/", "scripts/", "tools/", "tests/", "benchmarks/", "megatron_bpdg/")
ROOMS = tuple(f"{path.name}/" for path in (ROOT / "megatron_bpdg").iterdir() if (path / "__init__.py").is_file())


def missing(text: str, page: Path) -> list[str]:
    """What a page names and the repository does not have."""
    links = [x for x in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if page.suffix == ".md" and "://" not in x]
    names = re.findall(r"(?<![\w/-])megatron_bpdg(?:\.\w+)+", text)
    quoted = re.findall(r"`([\w./-]+)`", text)
    # A metric has a room's name before the slash as well, but no ending.
    modules = [x for x in quoted if x.startswith(ROOMS) and x.endswith((".py", "/"))]
    return [
        *(link for link in links if not (page.parent / link).exists()),
        *(name for name in names if not resolves(name)),
        *(path for path in quoted if path.startswith(TOP) and not (ROOT / path).exists()),
        *(path for path in modules if not (ROOT / "megatron_bpdg" / path).exists()),
    ]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError):
        return False
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
