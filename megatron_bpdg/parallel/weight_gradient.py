"""The gradient of a weight, piece by piece: as a tensor for autograd, or straight into Megatron's main gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """Collects the gradient of ``weight_VH`` during one backward.

    Args:
        accumulate: add to ``weight_VH.main_grad``, as Megatron-Core's own linear layers do under
            gradient_accumulation_fusion. `result` is then a placeholder that its data-parallel hook leaves out, or, for
            a weight that embeddings share, zeros to which their gradient is added.
        dtype: of the sum, where it is not the main gradient.

    Raises:
        ValueError: `accumulate` for a weight that has no main gradient.
    """

    def __init__(self, weight_VH: Tensor, accumulate: bool, dtype: torch.dtype) -> None:
        if accumulate and not hasattr(weight_VH, "grad_added_to_main_grad"):
            raise ValueError(
                "gradient_accumulation_fusion needs the head's weight to have a main gradient: wrap the model in "
                "Megatron-Core's DistributedDataParallel first"
            )
        self.weight_VH = weight_VH
        self.accumulate = accumulate
        self.total_VH: Tensor = (
            weight_VH.main_grad  # type: ignore[attr-defined]
            if accumulate
            else torch.zeros_like(weight_VH, dtype=dtype, memory_format=torch.contiguous_format)
        )

    def add_product(self, start: int, stop: int, a: Tensor, b: Tensor) -> None:
        """Add ``a @ b`` to rows start ... stop; without `accumulate`, each row gets one product only."""
        rows = self.total_VH[start:stop]
        if self.accumulate:
            addmm_(rows, a, b)
        else:
            torch.mm(a, b, out=rows)

    def add_rows(self, index_E: Tensor, rows_EH: Tensor) -> None:
        """Add rows; repeated ones add up, in a fixed order under `torch.use_deterministic_algorithms`."""
        self.total_VH.index_add_(0, index_E, rows_EH.to(self.total_VH.dtype))

    def result(self) -> Tensor:
        """What the backward returns."""
        if not self.accumulate:
            return self.total_VH.to(self.weight_VH.dtype)
        self.weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        make = torch.zeros_like if getattr(self.weight_VH, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight_VH)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` in place, whatever the dtype of the total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
