"""Changing the dtype of weights, and saying what that did to them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is one of `target`."""
    if source == target:
        return True
    a, b = torch.finfo(source), torch.finfo(target)
    # Subnormals included: the smallest step above zero of the source must be a multiple of the target's.
    return b.eps <= a.eps and b.max >= a.max and b.smallest_normal * b.eps <= a.smallest_normal * a.eps


class Cast:
    """Casts weights to one dtype, or leaves them alone, and counts what changed. Safe in several threads at once.

    Args:
        dtype: target; None: every tensor as it is.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.elements = self.rounded = 0
        self._sources: set[torch.dtype] = set()
        self._lock = threading.Lock()

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """What a tensor of `dtype` becomes."""
        return self.dtype or dtype

    def __call__(self, tensor: Tensor, name: str) -> Tensor:
        """The cast tensor, itself where it already has the dtype.

        Raises:
            ValueError: where a finite value becomes infinite.
        """
        if self.dtype is None or tensor.dtype == self.dtype:
            return tensor
        cast = tensor.to(self.dtype)
        rounded = 0
        if not is_exact(tensor.dtype, self.dtype):
            overflow = int((cast.isinf() & tensor.isfinite()).sum())
            if overflow:
                raise ValueError(
                    f"{name}: {overflow} of {tensor.numel()} values are too large for {_short(self.dtype)} (largest "
                    f"{torch.finfo(self.dtype).max:.4g}); choose bfloat16 or float32"
                )
            wide = torch.promote_types(tensor.dtype, self.dtype)
            rounded = int(((cast.to(wide) != tensor.to(wide)) & ~tensor.isnan()).sum())
        with self._lock:
            self._sources.add(tensor.dtype)
            self.elements += tensor.numel()
            self.rounded += rounded
        return cast

    @property
    def counts(self) -> tuple[int, int, set[torch.dtype]]:
        """Elements cast, elements changed, dtypes they had."""
        return self.elements, self.rounded, self._sources

    def merge(self, counts: Iterable[tuple[int, int, set[torch.dtype]]]) -> None:
        """Take over the counts of all ranks."""
        elements, rounded, sources = zip(*counts, strict=True)
        self.elements, self.rounded, self._sources = sum(elements), sum(rounded), set().union(*sources)

    def statement(self) -> str:
        """One line on how exact the conversion was."""
        if self.dtype is None or not self._sources:
            return "dtypes unchanged: every tensor is byte-exact"
        sources = "/".join(sorted(map(_short, self._sources)))
        if all(is_exact(source, self.dtype) for source in self._sources):
            return f"{sources} to {_short(self.dtype)}: exact, every value is kept"
        share = self.rounded / self.elements if self.elements else 0.0
        return (
            f"{sources} to {_short(self.dtype)}: rounded to nearest, {self.rounded} of {self.elements} values changed "
            f"({share:.2%}), by at most 1 in {2 / torch.finfo(self.dtype).eps:.0f} where normal"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
