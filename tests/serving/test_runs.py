"""Whole runs on real servers: the same teacher signal as in process, and a run that outlives its servers' death."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.config import RunConfig
from megatron_bpdg.serving.http.pool import ServingError
from megatron_bpdg.training.loop import distill
from tests.integration.miniature import Miniature, metrics, read_lines
from tests.serving.conftest import DEADLINE_S
from tests.serving.parts import patience


def servers(*urls: str, **changes: Any) -> dict[str, Any]:
    return patience(*urls, **changes).model_dump(mode="json")


def sampled_by(server: Any, **changes: Any) -> dict[str, Any]:
    return {"rollout": {"engine": "sglang", "servers": servers(server.url), **changes}}


def taught_by(server: Any) -> dict[str, Any]:
    return {"teacher": {"engine": "sglang", "servers": servers(server.url)}}


def config(miniature: Miniature, output: Path, *layers: dict[str, Any]) -> RunConfig:
    raw = miniature.raw(output, {"objective": {"name": "lsm", "top_k": 6}, "gate": {"tau": 1.0}})
    for layer in layers:
        for section, values in layer.items():
            if values.get("engine") == "sglang" and section == "teacher":
                raw[section] = values
            elif values.get("engine") == "sglang":
                raw[section] = {k: v for k, v in raw[section].items() if k != "batch_size"} | values
            else:
                raw[section] = {**raw.get(section, {}), **values}
    return RunConfig.model_validate(raw)


@pytest.mark.parametrize("objective", ["lsm", "sampled_token"])
def test_a_served_teacher_trains_the_same_student(
    miniature: Miniature, teacher_server: Any, tmp_path: Path, objective: str
) -> None:
    layer: dict[str, Any] = {"objective": {"name": objective} if objective != "lsm" else {}}
    runs = {}
    for name, teacher in (("here", {}), ("served", taught_by(teacher_server))):
        raw = config(miniature, tmp_path / name, teacher).model_dump(mode="json")
        if objective != "lsm":
            raw["objective"] = layer["objective"]
        distill(RunConfig.model_validate(raw))
        runs[name] = metrics(tmp_path / name)
    assert len(runs["here"]) == len(runs["served"]) == 2
    for here, served in zip(runs["here"], runs["served"]):
        assert here.keys() == served.keys()
        for key, value in here.items():
            if isinstance(value, float):
                assert served[key] == pytest.approx(value, rel=2e-3, abs=1e-4), key


def test_both_on_servers_at_tensor_parallelism_2_from_the_command_line(
    miniature: Miniature, student_server: Any, teacher_server: Any, tmp_path: Path
) -> None:
    import yaml

    cfg = config(
        miniature,
        tmp_path / "run",
        sampled_by(student_server, weight_sync={"method": "distributed"}),
        taught_by(teacher_server),
        {"layout": {"tensor_parallel": 2, "sequence_parallel": True}},
        {"evaluation": {"data": {"a": str(miniature.task / "test.jsonl")}, "samples": 2, "k": [1]}},
        {"evaluation": {"sampling": {"max_new_tokens": 16}}},
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bpdg.cli", "train", str(file)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "Unclosed" not in done.stderr
    for record in metrics(tmp_path / "run"):
        # Two servers, two ranks, one student: the log-probs agree to float32.
        assert record["mismatch/abs_mean"] < 2e-5
        assert record["rollout/version_lag_mean"] == 0
        assert record["rollout/retries"] == 0
    assert [line["step"] for line in read_lines(tmp_path / "run" / "eval.jsonl")] == [0, 2]


def test_partial_rollouts(miniature: Miniature, student_server: Any, tmp_path: Path) -> None:
    rollout = sampled_by(student_server, extra_prompts=2)
    distill(config(miniature, tmp_path / "run", rollout, {"training": {"steps": 4, "epochs": 1, "minibatches": 1}}))
    records = metrics(tmp_path / "run")
    assert len(records) == 4
    assert len(list((tmp_path / "run" / "sampler_weights").iterdir())) == 2
    assert all(record["rollout/version_lag_mean"] >= 0 for record in records)
    assert all(record.get("mismatch/abs_mean", 0) < 2e-5 for record in records)


@pytest.mark.parametrize("role", ["rollout", "teacher", "evaluation"])
def test_a_run_that_a_server_has_no_room_for_is_refused_at_the_start(
    miniature: Miniature, student_server: Any, teacher_server: Any, tmp_path: Path, role: str
) -> None:
    server = teacher_server if role == "teacher" else student_server
    longest = max(len(line["prompt"]) for line in read_lines(miniature.task / "train.jsonl"))
    # SGLang refuses 58 tokens of 64.
    sampling = {"sampling": {"max_new_tokens": 58 - longest}}
    layers = {
        "rollout": [sampled_by(server, **sampling)],
        "teacher": [taught_by(server), {"rollout": sampling}],
        "evaluation": [
            sampled_by(server),
            {"evaluation": {"data": {"a": str(miniature.task / "train.jsonl")}, "k": [1], **sampling}},
        ],
    }[role]
    section = "evaluation" if role == "evaluation" else "rollout"
    problem = (
        f"{section}.sampling.max_new_tokens = {58 - longest} after a prompt of {longest} tokens exceeds the 57 tokens"
    )
    with pytest.raises(ValueError, match=f"{problem} that {server.url} has room for"):
        distill(config(miniature, tmp_path / "run", *layers))


def test_a_teacher_that_is_the_student_is_said_to_be(
    miniature: Miniature, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = {"teacher": {"checkpoint": str(miniature.student)}, "training": {"steps": 1, "epochs": 1, "minibatches": 1}}
    distill(config(miniature, tmp_path / "run", same))
    assert "the teacher's log-probs equal the student's own" in capfd.readouterr().err.replace("\n", " ")


def test_a_run_goes_on_when_its_only_sampler_is_killed(miniature: Miniature, other_server: Any, tmp_path: Path) -> None:
    cfg = config(
        miniature,
        tmp_path / "run",
        sampled_by(other_server),
        {"training": {"steps": 12, "epochs": 1, "minibatches": 1}},
    )
    killed: list[int] = []

    def kill_and_restart() -> None:
        while len(metrics_so_far()) < 3:
            time.sleep(0.02)
        other_server.kill9()
        killed.append(len(metrics_so_far()))
        other_server.restart()

    def metrics_so_far() -> list[Any]:
        return metrics(cfg.output) if (cfg.output / "metrics.jsonl").exists() else []

    watcher = threading.Thread(target=kill_and_restart)
    watcher.start()
    distill(cfg)
    watcher.join()
    records = metrics(cfg.output)
    assert killed[0] < 12, "it was killed too late to matter"
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert record["rollout/empty"] == 0
        assert record["mismatch/abs_mean"] < 2e-5


def test_a_run_says_so_when_its_sampler_stays_away(miniature: Miniature, tmp_path: Path) -> None:
    gone = {"rollout": {"engine": "sglang", "servers": servers("http://127.0.0.1:9", recovery_s=1.0)}}
    with pytest.raises(ServingError, match="no engine took the weights of step 0"):
        distill(config(miniature, tmp_path / "run", gone))
