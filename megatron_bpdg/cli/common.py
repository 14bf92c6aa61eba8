"""What all commands share."""

from __future__ import annotations

import os
import warnings

from rich.console import Console

console = Console(stderr=True)


def quiet_libraries() -> None:
    """Keep other packages' notices about optional extras and renamed functions out of the run's output."""
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
