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
    from megatron_bpdg.parallel import together
    from tests.cpu import cpu_platform

    slow: Future[None] = Future()
    mine = [slow] if dist.get_rank() == 1 else []
    counted = mock.patch.object(together.dist, "all_reduce", side_effect=dist.all_reduce)
    with cpu_platform(), mock.patch.object(together, "_MEETING_S", 0.1), counted as meetings:
        dist.barrier()
        started = time.monotonic()
        threading.Timer(0.5, slow.set_result, [None]).start()
        together.wait_together(mine)
        return time.monotonic() - started, meetings.call_count, all(future.done() for future in mine)


def test_ranks_meet_while_they_wait_and_go_on_together() -> None:
    (first, meetings, _), (second, same, done) = run_ranks(waited, 2)
    assert done
    assert min(first, second) > 0.2
    # Not one collective for all of the time.
    assert meetings == same >= 3


def first_alone(works: bool) -> tuple[str, list[int], str]:
    """What `on_first` gave here, who did the work, and the error."""
    from megatron_bpdg.parallel.together import everyone, on_first

    did: list[int] = []

    def work() -> str:
        did.append(dist.get_rank())
        if not works:
            raise KeyError("the first rank's own")
        return "found"

    said, error = "", ""
    try:
        said = on_first(work)
    except KeyError as caught:
        error = str(caught)
    return said, [rank for ranks in everyone(did) for rank in ranks], error


def test_what_the_first_rank_finds_is_known_everywhere() -> None:
    assert run_ranks(first_alone, 2, True) == [("found", [0], "")] * 2


def test_the_first_ranks_error_is_raised_everywhere() -> None:
    assert run_ranks(first_alone, 2, False) == [("", [0], '"the first rank\'s own"')] * 2


def each_its_part(fails: int | None) -> tuple[int, str]:
    """What `each` gave here, and the error with its cause."""
    from megatron_bpdg.parallel.together import each, this_rank

    def work() -> int:
        if this_rank() == fails:
            raise KeyError("layer 3")
        return 10 + this_rank()

    try:
        return each(work), ""
    except (KeyError, RuntimeError) as caught:
        return 0, f"{caught!r} from {caught.__cause__!r}"


def test_each_rank_has_its_own_result() -> None:
    assert run_ranks(each_its_part, 2, None) == [(10, ""), (11, "")]


def test_an_error_of_one_rank_reaches_all() -> None:
    first, second = run_ranks(each_its_part, 2, 1)
    assert first == (0, """RuntimeError("rank 1 failed: 'layer 3'") from KeyError('layer 3')""")
    assert second == (0, "KeyError('layer 3') from None")


def test_one_process_without_a_group_is_one_rank() -> None:
    from megatron_bpdg.parallel.together import each, everyone, on_first, this_rank

    assert everyone(3) == [3]
    assert on_first(lambda: 5) == each(lambda: 5) == 5
    assert this_rank() == 0
