"""The CPU platform for the length of a with-block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_bpdg.parallel.platform import disable_cpu_platform, enable_cpu_platform


@contextlib.contextmanager
def cpu_platform() -> Iterator[None]:
    enable_cpu_platform()
    try:
        yield
    finally:
        disable_cpu_platform()
