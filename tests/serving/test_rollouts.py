"""Rollouts from a real SGLang server: which distribution its log-probs mean, versions, interruption and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpdg.config.rollout import Sampling
from megatron_bpdg.rollout.engine import Request, Response, generate
from megatron_bpdg.rollout.sampling import sample_seed
from megatron_bpdg.serving.http.pool import ServingError, StaleWeights
from megatron_bpdg.serving.sglang.answers import Generated
from tests.integration.miniature import VOCAB, Miniature
from tests.serving.parts import check_response, hf_logprobs, patience, trainer

PROMPTS = [[3], [4, 5, 6, 7], [8, 9], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


def requests(samples: int = 3) -> list[Request]:
    return [Request(p, sample_seed(0, i, s)) for i, p in enumerate(PROMPTS) for s in range(samples)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=24),
        Sampling(temperature=0.7, top_p=0.6, max_new_tokens=24),
        Sampling(top_p=1e-6, max_new_tokens=12),
    ],
    ids=["plain", "temperature-top-p", "greedy"],
)
def test_sampled_logprobs_are_the_full_distributions(
    miniature: Miniature, student_server: Any, tmp_path: Path, sampling: Sampling
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        with pytest.raises(RuntimeError, match="before load_weights"):
            engine.stream(requests(), sampling)
        student.send(engine, version=3)
        told: list[Response] = []
        responses = generate(engine, requests(), sampling, told.extend)
        engine.close()
    assert len(told) == len(responses) == 12
    for request, response in zip(requests(), responses):
        check_response(miniature.student, request.prompt_ids, response, sampling.temperature)
        assert response.version_R.tolist() == [3] * len(response.ids)
        assert not response.cut_off
        assert response.finished == (response.ids[-1] == 1)
        assert response.finished or len(response.ids) == sampling.max_new_tokens
        logprobs_RV = hf_logprobs(miniature.student, request.prompt_ids, response.ids, sampling.temperature)
        # Nothing outside the nucleus was sampled, yet its mass is not missing from the log-probs checked above.
        ordered_RV, order_RV = logprobs_RV.sort(-1, descending=True)
        before_RV = ordered_RV.exp().cumsum(-1) - ordered_RV.exp()
        rank_R = (order_RV == torch.tensor(response.ids)[:, None]).int().argmax(-1)
        assert bool((before_RV.gather(1, rank_R[:, None])[:, 0] < sampling.top_p + 1e-5).all())


def test_responses_end_where_the_trainer_says(miniature: Miniature, student_server: Any, tmp_path: Path) -> None:
    """At every id that it names, also at those of which the server's own files know nothing."""
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url), end_ids=[1, 5, 7])
        student.send(engine, version=1)
        responses = generate(engine, requests(6), Sampling(max_new_tokens=24))
        engine.close()
    for response in responses:
        assert not {1, 5, 7} & set(response.ids[:-1])
        assert response.finished == (response.ids[-1] in (1, 5, 7))
    assert {response.ids[-1] for response in responses if response.finished} >= {5, 7}


def test_interrupted_responses_go_on_where_they_were(miniature: Miniature, student_server: Any, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=48)
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url, concurrency=4))
        student.send(engine, version=1)
        asked = requests(12)
        stream = engine.stream(asked, sampling)
        done = dict(next(iter(stream)))
        left = dict(stream.interrupt())
        assert sorted([*done, *left]) == list(range(len(asked))), "a response was lost or came twice"
        assert all(not response.cut_off for response in done.values())
        cut = {index: response for index, response in left.items() if response.cut_off}
        assert cut, "with four at a time, some cannot have begun"
        student.send(engine, version=2)
        again = [Request(asked[i].prompt_ids, asked[i].seed, begun) for i, begun in cut.items()]
        whole = generate(engine, again, sampling)
        engine.close()
    for (index, begun), response in zip(cut.items(), whole):
        assert response.ids[: len(begun.ids)] == begun.ids
        assert response.version_R.tolist() == [1] * len(begun.ids) + [2] * (len(response.ids) - len(begun.ids))
        check_response(miniature.student, asked[index].prompt_ids, response)


def test_ids_outside_the_vocabulary_never_reach_the_server(
    miniature: Miniature, student_server: Any, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        student.send(engine, version=0)
        with pytest.raises(ValueError, match=f"token id {VOCAB}, outside the vocabulary of {VOCAB}"):
            engine.stream([Request([3, VOCAB], 0)], Sampling(max_new_tokens=4))
        engine.close()


def test_a_prompt_too_long_for_the_server_is_refused_once(
    miniature: Miniature, student_server: Any, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        student.send(engine, version=0)
        with pytest.raises(ServingError, match="status 400"):
            generate(engine, [Request([3] * 100, 0)], Sampling(max_new_tokens=4))
        engine.close()


def test_a_response_that_the_server_has_no_room_for_is_not_taken_for_whole(
    miniature: Miniature, student_server: Any, tmp_path: Path
) -> None:
    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        student.send(engine, version=0)
        # The likeliest tokens, which never end by themselves here. SGLang takes two less than the 64 positions.
        asked = [Request([3, 4], 0)]
        assert len(generate(engine, asked, Sampling(top_p=1e-6, max_new_tokens=60))[0].ids) == 60
        with pytest.raises(ServingError, match="after 2, the server stopped after 60: it has room for 62 tokens in"):
            generate(engine, asked, Sampling(top_p=1e-6, max_new_tokens=61))
        engine.close()


def test_versions_by_token_and_without(miniature: Miniature, student_server: Any, tmp_path: Path) -> None:
    def answer(spans: list[tuple[str, int, int]] | None, version: str) -> Generated:
        return Generated([5, 6, 7], torch.zeros(3), "stop", spans, version)

    with trainer(miniature.student, tmp_path) as student:
        engine = student.engine(patience(student_server.url))
        engine.version = 5
        four, five, six = (engine.wire_version(step) for step in (4, 5, 6))
        assert engine._versions(answer([(five, 0, 3)], five), 5, "s").tolist() == [5, 5, 5]
        assert engine._versions(answer([(four, 0, 1), (five, 1, 3)], five), 4, "s").tolist() == [4, 5, 5]
        # A server that does not tell token by token: all may be of the weights from before.
        assert engine._versions(answer(None, five), 4, "s").tolist() == [4, 4, 4]
        for wrong in ("default", four, six, f"other-{5}", ""):
            with pytest.raises(StaleWeights, match="s: sampled by weights"):
                engine._versions(answer([(wrong, 0, 3)], wrong), 5, "s")
        engine.close()
