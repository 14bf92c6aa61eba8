"""Configs of runs with servers: what does not go together is refused before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bpdg.config.schema import RunConfig
from megatron_bpdg.training.fits import check_objective
from megatron_bpdg.training.method import build_objective

SERVED: dict[str, Any] = {
    "output": "runs/x",
    "student": {"checkpoint": "student"},
    "teacher": {"engine": "sglang", "servers": {"urls": ["http://t:1"]}},
    "data": {"train": "train.jsonl"},
    "rollout": {"engine": "sglang", "servers": {"urls": ["http://s:1"]}},
    "objective": {"name": "lsm", "top_k": 4},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(SERVED | changes)


def checked(cfg: RunConfig) -> None:
    check_objective(cfg, build_objective(cfg.objective))


def test_a_run_with_two_servers() -> None:
    cfg = config()
    assert cfg.teacher is not None
    assert cfg.teacher.checkpoint is None
    assert cfg.rollout.weight_sync.method == "disk"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"teacher": {"engine": "sglang"}}, "engine: sglang needs `servers: {urls: ...}`; start them with `bpdg serve"),
        ({"teacher": {"engine": "megatron"}}, "engine: megatron needs `checkpoint`"),
        (
            {"teacher": {"checkpoint": "t", "servers": {"urls": ["http://t:1"]}}},
            "engine: megatron does not use servers: remove it",
        ),
        (
            {"teacher": {"engine": "sglang", "servers": {"urls": ["http://t:1"]}, "offload": True}},
            "engine: sglang does not use offload",
        ),
        ({"rollout": {"engine": "sglang"}}, "engine: sglang needs `servers: {urls: ...}`"),
        ({"rollout": {"servers": {"urls": ["http://s:1"]}}}, "engine: embedded does not use servers"),
        ({"rollout": {"weight_sync": {"method": "tensor"}}}, "engine: embedded does not use weight_sync"),
        (
            {"rollout": {"engine": "sglang", "servers": {"urls": ["http://s:1"]}, "batch_size": 4}},
            "engine: sglang does not use batch_size",
        ),
        (
            {"rollout": {"engine": "sglang", "servers": {"urls": ["http://t:1/"]}}},
            "http://t:1 is in teacher.servers and in rollout.servers",
        ),
        (
            {
                "rollout": {
                    "engine": "sglang",
                    "servers": {"urls": ["http://router:1"]},
                    "weight_sync": {"urls": ["http://t:1"]},
                }
            },
            "http://t:1 is in teacher.servers and in rollout.servers",
        ),
        ({"objective": {"name": "forward_kl"}}, "objective.name: forward_kl needs the teacher's whole distribution"),
        ({"rollout": {"engine": "sglang", "servers": {"urls": []}}}, "at least 1 item"),
        # It would go on with caches of the old weights.
        ({"rollout": SERVED["rollout"] | {"weight_sync": {"pause": "in_place"}}}, "should be 'retract' or 'abort'"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("{", r"\{").replace("...", ".*")):
        checked(config(**changes))


def test_a_served_teacher_at_another_temperature_is_for_renormalised_supports() -> None:
    rollout = SERVED["rollout"] | {"sampling": {"temperature": 0.7}}
    checked(config(rollout=rollout))
    for objective in ({"name": "sampled_token"}, {"name": "lsm", "outside": "tail_bucket"}):
        with pytest.raises(
            ValueError, match=r"temperature = 0\.7 with teacher.engine: sglang: servers score given tokens"
        ):
            checked(config(rollout=rollout, objective=objective))


@pytest.mark.parametrize("head", ["chunked", "fused"])
def test_a_head_without_logits_has_no_sum_over_the_vocabulary(head: str) -> None:
    here = {"teacher": {"checkpoint": "teacher"}, "training": {"head": head}}
    checked(config(**here))
    with pytest.raises(
        ValueError, match=rf"training\.head: {head} never makes the logits, and objective\.name: jsd is"
    ):
        checked(config(**here, objective={"name": "jsd"}))
