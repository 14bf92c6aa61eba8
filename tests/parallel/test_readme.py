"""The README's snippet for other trainers runs as written, and the library's names load nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bpdg import FixedBlocks
from tests.parallel.spawn import run_ranks

README = Path(__file__).parents[2] / "README.md"


def snippet(sequence_parallel: bool) -> tuple[float, float]:
    """(loss sum, mass) over the ranks."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    assert group is not None
    logits_NV = torch.randn(8, 12, generator=generator).chunk(group.size(), dim=1)[group.rank()].requires_grad_()
    names: dict[str, Any] = {
        "tp_group": group,
        "sequence_parallel": sequence_parallel,
        "logits_NV": logits_NV,
        "vocab_size": 12,
        "sampled_N": torch.randint(0, 12, (8,), generator=generator),
        "old_logprobs_N": -3 * torch.rand(8, generator=generator),
        "mask_N": torch.arange(8) != 3,
        "block_N": torch.cat([FixedBlocks(2)(torch.zeros(5)), 3 + FixedBlocks(2)(torch.zeros(3))]),
        "num_blocks": 5,
        "sequence_N": torch.tensor([0] * 5 + [1] * 3),
        "num_sequences": 2,
        "support_NK": torch.rand(8, 12, generator=generator).topk(4).indices,
        "teacher_logprobs_NK": -4 * torch.rand(8, 4, generator=generator),
    }
    exec(code, names)
    names["loss_sum"].backward()
    assert logits_NV.grad is not None
    assert logits_NV.grad.any()
    parts = torch.stack([names["loss_sum"].detach().double(), names["weighed"].mass])
    if sequence_parallel:
        dist.all_reduce(parts)
    return float(parts[0]), float(parts[1])


def both() -> list[tuple[float, float]]:
    return [snippet(False), snippet(True)]


def test_the_snippet_runs_and_gives_the_same_however_tokens_are_spread() -> None:
    (one,) = run_ranks(snippet, 1, False)
    assert one[1] > 0
    for rank in run_ranks(both, 2):
        for result in rank:
            assert result == pytest.approx(one, rel=1e-5)


def test_the_librarys_names_load_neither_megatron_nor_pydantic() -> None:
    code = (
        "import sys, megatron_bpdg; print(*{'megatron', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
