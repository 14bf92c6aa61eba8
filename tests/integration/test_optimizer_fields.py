"""Every field of the optimizer acts, and as its name says: runs beside torch's AdamW on HF's own model.

Each case changes one field of a common setting in which all of them matter, so that a field that is ignored, or given
to another, leaves the run where the common setting ends.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bpdg.training.loop import fine_tune
from tests.integration.miniature import Miniature, metrics, weights

STEPS = 4
# An epsilon that is large beside the rounding of gradients near zero, which Adam would turn into whole steps.
COMMON: dict[str, Any] = {
    "lr": 1e-2,
    "lr_warmup_updates": 0,
    "lr_schedule": "constant",
    "weight_decay": 0.1,
    "adam_beta1": 0.7,
    "adam_beta2": 0.8,
    "adam_eps": 1e-3,
    "clip_grad": 0.5,
}
CHANGES: dict[str, Any] = {
    "lr": 5e-3,
    "lr_warmup_updates": 2,
    "lr_schedule": "cosine",
    "weight_decay": 1.0,
    "adam_beta1": 0.2,
    "adam_beta2": 0.3,
    "adam_eps": 1e-2,
    "clip_grad": 0.05,
}
EXAMPLES = [("1+2=", "1+2=3\n#3"), ("4-1=", "4-1=3\n#3"), ("7+5=", "7+5=2\n#2")]
TOLERANCE = 2e-5


def rate(step: int, fields: dict[str, Any]) -> float:
    """Of the step-th update, counted from 0: in a line from 0 to lr, then constant or down to 0 on half a cosine."""
    warmup = fields["lr_warmup_updates"]
    if step < warmup:
        return float(fields["lr"] * step / warmup)
    falls = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
    return float(fields["lr"] * (falls if fields["lr_schedule"] == "cosine" else 1.0))


def reference(miniature: Miniature, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after STEPS updates on the mean negative log-likelihood of all response tokens."""
    model = AutoModelForCausalLM.from_pretrained(miniature.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(miniature.student)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            # As is usual, and in Megatron-Core too: norms do not decay.
            {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": fields["weight_decay"]},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(fields["adam_beta1"], fields["adam_beta2"]),
        eps=fields["adam_eps"],
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, fields)
        optimizer.zero_grad()
        losses = []
        for prompt, response in EXAMPLES:
            prompt_ids, response_ids = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response_ids), reduction="none"))
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), fields["clip_grad"])
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def common(miniature: Miniature) -> dict[str, Tensor]:
    return reference(miniature, COMMON)


@pytest.mark.parametrize("field", [None, *CHANGES])
def test_a_field_of_the_optimizer(
    field: str | None, common: dict[str, Tensor], miniature: Miniature, tmp_path: Path
) -> None:
    fields = COMMON | ({} if field is None else {field: CHANGES[field]})
    data = tmp_path / "sft.jsonl"
    rows = [{"id": str(i), "prompt": prompt, "response": response} for i, (prompt, response) in enumerate(EXAMPLES)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = miniature.config(
        tmp_path / "run",
        {"kind": "sft", "teacher": None, "data": {"train": str(data)}, "objective": {"name": "sft"}},
        {"training": {"steps": STEPS, "minibatches": 1, "batch_size": len(EXAMPLES), **fields}},
    )
    fine_tune(cfg)
    assert [record["train/lr"] for record in metrics(cfg.output)] == pytest.approx(
        [rate(step, fields) for step in range(STEPS)]
    )
    expected = reference(miniature, fields)
    assert furthest(weights(cfg.output / "checkpoints"), expected) < TOLERANCE
    if field is not None:
        assert furthest(expected, common) > 50 * TOLERANCE, "a change this small tests nothing"
