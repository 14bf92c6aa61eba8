"""Run directories as the training loop leaves them, with made-up numbers."""

import json
import math
from pathlib import Path

import numpy as np
import yaml

from megatron_bpdg.tracking.metrics import MetricsLogger

CONFIG = {
    "kind": "opd",
    "output": "runs/demo",
    "seed": 3,
    "layout": {
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "data_parallel": 1,
        "sequence_parallel": True,
        "distributed_optimizer": False,
    },
    "student": {"checkpoint": "runs/student", "dtype": "float32"},
    "teacher": {"engine": "megatron", "checkpoint": "runs/teacher", "dtype": "float32"},
    "data": {"train": "data/train.jsonl"},
    "rollout": {"engine": "embedded", "prompts_per_step": 16, "samples_per_prompt": 8},
    "objective": {"name": "lsm", "top_k": 8, "divergence": "reverse_kl", "outside": "tail_bucket"},
    "gate": {"partition": {"name": "newline", "min_size": 4, "max_size": 64}, "tau": 1.0, "aggregator": "abs_mean"},
    "training": {"steps": 100, "epochs": 2, "minibatches": 4, "lr": 1e-3},
    "evaluation": {"every": 25, "samples": 8, "k": [1, 8]},
}


def write_evals(directory: Path, steps: list[int], lift: float, problems: int = 100, seed: int = 0) -> None:
    """Eight samples a problem; the chance of success grows linearly to `lift` above its start."""
    rng = np.random.default_rng(seed)
    ease_P = rng.normal(-1.5, 1.2, problems)
    with (directory / "eval.jsonl").open("a") as stream:
        for step in steps:
            chance_P = 1 / (1 + np.exp(-ease_P - lift * step / steps[-1]))
            record = {
                "benchmark": "arithmetic",
                "step": step,
                "samples": 8,
                "problem_ids": [f"test-{index}" for index in range(problems)],
                "correct": rng.binomial(8, chance_P).tolist(),
                "truncated_fraction": 0.01,
                "mean_response_tokens": 44.0,
            }
            stream.write(json.dumps(record) + "\n")


def write_run(
    directory: Path, steps: int = 100, lift: float = 2.5, tau: float = 1.0, seed: int = 0, gated: bool = True
) -> None:
    """A run of two epochs with four updates each, with all the files a run has."""
    directory.mkdir(parents=True)
    config = {**CONFIG, "seed": seed, "gate": {**CONFIG["gate"], "tau": tau} if gated else None}
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rng = np.random.default_rng(seed)
    with MetricsLogger(directory, tensorboard=False, wandb=None, config=config) as logger:
        logger.log(0, {"eval/arithmetic/pass@1": 0.2, "model/student_parameters": 2.2e5})
        for step in range(1, steps + 1):
            logger.log(step, _step_metrics(rng, step / steps, tau, evaluated=step % 25 == 0))
            for update in range(8):
                blocks = int(rng.integers(6, 10))
                drift = 0.04 * update * (1 + np.arange(blocks) / 5) * np.exp(rng.normal(0, 0.3, blocks))
                tokens = (900 * np.exp(-0.12 * np.arange(blocks))).astype(int).tolist()
                logger.log_drift(step, update, update // 4, (drift * (1 - 0.5 * step / steps)).tolist(), tokens)
    write_evals(directory, [*range(0, steps + 1, max(steps // 4, 1))], lift, seed=seed)
    with (directory / "samples.jsonl").open("w") as stream:
        for step in (1, steps):
            for correct, answer in ((True, "89"), (False, "98"), (True, "89"), (False, "<b>7</b>")):
                response = f"37+8=45\n45-55=90\n90+99={answer}\n#{answer}"
                record = {"step": step, "prompt": "37+8-55+99=", "response": response, "correct": correct}
                stream.write(json.dumps(record) + "\n")


def _step_metrics(rng: np.random.Generator, done: float, tau: float, evaluated: bool) -> dict[str, float]:
    noise = rng.normal(0, 1, 8)
    gate = math.exp(-tau * (0.12 - 0.05 * done)) - 0.01 * abs(noise[0])
    return {
        "loss/opd": 0.9 * math.exp(-2 * done) + 0.03 * noise[1] + 0.1,
        "train/grad_norm": 0.8 + 0.15 * abs(noise[2]),
        "train/lr": 1e-3 * min(1.0, 20 * done),
        "train/updates": 8.0,
        "gate/mean": gate,
        "gate/min": gate * 0.55,
        "gate/q05": gate * 0.8,
        "gate/q50": gate * 1.01,
        "gate/q95": min(1.0, gate * 1.1),
        "gate/ess": 0.97 + 0.005 * noise[3],
        "gate/mass": 5000 * gate,
        "drift/abs_mean": 0.3 - 0.1 * done + 0.01 * noise[4],
        "drift/block_mean": 0.12 - 0.05 * done,
        "drift/block_mean_epoch0": 0.08 - 0.03 * done + 0.004 * noise[4],
        "drift/block_mean_epoch1": 0.16 - 0.07 * done + 0.006 * noise[4],
        "drift/cancellation": 0.4 + 0.02 * noise[4],
        "mismatch/abs_mean": 2e-6 * (1 + 0.1 * abs(noise[5])),
        "mismatch/kl": 4e-12 * (1 + 0.1 * abs(noise[5])),
        "rollout/reward_mean": 0.2 + 0.5 * done + 0.03 * noise[6],
        "rollout/response_tokens_mean": 45 + noise[6],
        "rollout/truncated_fraction": max(0.0, 0.05 * (1 - done) + 0.01 * noise[7]),
        "rollout/empty": 0.0,
        "rollout/tokens_per_s": 9000 + 500 * noise[7],
        "teacher/gap_mean": -0.8 * math.exp(-2 * done) + 0.02 * noise[7],
        "actor/entropy": 0.5 * math.exp(-done) + 0.01 * noise[3],
        "time/rollout_s": 0.6 + 0.03 * noise[0],
        "time/teacher_s": 0.1,
        "time/old_logprobs_s": 0.1,
        "time/update_s": 1.2 + 0.05 * noise[1],
        "time/sync_s": 0.05,
        "time/eval_s": 2.0 if evaluated else 0.0,
        "time/step_s": 2.2 + (2.0 if evaluated else 0.0),
    }
