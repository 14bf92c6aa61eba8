"""Start one process per rank on this machine, say in one message what went wrong in them, and leave none behind.

`launch` starts the ranks, each of which calls `stay_with_launcher` first and leaves its error by `report_to_launcher`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Holds the launcher's process id.
_LAUNCHED = "BPDG_LAUNCHED"
# torch's launcher names the file in which a rank leaves its error for it.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


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
    os.environ[_LAUNCHED] = str(os.getpid())
    # It reports every process that it stops; the one message of the rank that failed says more.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    first: list[int] = []
    try:
        with _leaving_no_process(), _noting_first_death(first):
            run(parse_args(["--standalone", f"--nproc-per-node={world_size}", "-m", module, *arguments]))
    except ChildFailedError as error:
        raise RankError(_what_happened(error.failures, first)) from error
    except SignalException as error:
        raise RankError(f"stopped by {signal.Signals(error.sigval).name}; so were the ranks") from error
    finally:
        del os.environ[_LAUNCHED]


@contextmanager
def _leaving_no_process() -> Iterator[None]:
    """End what was started inside, and what that started, whose own parents may be gone by then."""
    import psutil

    # Children of a dead rank (Megatron-Core's checkpoint writer) become this process's then, and can be found.
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        left = [process for process in psutil.Process().children(recursive=True) if process not in before]
        for process in left:
            process.kill()
        psutil.wait_procs(left)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


@contextmanager
def _noting_first_death(first: list[int]) -> Iterator[None]:
    """Put the process id of the child that ends first into `first`, which torch does not tell."""
    over = threading.Event()

    def watch() -> None:
        while not first and not over.wait(0.02):
            with suppress(ChildProcessError):  # there is none yet
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # torch is to hear of it too
                if ended is not None:
                    first.append(ended.si_pid)

    watcher = threading.Thread(target=watch, name="bpdg-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _what_happened(failures: Mapping[int, Any], first: Sequence[int]) -> str:
    """The message for torch's failures by rank, of which one is the cause.

    Where a rank was killed, its neighbours fail too (their connections break, and they raise or abort), and torch ends
    the rest by SIGTERM. Of several that SIGTERM ended, it is the one that was seen to end first.
    """

    def consequence(failure: Any) -> tuple[bool, bool, float]:
        other = failure.exitcode >= 0 or -failure.exitcode in (signal.SIGTERM, signal.SIGABRT)
        return other, failure.pid not in first, failure.timestamp

    rank, failure = min(failures.items(), key=lambda item: consequence(item[1]))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"rank {rank} was ended by {name}{hint}; the other ranks have been stopped"
    told = {rank: failure for rank, failure in failures.items() if Path(failure.error_file).is_file()}
    if told:
        return str(min(told.values(), key=lambda failure: failure.timestamp).error_file_data["message"])
    return f"rank {rank} ended without a message, with exit code {failure.exitcode}"


def launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _LAUNCHED in os.environ


def stay_with_launcher() -> None:
    """Have the kernel end this rank when its launcher is gone, however that ended."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(os.environ[_LAUNCHED]):  # it ended before we had asked for that
        sys.exit("the launcher is gone")


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def report_to_launcher(message: str) -> bool:
    """Leave a rank's error for `launch` to show once; False where this process was not started by it."""
    file = os.environ.get(_ERROR_FILE)
    if not launched() or not file:
        return False
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({"message": message}))
    return True
