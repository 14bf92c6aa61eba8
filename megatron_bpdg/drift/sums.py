"""Sums by name: added up over micro-batches, then over ranks in one collective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bpdg.drift.signals import SumReduce


class NamedSums(dict[str, Tensor]):
    """Float64 tensors of sums. Ranks that add nothing hold zeros of the same names and shapes."""

    @classmethod
    def zeros(cls, shapes: Mapping[str, int], device: torch.device | None = None) -> NamedSums:
        """name -> ``[size]``, or a scalar where the size is 0."""
        return cls(
            {
                name: torch.zeros([size] if size else [], dtype=torch.float64, device=device)
                for name, size in shapes.items()
            }
        )

    def add(self, others: Mapping[str, Tensor]) -> None:
        """Add to each sum the one of its name.

        Raises:
            KeyError: the two do not have the same names.
        """
        if different := self.keys() ^ others.keys():
            raise KeyError(f"sums that only one side has: {', '.join(sorted(different))}")
        for name, values in others.items():
            self[name] += values

    def over(self, reduce: SumReduce) -> NamedSums:
        """The sums over all ranks of `reduce`, on the host, by one collective of all of them."""
        flat = reduce(torch.cat([values.reshape(-1) for values in self.values()])).cpu()
        parts = flat.split([values.numel() for values in self.values()])
        return NamedSums({name: part.view(values.shape) for part, (name, values) in zip(parts, self.items())})
