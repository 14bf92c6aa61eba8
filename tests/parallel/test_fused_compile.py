"""The Triton kernels compiled for compute capability 9.0 (H100), launched as the head launches them; nothing runs.

Triton brings NVIDIA's assembler along, so no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

# Of one multiprocessor: bytes of shared memory, one KiB of which the system keeps for each program, and registers.
SHARED_BYTES, SYSTEM_BYTES, REGISTERS = 228 * 1024, 1024, 65_536
TOKENS, HIDDEN, VOCAB, K = 256, 2048, 4096, 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Launches of each kernel: the gradient kernel is another one for each kind of term.
LAUNCHES = {"_sweep": 1, "_gradient_": 3, "_dot": 1, "_hidden_gradient": 1, "_weight_gradient": 1}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch; registers are those of a thread, spilled are its bytes in memory."""

    ptx: str
    shared: int
    threads: int
    registers: int
    spilled: int

    @property
    def programs(self) -> int:
        """That one multiprocessor can run at a time."""
        return min(SHARED_BYTES // (self.shared + SYSTEM_BYTES), REGISTERS // (self.registers * self.threads))

    @classmethod
    def of(cls, kernel: Any, path: Path) -> Compiled:
        import triton

        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listing = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
        metadata = kernel.metadata
        return cls(
            kernel.asm["ptx"],
            metadata.shared,
            32 * metadata.num_warps,
            usage["REG"],
            usage["STACK"] + usage["LOCAL"],
        )


def launch_all(dtype: torch.dtype) -> None:
    """Every kernel of a forward and backward, on one shard, without the collectives between them."""
    from megatron_bpdg.parallel.chunked import Term
    from megatron_bpdg.parallel.fused import FusedVocab
    from megatron_bpdg.parallel.vocab import TokenLayout

    group: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    hidden_NH, weight_VH = torch.zeros(TOKENS, HIDDEN, dtype=dtype), torch.zeros(VOCAB, HIDDEN, dtype=dtype)
    ops = FusedVocab(hidden_NH, weight_VH, VOCAB, TokenLayout(group))
    ops.sweep_shard(0, keep=False)
    per_token_N, column_N = torch.zeros(TOKENS), torch.zeros(TOKENS, dtype=torch.int64)
    for term in (Term(per_token_N), Term(per_token_N, column_N=column_N), Term(per_token_N, entropy_N=per_token_N)):
        ops.chunk_gradient(0, 1024, term, per_token_N)
    pairs, grad_NK = ops.pairs(column_N[:, None].expand(-1, K)), torch.zeros(TOKENS, K)
    pairs.dot(hidden_NH, weight_VH)
    pairs.hidden_gradient(grad_NK, hidden_NH, weight_VH)
    pairs.weight_gradient(grad_NK, hidden_NH, weight_VH, accumulate=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[torch.dtype, str], list[Compiled]]:
    triton = pytest.importorskip("triton", reason="Triton is not installed: its compiler makes these kernels")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from megatron_bpdg.parallel import fused

    folder = tmp_path_factory.mktemp("kernels")
    h100 = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: h100
    )
    run, found = JITFunction.run, defaultdict(list)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[dtype, self.fn.__name__].append(Compiled.of(kernel, folder / "kernel.cubin"))

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", compile_only),
        # The head refuses tensors of a CPU unless the kernels are interpreted.
        mock.patch.object(fused, "InterpretedFunction", JITFunction),
    ):
        for dtype in DTYPES:
            launch_all(dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_fit_an_h100(compiled: dict[tuple[torch.dtype, str], list[Compiled]], dtype: torch.dtype) -> None:
    assert {name: len(kernels) for (of, name), kernels in compiled.items() if of == dtype} == LAUNCHES
    for (of, name), kernels in compiled.items():
        for kernel in kernels:
            if of == dtype:
                assert kernel.programs >= 1, name
                assert kernel.spilled == 0 or (of, name) == (torch.float32, "_sweep"), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sweep_keeps_the_tensor_cores_busy(
    compiled: dict[tuple[torch.dtype, str], list[Compiled]], dtype: torch.dtype
) -> None:
    (sweep,) = compiled[dtype, "_sweep"]
    assert "wgmma.mma_async" in sweep.ptx
    # Loads of the next tiles run beside the products of this one.
    assert "cp.async" in sweep.ptx
    # One program multiplies while another takes exponentials.
    assert sweep.programs == 2
