"""The trainer's side of the serving tests: a Megatron student in this process, engines and references around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_bpdg.checkpoint.live import LiveWeights, load_weights
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.rollout import WeightSync
from megatron_bpdg.config.servers import Servers
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.models.qwen3 import ModelShape, build_model
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.engine import Probe, Response
from megatron_bpdg.rollout.sglang import SGLangEngine
from megatron_bpdg.serving.sglang.weights import build_weight_sync
from megatron_bpdg.training.run import make_probe


def patience(*urls: str, **changes: Any) -> Servers:
    """Servers with the patience of a test."""
    quick: dict[str, Any] = {
        "timeout_s": 600.0,
        "attempts": 4,
        "backoff_s": 0.1,
        "recovery_s": 3600.0,
        "concurrency": 16,
    }
    return Servers(urls=list(urls), **{**quick, **changes})


@dataclass
class Trainer:
    """A student on its ranks, and the weights it sends."""

    policy: MegatronPolicy
    weights: LiveWeights
    output: Path

    def engine(self, servers: Servers, end_ids: Sequence[int] = (), **sync: Any) -> SGLangEngine:
        return SGLangEngine(
            servers,
            build_weight_sync(WeightSync(**sync), self.output),
            sync_urls=None,
            mesh=self.policy.mesh,
            vocab_size=self.policy.shape.vocab_size,
            end_ids=end_ids,
        )

    def probe(self) -> Probe:
        return make_probe(self.policy, tolerance=1e-3)

    def send(self, engine: SGLangEngine, version: int) -> None:
        engine.load_weights(self.weights, version, self.probe())

    def change(self, factor: float) -> None:
        """Other weights than were loaded, as after an update."""
        with torch.no_grad():
            for name, parameter in self.policy.module.named_parameters():
                if "norm" not in name:
                    parameter.mul_(factor)


@contextmanager
def trainer(checkpoint: Path, output: Path, layout: Layout | None = None) -> Iterator[Trainer]:
    layout = layout or Layout()
    with world(layout, seed=0):
        config = read_hf_config(checkpoint)
        shape = ModelShape.from_hf(config)
        model = build_model(shape, layout, torch.float32)
        load_weights([model], checkpoint)
        yield Trainer(MegatronPolicy(model, shape, layout), LiveWeights([model], config, checkpoint), output)


def hf_logprobs(checkpoint: Path, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs ``[R, V]`` of the full distribution that predicts each response token."""
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_SV = model(torch.tensor([prompt + response])).logits[0].float()
    return (logits_SV[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def check_response(checkpoint: Path, prompt: list[int], response: Response, temperature: float = 1.0) -> None:
    """Its log-probs are those of the full distribution at the temperature, whoever sampled which part of it."""
    logprobs_RV = hf_logprobs(checkpoint, prompt, response.ids, temperature)
    expected_R = logprobs_RV.gather(1, torch.tensor(response.ids)[:, None])[:, 0]
    torch.testing.assert_close(response.logprobs, expected_R, rtol=0, atol=1e-4)
    assert len(response.version_R) == len(response.ids)
