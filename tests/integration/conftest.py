"""What the integration tests share, made once per worker."""

from __future__ import annotations

import pytest

from tests.integration.miniature import Miniature, make_miniature


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    return make_miniature(tmp_path_factory.mktemp("miniature"))
