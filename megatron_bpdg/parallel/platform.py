"""Megatron-Core without CUDA: the one module that patches anything, and only where there is no GPU.

Megatron-Core asks `torch.cuda` for the current device, its RNG state and a synchronisation point, creates small buffers
with ``device="cuda"`` or in pinned memory, and checks dtypes by their CUDA type names. `enable_cpu_platform` points
each of those at the CPU. For experts it exchanges unequal parts, with split sizes that only a copy from the GPU would
turn into numbers: three collectives learn what NCCL does and gloo does not. Nothing of Megatron-Core that computes is
replaced, so the arithmetic, the schedules and the collectives (over gloo) are the ones that run on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Factories that Megatron-Core calls with a literal device="cuda".
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")


class _Stream:
    """CPU work is in order: waiting on a stream is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


# What it calls on torch.cuda, and what stands in for it.
_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *args, **kwargs: None,
    "set_device": lambda *args, **kwargs: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "current_stream": lambda *args, **kwargs: _Stream(),
    "default_stream": lambda *args, **kwargs: _Stream(),
    "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    # A class, as other packages' annotations name it.
    "Stream": _Stream,
}
_originals: dict[str, Any] = {}


def default_device() -> torch.device:
    """The device models live on: the current CUDA device, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _redirecting(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return redirected


def _typed_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return str(original(self)).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _with_sizes_as_numbers(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Split sizes may be tensors."""

    def numbers(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all_single)
    def exchange(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {name: numbers(value) for name, value in kwargs.items()}
        return all_to_all_single(output, input, *map(numbers, args), **named)

    return exchange


def _unequal(tensors: list[torch.Tensor]) -> bool:
    return len({len(tensor) for tensor in tensors}) > 1


def _gathering_unequal(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Ranks may give different numbers of rows."""

    @functools.wraps(all_gather)
    def gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if not _unequal(tensor_list):
            return all_gather(tensor_list, tensor, group, async_op)
        rows = [len(part) for part in tensor_list]
        gathered = torch.cat(tensor_list)
        dist.all_to_all_single(gathered, torch.cat([tensor] * len(rows)), rows, [len(tensor)] * len(rows), group=group)
        for part, values in zip(tensor_list, gathered.split(rows)):
            part.copy_(values)
        return None

    return gather


def _scattering_unequal(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Ranks may get different numbers of rows of the sum."""

    @functools.wraps(reduce_scatter)
    def scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if not _unequal(input_list):
            return reduce_scatter(output, input_list, *args, **kwargs)
        received = output.new_empty(len(input_list), *output.shape)
        dist.all_to_all_single(
            received.flatten(0, 1),
            torch.cat(input_list),
            [len(output)] * len(input_list),
            [len(part) for part in input_list],
            group=kwargs.get("group"),
        )
        output.copy_(received.sum(0))
        return None

    return scatter


_COLLECTIVES = {
    "all_to_all_single": _with_sizes_as_numbers,
    "all_gather": _gathering_unequal,
    "reduce_scatter": _scattering_unequal,
}


def cpu_platform_enabled() -> bool:
    return bool(_originals)


def enable_cpu_platform() -> None:
    """Let Megatron-Core run on the CPU in this process. Idempotent.

    Raises:
        RuntimeError: where a CUDA device is available; the platform must never shadow a real GPU.
    """
    if cpu_platform_enabled():
        return
    if torch.cuda.is_available():
        raise RuntimeError("enable_cpu_platform: this machine has a CUDA device; run on it instead")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # The first `with torch.device(...)` of a process remembers which functions are factories; it has to see torch's
    # own, or every later one leaves tensors where they are (and HF's from_pretrained with uninitialised buffers).
    with torch.device("cpu"):
        torch.empty(0)

    def patch(owner: Any, name: str, replacement: Any) -> None:
        _originals[f"{owner.__name__}.{name}"] = (owner, name, getattr(owner, name))
        setattr(owner, name, replacement)

    for name, replacement in _CUDA_FUNCTIONS.items():
        patch(torch.cuda, name, replacement)
    for name in _FACTORIES:
        patch(torch, name, _redirecting(getattr(torch, name)))
    for name, extend in _COLLECTIVES.items():
        patch(dist, name, extend(getattr(dist, name)))
    patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patch(torch.Tensor, "type", _typed_as_cuda(torch.Tensor.type))

    patch(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    patch(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # Its writer reports to the caller through a process of its own, as one that writes in the background must. On a CPU
    # a checkpoint is written in the foreground, and starting that process takes seconds on every rank.
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    patch(writer, "_results_queue", queue.Queue())


def disable_cpu_platform() -> None:
    """Undo `enable_cpu_platform`."""
    while _originals:
        _, (owner, name, original) = _originals.popitem()
        setattr(owner, name, original)
