"""A teacher behind a real SGLang server says what the same weights say in the trainer's processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.config.teacher import Teacher
from megatron_bpdg.data.trajectory import Trajectory
from megatron_bpdg.drift.partition import FixedBlocks
from megatron_bpdg.objectives.objective import TeacherNeeds
from megatron_bpdg.serving.http.pool import ServingError
from megatron_bpdg.teacher.megatron import MegatronTeacher
from megatron_bpdg.teacher.sglang import SGLangTeacher
from tests.integration.miniature import VOCAB, Miniature
from tests.parallel.spawn import run_ranks
from tests.serving.parts import patience, trainer

K = 5


def responses(count: int = 6) -> list[Trajectory]:
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        prompt = torch.randint(VOCAB, (1 + index % 4,), generator=generator).tolist()
        response = torch.randint(VOCAB, (1 + 3 * index,), generator=generator).tolist()
        trajectory = Trajectory(index, 0, prompt, response, torch.full((len(response),), -1.0), True, index=index)
        trajectory.block_R = FixedBlocks(4)(torch.tensor(response))
        made.append(trajectory)
    return made


def config(*urls: str, **changes: Any) -> Teacher:
    return Teacher(engine="sglang", servers=patience(*urls), **changes)


def payloads(trajectories: list[Trajectory]) -> list[tuple[Any, Any, Any]]:
    return [
        (t.teacher_logprobs_R, t.teacher_support_RK, t.teacher_support_logprobs_RK)
        for t in trajectories
        if t.teacher_logprobs_R is not None
    ]


def score_both(
    checkpoint: Path, url: str, layout: Layout, temperature: float, changes: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """Payloads of the server and of the same weights in process, on this rank."""
    needs = TeacherNeeds(top_k=K)
    with trainer(checkpoint, Path(), layout) as model:
        mesh = model.policy.mesh
        served = SGLangTeacher(config(url, **changes), needs, temperature, vocab_size=VOCAB, mesh=mesh)
        ours, theirs = responses(), responses()

        def mine(batch: list[Trajectory]) -> list[list[Trajectory]]:
            share = [t for t in batch if mesh.owns(t.index)]
            return [share[:2], share[2:]]

        # Half of them have been asked about early.
        served.prefetch(theirs[:3])
        served.score(mine(theirs))
        served.close()
        MegatronTeacher(model.policy, needs, temperature, offload=False).score(mine(ours))
    return payloads(theirs), payloads(ours)


def check_equal(theirs: list[Any], ours: list[Any], temperature: float = 1.0, atol: float = 1e-4) -> None:
    assert len(theirs) == len(ours) > 0
    for (logprobs_R, support_RK, values_RK), (expected_R, expected_RK, expected_values_RK) in zip(theirs, ours):
        assert support_RK.dtype == torch.int32
        torch.testing.assert_close(support_RK, expected_RK, rtol=0, atol=0)
        if temperature != 1.0:
            # Only up to each position's normaliser.
            shift_R = (logprobs_R - expected_R)[:, None]
            torch.testing.assert_close(values_RK - shift_R, expected_values_RK, rtol=0, atol=atol)
            continue
        torch.testing.assert_close(logprobs_R.float(), expected_R, rtol=0, atol=atol)
        torch.testing.assert_close(values_RK.float(), expected_values_RK, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_same_as_in_process(miniature: Miniature, teacher_server: Any, temperature: float) -> None:
    theirs, ours = score_both(miniature.teacher, teacher_server.url, Layout(), temperature, {"tokens_per_request": 20})
    check_equal(theirs, ours, temperature)
    assert len(ours) == 6


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor_parallel=2, sequence_parallel=True),
        Layout(data_parallel=2),
        Layout(context_parallel=2),
        Layout(pipeline_parallel=2),
    ],
    ids=["tp2", "dp2", "cp2", "pp2"],
)
def test_every_rank_that_needs_it_gets_the_payload(miniature: Miniature, teacher_server: Any, layout: Layout) -> None:
    results = run_ranks(score_both, 2, miniature.teacher, teacher_server.url, layout, 1.0, {})
    held = [len(ours) for _, ours in results]
    assert held == ([3, 3] if layout.data_parallel > 1 else [0, 6] if layout.pipeline_parallel > 1 else [6, 6])
    for theirs, ours in results:
        assert len(theirs) == len(ours)
        if ours:
            check_equal(theirs, ours)


@pytest.mark.parametrize(("name", "atol"), [("bfloat16", 0.04), ("float16", 0.005)])
def test_narrow_payloads(miniature: Miniature, teacher_server: Any, name: str, atol: float) -> None:
    theirs, ours = score_both(miniature.teacher, teacher_server.url, Layout(), 1.0, {"payload_dtype": name})
    assert {values.dtype for _, _, values in theirs} == {getattr(torch, name)}
    check_equal(theirs, ours, atol=atol)


def test_servers_of_different_weights_are_told_apart(
    miniature: Miniature, student_server: Any, teacher_server: Any
) -> None:
    with (
        trainer(miniature.teacher, Path()) as model,
        pytest.raises(ServingError, match="do not serve the same weights"),
    ):
        SGLangTeacher(
            config(teacher_server.url, student_server.url),
            TeacherNeeds(top_k=K),
            1.0,
            vocab_size=VOCAB,
            mesh=model.policy.mesh,
        )


def test_a_teacher_whose_weights_change_stops_the_run(miniature: Miniature, teacher_server: Any) -> None:
    with trainer(miniature.teacher, Path()) as model:
        teacher = SGLangTeacher(
            config(teacher_server.url), TeacherNeeds(top_k=K), 1.0, vocab_size=VOCAB, mesh=model.policy.mesh
        )
        teacher._version = "yesterday's"
        with pytest.raises(ServingError, match="a teacher's weights must not change"):
            teacher.score([responses()])
        teacher.close()


def test_an_unreachable_teacher(miniature: Miniature) -> None:
    with (
        trainer(miniature.teacher, Path()) as model,
        pytest.raises(ServingError, match="not every server can be asked"),
    ):
        SGLangTeacher(
            config("http://127.0.0.1:9"), TeacherNeeds(top_k=K), 1.0, vocab_size=VOCAB, mesh=model.policy.mesh
        )


def test_another_tokenizer_is_refused(miniature: Miniature, teacher_server: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniature.teacher, local_files_only=True)
    with trainer(miniature.teacher, Path()) as model:
        teacher = SGLangTeacher(
            config(teacher_server.url), TeacherNeeds(top_k=K), 1.0, vocab_size=VOCAB, mesh=model.policy.mesh
        )
        teacher.check_tokenizer(tokenizer)

        class Shifted:
            """The same words under other ids."""

            def __len__(self) -> int:
                return len(tokenizer)

            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer, name)

            def decode(self, ids: list[int], **options: Any) -> str:
                return str(tokenizer.decode([(token + 1) % len(tokenizer) for token in ids], **options))

        with pytest.raises(ValueError, match=r"teacher\.servers: .*tokenizer"):
            teacher.check_tokenizer(Shifted())
        teacher.close()
