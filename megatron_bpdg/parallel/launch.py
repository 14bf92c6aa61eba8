"""Start one process per rank on this machine and say in one message what went wrong in them."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

_LAUNCHED = "BPDG_LAUNCHED"
# torch's launcher names the file in which a rank leaves its error for it.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class RankError(RuntimeError):
    """A rank failed; the message is the first failing rank's own, or how its process ended."""


def launch(module: str, arguments: Sequence[str], world_size: int) -> None:
    """Run ``python -m module arguments`` on `world_size` ranks through torchrun, and wait for them.

    Raises:
        RankError: a rank failed; the others have been stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Several busy OpenMP pools on few cores spend their time waiting for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Megatron-Core's overlap of communication relies on kernels being queued in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ[_LAUNCHED] = "1"
    # It reports every process that it stops; the one message of the rank that failed says more.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={world_size}", "-m", module, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if Path(failure.error_file).is_file():
            raise RankError(str(failure.error_file_data["message"])) from error
        raise RankError(f"rank {rank} ended without a message, {_ending(failure.exitcode)}") from error
    except SignalException as error:
        raise RankError(f"stopped by {signal.Signals(error.sigval).name}; so were the ranks") from error
    finally:
        del os.environ[_LAUNCHED]


def launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _LAUNCHED in os.environ


def report_to_launcher(message: str) -> bool:
    """Leave a rank's error for `launch` to show once; False where this process was not started by it."""
    file = os.environ.get(_ERROR_FILE)
    if not launched() or not file:
        return False
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({"message": message}))
    return True


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"with exit code {exit_code}"
    hint = " (out of memory?)" if -exit_code == signal.SIGKILL else ""
    return f"by {signal.Signals(-exit_code).name}{hint}"
