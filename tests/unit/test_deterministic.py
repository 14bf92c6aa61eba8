"""training.deterministic and training.gradient_accumulation_fusion: what a config turns into before anything runs."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Literal

import pytest
import torch

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.training import Training
from megatron_bpdg.models.qwen3 import ModelShape, transformer_config
from megatron_bpdg.training.deterministic import VARIABLES, deterministic
from megatron_bpdg.training.fits import fuses_gradient_accumulation
from tests.cpu import cpu_platform

SHAPE = ModelShape(2, 32, 64, 4, 2, tie_word_embeddings=True, head_dim=8, vocab_size=16)
EXTENSION = "fused_weight_gradient_mlp_cuda"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an unused CUDA device, as far as one is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def config_fields(fusion: bool = False) -> tuple[bool, bool]:
    with cpu_platform():
        config = transformer_config(SHAPE, Layout(), torch.float32, gradient_accumulation_fusion=fusion)
    return config.deterministic_mode, config.gradient_accumulation_fusion


def test_models_built_in_the_mode_are_deterministic_and_it_ends() -> None:
    assert config_fields() == (False, False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert config_fields(fusion=True) == (True, True)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_mode_that_was_on_before_stays_on() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_variables_are_set_on_a_gpu_and_taken_back(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    gpu.setenv("NCCL_ALGO", "Ring,CollnetChain")
    with deterministic(True):
        assert set_variables() == {
            "CUBLAS_WORKSPACE_CONFIG": ":16:8",
            "NCCL_ALGO": "Ring,CollnetChain",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        }
    assert set(set_variables()) == {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"}
    with deterministic(False):
        assert set(set_variables()) == {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"}


def test_variables_are_left_alone_on_a_cpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    gpu.setenv("NCCL_ALGO", "Tree")
    with deterministic(True):
        assert set_variables() == {"NCCL_ALGO": "Tree"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("NCCL_ALGO", ""),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_other_values_are_an_error(name: str, value: str, gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv(name, value)
    with pytest.raises(ValueError, match=rf"{name}={value} do not go together: .*{VARIABLES[name][0]}"):
        deterministic(True).__enter__()
    assert set_variables() == {name: value}
    assert not torch.are_deterministic_algorithms_enabled()


def test_too_late_is_an_error_unless_all_is_set(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu.setenv("NCCL_ALGO", "Ring")
    with pytest.raises(RuntimeError, match=r"too late.*CUBLAS_WORKSPACE_CONFIG=:4096:8 NVTE_ALLOW\w+=0 before"):
        deterministic(True).__enter__()
    for name, accepted in VARIABLES.items():
        gpu.setenv(name, accepted[0])
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("setting", "device", "installed", "expected"),
    [
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("auto", CPU, True, False),
        (True, CUDA, True, True),
        (False, CUDA, True, False),
        (False, CPU, False, False),
        (True, CUDA, False, f"needs {EXTENSION}, which does not load.*apex"),
        (True, CPU, True, "needs a CUDA device"),
    ],
)
def test_fusion_is_on_where_the_extension_and_a_gpu_are(
    setting: Literal["auto", True, False],
    device: torch.device,
    installed: bool,
    expected: bool | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, ModuleType(EXTENSION) if installed else None)
    training = Training(gradient_accumulation_fusion=setting)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"gradient_accumulation_fusion: true {expected}"):
            fuses_gradient_accumulation(training, device)
    else:
        assert fuses_gradient_accumulation(training, device) is expected
