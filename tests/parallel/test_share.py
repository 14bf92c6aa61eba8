"""Work that ranks share, and waiting for each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from unittest import mock

import torch.distributed as dist

from tests.parallel.spawn import run_ranks


def waited() -> tuple[float, int, bool]:
    """Seconds, collectives, and whether the future was done: rank 1 has one that takes its time, rank 0 none."""
    from megatron_bpdg.parallel import share
    from megatron_bpdg.parallel.platform import cpu_platform

    slow: Future[None] = Future()
    mine = [slow] if dist.get_rank() == 1 else []
    counted = mock.patch.object(share.dist, "all_reduce", side_effect=dist.all_reduce)
    with cpu_platform(), mock.patch.object(share, "_MEETING_S", 0.1), counted as meetings:
        dist.barrier()
        started = time.monotonic()
        threading.Timer(0.5, slow.set_result, [None]).start()
        share.wait_together(mine)
        return time.monotonic() - started, meetings.call_count, all(future.done() for future in mine)


def test_ranks_meet_while_they_wait_and_go_on_together() -> None:
    (first, meetings, _), (second, same, done) = run_ranks(waited, 2)
    assert done
    assert min(first, second) > 0.2
    # Not one collective for all of the time.
    assert meetings == same >= 3
