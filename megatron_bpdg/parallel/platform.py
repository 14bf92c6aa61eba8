"""Megatron-Core without CUDA: the one module that patches anything, and only where there is no GPU.

Megatron-Core asks `torch.cuda` for the current device, its RNG state and a synchronisation point, creates small
buffers with ``device="cuda"``, and checks dtypes by their CUDA type names. `enable_cpu_platform` points each of those
at the CPU. Nothing in Megatron-Core itself is replaced, so the arithmetic, the schedules and the collectives (over
gloo) are the ones that run on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Factories that Megatron-Core calls with a literal device="cuda".
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")
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
}
_originals: dict[str, Any] = {}


class _Stream:
    """CPU work is in order: waiting on a stream is already done."""

    def wait_stream(self, other: object) -> None:
        return None

    def wait_event(self, event: object) -> None:
        return None

    def synchronize(self) -> None:
        return None


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
        return factory(*args, **kwargs)

    return redirected


def _typed_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return str(original(self)).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


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
    patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patch(torch.Tensor, "type", _typed_as_cuda(torch.Tensor.type))

    patch(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    patch(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


def disable_cpu_platform() -> None:
    """Undo `enable_cpu_platform`."""
    while _originals:
        _, (owner, name, original) = _originals.popitem()
        setattr(owner, name, original)


def patched_names() -> list[str]:
    """Dotted names of everything the platform replaces at this moment."""
    return sorted(_originals)


@contextlib.contextmanager
def cpu_platform() -> Iterator[None]:
    """`enable_cpu_platform` for the length of a with-block."""
    enable_cpu_platform()
    try:
        yield
    finally:
        disable_cpu_platform()
