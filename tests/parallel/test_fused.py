"""The Triton kernels in Triton's interpreter, at tiny sizes: dense values and gradients at 1, 2 and 4 ranks.

In processes of their own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bpdg.parallel.head import Head
from tests.parallel.parity import CHECKS, parity, tolerance, worst
from tests.parallel.parity_inputs import CASES
from tests.parallel.spawn import run_ranks
from tests.parallel.test_head import LOSSES, above

NAMES = ("logsumexp", "logprob", "gather", "entropy", "sampled_token", "lsm", "lsm_tail", "gated_sampled_token_global")
# The interpreter has no bfloat16 arithmetic.
USED = ("float32",)


def on_ranks() -> dict[str, Any]:
    from megatron_bpdg.parallel import fused, fused_sparse
    from tests.parallel.test_chunked import main_gradients, of_logits
    from tests.parallel.test_head import gradient_errors

    checks = {name: CHECKS[name] for name in NAMES}
    tiny = {"BLOCK_TOKENS": 4, "BLOCK_COLUMNS": 2, "BLOCK_HIDDEN": 4}
    tiny_rows = {"BLOCK_IDS": 2, "BLOCK_HIDDEN": 4, "BLOCK_ENTRIES": 2, "BLOCK_ROW": 4}
    report: dict[str, Any] = {}
    for name, parts in (("one part", 1), ("many parts", 8)):
        patched = mock.patch.multiple(fused, **tiny, MIN_PARTS=1, MIN_PROGRAMS=parts)
        with patched, mock.patch.multiple(fused_sparse, **tiny_rows):
            report[name] = parity(USED, of_logits(fused.FusedVocab, 100e-6), checks=checks)
            report[f"main gradients, {name}"] = main_gradients(fused.FusedVocab)
            report[f"head, {name}"] = gradient_errors(["fused"], torch.float32)
    report["dtype"] = ""
    try:
        parity(["anywhere"], of_logits(fused.FusedVocab), checks={"entropy": CHECKS["entropy"]})
    except ValueError as error:
        report["dtype"] = str(error)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_kernels_give_dense_values_and_gradients(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its interpreter runs these kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ranks = run_ranks(on_ranks, world_size)
    for parts in ("one part", "many parts"):
        errors = worst(rank[parts] for rank in ranks)
        assert len(errors) == len(USED) * len(NAMES) * 2
        bad = {}
        for (case, layout, check), error in errors.items():
            if not error.within(tolerance(CASES[case], check)):
                bad[case, layout, check] = error
        assert not bad
        for rank in ranks:
            assert len(rank[f"head, {parts}"]) == 4 * len(LOSSES)
            assert not above(rank[f"head, {parts}"], 1e-4)
            report = rank[f"main gradients, {parts}"]
            assert len(report) == 6
            assert not {name: error for name, error in report.items() if not error < 1e-5}
    assert all("computes in float32, not torch.float64" in rank["dtype"] for rank in ranks)


def test_a_fused_head_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.head: fused has Triton kernels for CUDA devices only"):
        Head("fused").check_device(torch.device("cpu"))
