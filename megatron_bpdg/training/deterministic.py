"""The same bits from the same run: what torch and the libraries below it have to be told, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Variable -> the values under which its library adds in a fixed order; the first is set where there is none. cuBLAS
# reads its own with its first handle, NCCL with its first communicator, Transformer Engine with its first attention.
VARIABLES: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Megatron-Core no longer trusts trees: their shape may differ from run to run.
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Compute deterministically for the length of a with-block, models built in it included; or leave all as it is.

    Operations without a deterministic implementation raise. It has to begin before anything runs on a GPU.

    Raises:
        ValueError: a variable is set to something else.
        RuntimeError: CUDA is already in use, and a variable is not set.
    """
    if not enabled:
        yield
        return
    missing = _missing_variables() if torch.cuda.is_available() else {}
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.update(missing)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for name in missing:
            del os.environ[name]


def _missing_variables() -> dict[str, str]:
    """What is not set, and to what to set it."""
    missing = {}
    for name, accepted in VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            missing[name] = accepted[0]
        elif not set(value.split(",")) <= set(accepted):
            raise ValueError(
                f"training.deterministic: true and {name}={value} do not go together: unset it, or set it to one of "
                f"{', '.join(accepted)}"
            )
    if missing and torch.cuda.is_initialized():
        raise RuntimeError(
            "training.deterministic: true comes too late in a process that already uses CUDA: set "
            f"{' '.join(f'{name}={value}' for name, value in missing.items())} before it starts"
        )
    return missing
