"""What the integration tests share, made once per worker."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from megatron_bpdg import cli
from tests.integration.miniature import Miniature, make_miniature


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    return make_miniature(tmp_path_factory.mktemp("miniature"))


Refuse = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run `bpdg` in this process; the one message it prints as it fails."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["bpdg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            cli.main()
        assert ending.value.code not in (0, None)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert captured.err.startswith("error: ")
        assert "\nerror: " not in captured.err
        return captured.err

    return run
