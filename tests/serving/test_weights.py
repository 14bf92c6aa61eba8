"""All three ways of sending weights, from a Megatron trainer into real SGLang servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.rollout import WeightSync
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.serving.http.client import Server
from megatron_bpdg.serving.sglang.answers import ask_scores
from megatron_bpdg.serving.sglang.weights import WeightSyncError, build_weight_sync
from megatron_bpdg.serving.sglang.weights.base import Weights
from megatron_bpdg.teacher.megatron import score
from tests.integration.miniature import VOCAB, Miniature
from tests.parallel.spawn import run_ranks
from tests.serving.parts import Trainer, trainer

METHODS = ["disk", "tensor", "distributed"]
TEXT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1, 0]


def served(url: str) -> tuple[Tensor, str]:
    """What a server says about the text, and the version of its weights."""

    async def ask() -> tuple[Tensor, str]:
        async with Server(url, 600.0) as server:
            (scored,) = await ask_scores(server, [(TEXT[:1], TEXT[1:])], top_k=0, vocab_size=VOCAB)
            return scored.logprobs_R, await server.weight_version()

    return asyncio.run(ask())


def ours(student: Trainer) -> Tensor:
    """What the trainer says about the text; collective."""
    text = Trajectory(0, 0, TEXT[:1], TEXT[1:], torch.zeros(len(TEXT) - 1), finished=True)
    text.block_R = torch.zeros(len(TEXT) - 1, dtype=torch.int64)
    ((_, scores),) = score(student.policy, [[text]], TeacherNeeds(), 1.0)
    return scores["logprobs"]


def push(
    checkpoint: Path, output: Path, urls: list[str], method: str, layout: Layout, factors: list[float]
) -> list[tuple[float, str]]:
    """Push once per factor; how far the first server then is from the trainer, and its version. On every rank."""
    results = []
    with trainer(checkpoint, output, layout) as student:
        sync = build_weight_sync(WeightSync(method=method, bucket_mb=1), output)  # type: ignore[arg-type]
        sync.bucket_bytes = 5000  # type: ignore[attr-defined]
        for number, factor in enumerate(factors):
            student.change(factor)
            expected = ours(student)
            sync.push(student.weights, f"v-{number}", urls)
            distances = []
            for url in urls:
                found, version = served(url)
                distances.append(float((found - expected).abs().max()))
            results.append((max(distances), version))
            dist.barrier()
        sync.close()
    return results


@pytest.mark.parametrize("method", METHODS)
def test_servers_say_what_the_trainer_says(
    miniature: Miniature, student_server: Any, other_server: Any, tmp_path: Path, method: str
) -> None:
    urls = [student_server.url, other_server.url]
    results = push(miniature.student, tmp_path, urls, method, Layout(), [0.9, 1.2, 1.0])
    assert [version for _, version in results] == ["v-0", "v-1", "v-2"]
    assert max(distance for distance, _ in results) < 1e-4
    if method == "disk":
        assert sorted(path.name for path in (tmp_path / "sampler_weights").iterdir()) == ["v-1", "v-2"]


@pytest.mark.parametrize("method", METHODS)
def test_from_tensor_and_pipeline_parallel_ranks(
    miniature: Miniature, student_server: Any, tmp_path: Path, method: str
) -> None:
    layout = Layout(tensor_parallel=2, sequence_parallel=True)
    results = run_ranks(push, 2, miniature.student, tmp_path, [student_server.url], method, layout, [0.8, 1.1])
    for rank in results:
        assert [version for _, version in rank] == ["v-0", "v-1"]
        assert max(distance for distance, _ in rank) < 1e-4


@pytest.mark.parametrize("pause", ["retract", "abort"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_sampled_from_what_the_old_weights_computed(
    miniature: Miniature, student_server: Any, tmp_path: Path, method: str, pause: str
) -> None:
    async def cached() -> int:
        body = {"input_ids": TEXT, "sampling_params": {"max_new_tokens": 1}}
        async with Server(student_server.url, 600.0) as server:
            return int((await server.post("/generate", body))["meta_info"]["cached_tokens"])

    with trainer(miniature.student, tmp_path) as student:
        sync = build_weight_sync(WeightSync(method=method, pause=pause), tmp_path)  # type: ignore[arg-type]
        asyncio.run(cached())
        assert asyncio.run(cached()) > 0
        sync.push(student.weights, "new", [student_server.url])
        assert asyncio.run(cached()) == 0
        sync.close()


class Nowhere:
    """Weights that are not where they say they have been saved."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights)

    def save(self, path: Path) -> None:
        path.mkdir(parents=True)


def test_a_refused_update_names_the_server_and_leaves_it_able_to_serve(
    miniature: Miniature, student_server: Any, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        sync = build_weight_sync(WeightSync(), tmp_path)
        with pytest.raises(WeightSyncError, match=student_server.url) as caught:
            sync.push(Nowhere(student.weights), "broken", [student_server.url])
        assert list(caught.value.failed) == [student_server.url]
        # It is not left paused, and the next update goes through.
        sync.push(student.weights, "whole", [student_server.url])
        found, version = served(student_server.url)
        assert version == "whole"
        torch.testing.assert_close(found, ours(student), rtol=0, atol=1e-4)
        sync.close()


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_a_server_left_in_the_middle_of_an_update_by_a_trainer_that_died(
    miniature: Miniature, student_server: Any, tmp_path: Path, method: str
) -> None:
    async def leave_open() -> None:
        async with Server(student_server.url, 600.0) as server:
            await server.post("/begin_weight_update", {})

    with trainer(miniature.student, tmp_path) as student:
        asyncio.run(leave_open())
        sync = build_weight_sync(WeightSync(method=method), tmp_path)  # type: ignore[arg-type]
        sync.push(student.weights, "next", [student_server.url])
        assert served(student_server.url)[1] == "next"
        sync.close()


class Killing:
    """Weights on whose way a server is killed."""

    def __init__(self, weights: Weights, victim: Any) -> None:
        self.weights, self.victim = weights, victim

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(self.weights):
            if number == 5 and self.victim is not None:
                self.victim.kill9()
                self.victim = None
            yield pair

    def save(self, path: Path) -> None:
        raise AssertionError("not for the disk")


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_a_server_killed_in_the_middle_of_an_update(
    miniature: Miniature, student_server: Any, other_server: Any, tmp_path: Path, method: str
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        sync = build_weight_sync(WeightSync(method=method, timeout_s=60), tmp_path)  # type: ignore[arg-type]
        sync.bucket_bytes = 5000  # type: ignore[attr-defined]
        student.change(0.9)
        urls = [other_server.url, student_server.url]
        with pytest.raises(WeightSyncError, match=other_server.url) as caught:
            sync.push(Killing(student.weights, other_server), "killed", urls)
        assert list(caught.value.failed) == [other_server.url]
        found, version = served(student_server.url)
        assert version == "killed"
        torch.testing.assert_close(found, ours(student), rtol=0, atol=1e-4)
        # Started again, it takes the next update together with the other one.
        other_server.restart()
        student.change(1.1)
        sync.push(student.weights, "next", urls)
        for url in urls:
            found, version = served(url)
            assert version == "next"
            torch.testing.assert_close(found, ours(student), rtol=0, atol=1e-4)
        sync.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_server_does_not_keep_the_others_from_their_weights(
    miniature: Miniature, student_server: Any, tmp_path: Path, method: str
) -> None:
    dead = "http://127.0.0.1:9"
    with trainer(miniature.student, tmp_path) as student:
        sync = build_weight_sync(WeightSync(method=method), tmp_path)  # type: ignore[arg-type]
        student.change(0.95)
        with pytest.raises(WeightSyncError, match=dead) as caught:
            sync.push(student.weights, "one-dead", [dead, student_server.url])
        assert list(caught.value.failed) == [dead]
        found, version = served(student_server.url)
        assert version == "one-dead"
        torch.testing.assert_close(found, ours(student), rtol=0, atol=1e-4)
        sync.close()
