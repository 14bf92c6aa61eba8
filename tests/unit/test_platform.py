"""The CPU platform: what it patches, that it takes everything back, and that it never shadows a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch

from megatron_bpdg.parallel import platform
from megatron_bpdg.parallel.platform import (
    cpu_platform_enabled,
    default_device,
    disable_cpu_platform,
    enable_cpu_platform,
)
from tests.cpu import cpu_platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is for machines without CUDA")

RANDOM = "megatron.core.tensor_parallel.random"
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
PATCHED = {
    # Supported Megatron-Core versions and what the platform replaces for them.
    ("0.16", "0.17", "0.18", "0.19"): [
        "Tensor.cuda",
        "Tensor.type",
        f"{WRITER}._results_queue",
        f"{RANDOM}._get_cuda_rng_state",
        f"{RANDOM}._set_cuda_rng_state",
        "torch.arange",
        "torch.cuda.Stream",
        "torch.cuda.current_device",
        "torch.cuda.current_stream",
        "torch.cuda.default_stream",
        "torch.cuda.empty_cache",
        "torch.cuda.get_rng_state",
        "torch.cuda.manual_seed",
        "torch.cuda.set_device",
        "torch.cuda.set_rng_state",
        "torch.cuda.stream",
        "torch.cuda.synchronize",
        "torch.distributed.all_gather",
        "torch.distributed.all_to_all_single",
        "torch.distributed.reduce_scatter",
        "torch.empty",
        "torch.full",
        "torch.ones",
        "torch.tensor",
        "torch.zeros",
    ]
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    disable_cpu_platform()
    yield
    disable_cpu_platform()


def patched_names() -> list[str]:
    """Dotted names of everything the platform replaces at this moment."""
    return sorted(platform._originals)


def current(name: str) -> Any:
    """What a dotted name of `patched_names` stands for at this moment."""
    owner, attribute = name.rsplit(".", 1)
    if owner == "Tensor":
        return getattr(torch.Tensor, attribute)
    return getattr(importlib.import_module(owner), attribute)


def expected_names() -> list[str]:
    family = ".".join(version("megatron-core").split(".")[:2])
    for families, names in PATCHED.items():
        if family in families:
            return names
    raise AssertionError(f"megatron-core {family}: list what the platform patches for this version")


def test_patches_exactly_this_and_nothing_by_itself() -> None:
    assert patched_names() == []
    assert not cpu_platform_enabled()
    enable_cpu_platform()
    assert cpu_platform_enabled()
    assert patched_names() == expected_names()


def test_disable_restores_everything() -> None:
    before = {name: current(name) for name in expected_names()}
    enable_cpu_platform()
    assert all(current(name) is not before[name] for name in before)
    disable_cpu_platform()
    assert all(current(name) is before[name] for name in before)
    assert patched_names() == []


def test_nothing_outside_the_list_is_touched() -> None:
    megatron = map(importlib.import_module, (RANDOM, WRITER))
    modules: tuple[Any, ...] = (torch, torch.cuda, torch.Tensor, torch.distributed, *megatron)
    before = [{name: getattr(module, name, None) for name in dir(module)} for module in modules]
    enable_cpu_platform()
    changed = {
        f"{module.__name__}.{name}"
        for module, attributes in zip(modules, before)
        for name, value in attributes.items()
        if getattr(module, name, None) is not value and not name.startswith("__")
    }
    assert changed == set(expected_names())


def test_enabling_twice_is_enabling_once() -> None:
    original = torch.zeros
    enable_cpu_platform()
    enable_cpu_platform()
    disable_cpu_platform()
    assert torch.zeros is original


def test_memory_cannot_be_pinned_and_need_not_be() -> None:
    with pytest.raises(RuntimeError, match="pin_memory"):
        torch.tensor([1], pin_memory=True)
    enable_cpu_platform()
    assert torch.tensor([1], device="cpu", pin_memory=True).cuda(non_blocking=True).tolist() == [1]


def test_context_manager_restores_after_an_error() -> None:
    original = torch.cuda.current_device
    seen = []

    def fail() -> None:
        with cpu_platform():
            seen.append(torch.cuda.current_device())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [torch.device("cpu")]
    assert torch.cuda.current_device is original


def test_refuses_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="has a CUDA device"):
        enable_cpu_platform()
    assert patched_names() == []


def test_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert default_device() == torch.device("cuda", 3)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_buffers_asked_for_on_cuda_lie_on_the_cpu(device: Any) -> None:
    with cpu_platform():
        made = [
            torch.zeros(2, device=device),
            torch.ones(2, dtype=torch.int32, device=device),
            torch.empty(2, device=device),
            torch.full((2,), 3.0, device=device),
            torch.tensor([1.0], device=device),
            torch.arange(3, device=device),
            torch.zeros(2).cuda(),
        ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[1].dtype == torch.int32
    assert made[5].tolist() == [0, 1, 2]


def test_other_devices_are_left_alone() -> None:
    with cpu_platform():
        assert torch.zeros(1, device="meta").device.type == "meta"
        assert torch.zeros(1).device.type == "cpu"


def test_type_names_are_those_of_cuda_and_conversions_still_convert() -> None:
    with cpu_platform():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_random_state_round_trips() -> None:
    with cpu_platform():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_streams_are_in_order() -> None:
    with cpu_platform():
        stream = torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        stream.synchronize()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert float(torch.ones(1)) == 1.0


def test_device_contexts_work_although_factories_are_wrapped() -> None:
    from torch.utils._device import _device_constructors

    _device_constructors.cache_clear()  # as in a process whose first device context comes after the platform
    with cpu_platform(), torch.device("meta"):
        for made in (torch.empty(2), torch.zeros(2), torch.arange(2), torch.tensor([1.0])):
            assert made.device.type == "meta"
    with torch.device("meta"):
        assert torch.arange(2).device.type == "meta"


def test_the_platform_is_off_after_these_tests() -> None:
    assert patched_names() == []
