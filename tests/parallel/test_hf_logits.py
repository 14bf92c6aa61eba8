"""HF transformers as the oracle: of Megatron-Core's logits, and of the embedded engine's log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from megatron_bpdg.checkpoint.live import iter_hf_weights, load_weights
from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.data.batch import collate
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.policy import MegatronPolicy
from megatron_bpdg.models.qwen3 import ModelShape, build_model
from megatron_bpdg.parallel.world import world
from megatron_bpdg.rollout.embedded import EmbeddedEngine
from megatron_bpdg.rollout.engine import Request, Response, generate
from megatron_bpdg.rollout.sampling import sample_seed
from tests.parallel.models import trajectories, write_checkpoint

EOS = 1
PROMPTS = [[5], [3, 4, 5, 6, 7, 8, 9], [2, 2, 2], [17, 3, 9, 9, 4], [6, 7], [8] * 12]


def _policy(checkpoint: Path) -> MegatronPolicy:
    shape = ModelShape.from_hf(read_hf_config(checkpoint))
    model = build_model(shape, Layout(), torch.float32)
    load_weights([model], checkpoint)
    return MegatronPolicy(model, shape, Layout())


def _logits(checkpoint: Path) -> list[torch.Tensor]:
    """Whole-vocabulary logits ``[R, V]`` at the positions that predict each response."""
    given = trajectories()
    with world(Layout(), seed=0):
        policy = _policy(checkpoint)
        batches = [collate(given[:4], pad_id=0, length_multiple=1, token_multiple=1)]
        batches += [collate([t], pad_id=0, length_multiple=1, token_multiple=1) for t in given[4:]]

        def read(hidden_SBH: Any, batch: Any) -> Any:
            size, width = len(batch.input_ids_BS), hidden_SBH.shape[-1]
            assert hidden_SBH.shape[1] == size
            return hidden_SBH.reshape(-1, width)[batch.position_N] @ policy.unwrapped.head_weight().T

        logits_NV = torch.cat(policy.forward(batches, read))
    return list(logits_NV.split([len(t.response_ids) for t in given]))


def _reference_logits(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0]
    return logits_TV[len(prompt) - 1 : -1]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name -> what is not the default of `write_checkpoint`.
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {},
    "yarn": {"rope_parameters": YARN},
    "yarn_by_hand": {"rope_parameters": YARN | {"attention_factor": 0.7, "beta_fast": 4.0, "truncate": False}},
    "moe": {"kind": "qwen3_moe"},
    "moe_tied_yarn": {"kind": "qwen3_moe", "tied": True, "rope_parameters": YARN},
    "moe_weights_below_1": {"kind": "qwen3_moe", "norm_topk_prob": False},
    "moe_one_expert": {"kind": "qwen3_moe", "norm_topk_prob": False, "num_experts_per_tok": 1},
    "moe_every_second_layer": {"kind": "qwen3_moe", "decoder_sparse_step": 2},
    "moe_but_not_layer_2": {"kind": "qwen3_moe", "mlp_only_layers": [2]},
    "qwen2": {"kind": "qwen2", "tied": True},
    "llama": {"kind": "llama"},
    "llama3": {"kind": "llama", "rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", **({"tied": False, "seed": 3} | MODELS[name]))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert model.config.num_hidden_layers == 4
    logits = _logits(checkpoint)
    spread = []
    for t, actual_RV in zip(trajectories(), logits):
        expected_RV = _reference_logits(model, t.prompt_ids, t.response_ids)
        assert float((actual_RV - expected_RV).abs().max()) < 1e-4
        spread.append(float(expected_RV.std()))
    assert min(spread) > 0.1, "logits near zero would agree whatever the model"


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_scaled_rotary_embeddings_matter_at_these_lengths(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Otherwise the test above would pass without them."""
    checkpoint = write_checkpoint(tmp_path / "hf", tied=False, seed=3, kind="llama", rope_parameters=rope)
    plain = AutoConfig.from_pretrained(checkpoint)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=plain, dtype=torch.float32).eval()
    differences = [
        float((actual_RV - _reference_logits(model, t.prompt_ids, t.response_ids)).abs().max())
        for t, actual_RV in zip(trajectories(), _logits(checkpoint))
    ]
    assert max(differences) > 1e-2


def _generate(checkpoint: Path, batch_sizes: list[int], sampling: Sampling) -> dict[str, list[Response]]:
    """The same requests decoded in batches of several sizes, and in another order."""
    requests = [Request(p, sample_seed(0, 1, i, s)) for i, p in enumerate(PROMPTS) for s in range(3)]
    results = {}
    with world(Layout(), seed=0):
        policy = _policy(checkpoint)
        config = read_hf_config(checkpoint)
        for batch_size in batch_sizes:
            engine = EmbeddedEngine(checkpoint, end_ids=[EOS], batch_size=batch_size, dtype=torch.float32)
            with pytest.raises(RuntimeError, match="before load_weights"):
                generate(engine, requests, sampling)
            engine.load_weights(iter_hf_weights([policy.module], config), version=4)
            results[f"batches of {batch_size}"] = generate(engine, requests, sampling)
        results["backwards"] = generate(engine, requests[::-1], sampling)[::-1]
        told: list[int] = []
        generate(engine, requests, sampling, lambda responses: told.append(len(list(responses))))
        assert sum(told) == len(requests)
    return results


@pytest.mark.parametrize(
    ("tied", "sampling"),
    [
        (True, Sampling(max_new_tokens=24)),
        (False, Sampling(temperature=0.7, top_p=0.8, max_new_tokens=24)),
        (False, Sampling(top_p=1e-9, max_new_tokens=12)),
    ],
    ids=["plain", "temperature-top-p", "greedy"],
)
def test_the_embedded_engine_samples_from_the_model(tmp_path: Path, tied: bool, sampling: Sampling) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", tied=tied, seed=5)
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    results = _generate(checkpoint, [1, 7, 64], sampling)
    alone = results["batches of 1"]
    for name, responses in results.items():
        assert [r.ids for r in responses] == [r.ids for r in alone], name

    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    for responses in results.values():
        for prompt, response in zip(prompts, responses):
            assert response.version_R.tolist() == [4] * len(response.ids)
            assert response.finished == (response.ids[-1] == EOS)
            assert EOS not in response.ids[:-1]
            assert response.finished or len(response.ids) == sampling.max_new_tokens
            logits_RV = _reference_logits(model, prompt, response.ids)
            expected_RV = (logits_RV / sampling.temperature).log_softmax(-1)
            expected_R = expected_RV.gather(1, torch.tensor(response.ids)[:, None])[:, 0]
            # Prompts of other lengths in the batch are padded on the left: positions and attention must not notice.
            torch.testing.assert_close(response.logprobs, expected_R, rtol=0, atol=1e-4)
            if sampling.top_p < 1e-6:
                assert response.ids == logits_RV.argmax(-1).tolist()
    if sampling.top_p > 1e-6:
        assert any(r.finished for r in alone)
        assert len({tuple(r.ids) for r in alone}) > len(PROMPTS), "samples of a prompt should differ"


def _load_wrong_weights(checkpoint: Path) -> str:
    with world(Layout(), seed=0):
        engine = EmbeddedEngine(checkpoint, end_ids=[EOS], batch_size=4, dtype=torch.float32)
        weights = dict(iter_hf_weights([_policy(checkpoint).module], read_hf_config(checkpoint)))
        del weights["model.norm.weight"]
        with pytest.raises(ValueError, match="weight update") as caught:
            engine.load_weights([*weights.items(), ("model.surprise", torch.zeros(1))], version=1)
        return str(caught.value)


def test_a_weight_update_names_what_is_missing_and_unknown(tmp_path: Path) -> None:
    message = _load_wrong_weights(write_checkpoint(tmp_path / "hf", tied=False, seed=5, layers=1))
    assert "missing ['model.norm.weight'], unknown ['model.surprise']" in message
