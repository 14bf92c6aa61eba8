"""What a server may answer: right answers become tensors, every kind of wrong one is refused with the reason."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_bpdg.serving.http.client import MalformedAnswer
from megatron_bpdg.serving.sglang.answers import CutShort, read_generated, read_scored

GENERATED: dict[str, Any] = {
    "output_ids": [5, 6, 1],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 1},
        "weight_version": "b",
        "weight_versions": [{"version": "a", "start": 0, "end": 2}, {"version": "b", "start": 2, "end": 3}],
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None], [0, 1, None]],
    },
}


def encoded(values: list[list[float]], dtype: str) -> str:
    return base64.b64encode(np.array(values, dtype=dtype).tobytes()).decode()


SCORED: dict[str, Any] = {
    "output_ids": [],
    "meta_info": {
        "weight_version": "default",
        "input_token_logprobs": [[None, 9, None], [-0.25, 5, None], [-3.0, 6, None]],
        "input_top_logprobs_val_flat_b64": encoded([[-0.25, -2.0], [-0.5, -3.0]], "<f4"),
        "input_top_logprobs_idx_flat_b64": encoded([[5, 2], [3, 6]], "<i4"),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": [2, 2],
        "input_top_logprobs_null_prefix": 1,
    },
}


def generated(answer: Any, max_new_tokens: int = 8) -> Any:
    content = json.dumps(answer).encode()
    return read_generated(content, prompt=4, max_new_tokens=max_new_tokens, vocab_size=10, where="http://s/generate")


def scored(answer: Any, top_k: int = 2, ids: tuple[int, int] = (5, 6)) -> Any:
    content = json.dumps([answer]).encode()
    (only,) = read_scored(content, [list(ids)], top_k=top_k, vocab_size=10, where="http://s/generate")
    return only


def test_a_sampled_response() -> None:
    answer = generated(GENERATED)
    assert (answer.ids, answer.finish, answer.version) == ([5, 6, 1], "stop", "b")
    assert answer.logprobs_R.tolist() == [-0.5, -1.5, 0.0]
    assert answer.spans == [("a", 0, 2), ("b", 2, 3)]


def test_servers_without_versions_by_token() -> None:
    answer = copy.deepcopy(GENERATED)
    del answer["meta_info"]["weight_versions"]
    assert generated(answer).spans is None


def test_an_aborted_response_may_be_empty() -> None:
    answer = copy.deepcopy(GENERATED)
    answer["output_ids"], answer["meta_info"]["output_token_logprobs"] = [], []
    answer["meta_info"]["finish_reason"] = {"type": "abort"}
    answer["meta_info"]["weight_versions"] = [{"version": "b", "start": 0, "end": 0}]
    assert (generated(answer).ids, generated(answer).finish) == ([], "abort")


def test_a_response_that_the_server_cut_short() -> None:
    answer = copy.deepcopy(GENERATED)
    answer["meta_info"]["finish_reason"] = {"type": "length", "length": 3}
    assert generated(answer, max_new_tokens=3).finish == "length"
    problem = "asked for up to 5 tokens after 4, the server stopped after 3: it has room for 7 tokens in one request"
    with pytest.raises(CutShort, match=f"http://s/generate: {problem}"):
        generated(answer, max_new_tokens=5)


def test_scores() -> None:
    answer = scored(SCORED)
    assert answer.logprobs_R.tolist() == [-0.25, -3.0]
    assert answer.support_RK.tolist() == [[5, 2], [3, 6]]
    assert answer.support_logprobs_RK.tolist() == [[-0.25, -2.0], [-0.5, -3.0]]
    assert str(answer.support_RK.dtype) == "torch.int32"
    assert scored(SCORED, top_k=0).support_RK is None


def meta(answer: Any) -> Any:
    return answer["meta_info"]


def drop(name: str) -> Callable[[Any], Any]:
    return lambda answer: meta(answer).pop(name)


def put(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda answer: meta(answer).update({name: value})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a.pop("output_ids"), "output_ids: Field required"),
        (lambda a: a["output_ids"].append(4), "4 tokens but 3 log-probs"),
        (lambda a: a["output_ids"].__setitem__(0, 7), r"log-prob 0 is \[-0.5, 5, None\], for token 7"),
        (lambda a: a["output_ids"].__setitem__(0, 10), "token id 10 is outside the vocabulary of 10"),
        (lambda a: a["output_ids"].__setitem__(0, -1), "token id -1 is outside"),
        (lambda a: a["output_ids"].__setitem__(0, "x"), "output_ids.0: Input should be a valid integer, found 'x'"),
        (lambda a: meta(a)["output_token_logprobs"].__setitem__(1, [float("nan"), 6, None]), "not finite"),
        (lambda a: meta(a)["output_token_logprobs"].__setitem__(1, [None, 6, None]), "log-prob 1 is"),
        (
            put("finish_reason", {"type": "dunno"}),
            "meta_info.finish_reason.type: Input should be 'stop', 'length' or 'abort', found 'dunno'",
        ),
        (put("finish_reason", None), "meta_info.finish_reason.type: Field required"),
        (put("weight_version", 3), "meta_info.weight_version: Input should be a valid string, found 3"),
        (put("weight_versions", [{"version": "a", "start": 0, "end": 2}]), "do not cover the 3 tokens"),
        (put("weight_versions", [{"version": "a", "start": 1, "end": 3}]), "do not cover"),
        (put("weight_versions", [{"from": 1}]), "meta_info.weight_versions.0.version: Field required"),
    ],
)
def test_broken_samples(change: Callable[[Any], Any], problem: str) -> None:
    answer = copy.deepcopy(GENERATED)
    change(answer)
    with pytest.raises(MalformedAnswer, match=f"http://s/generate: .*{problem}"):
        generated(answer)


def test_more_tokens_than_asked_for() -> None:
    with pytest.raises(MalformedAnswer, match="3 tokens, more than the 2 asked for"):
        generated(GENERATED, max_new_tokens=2)


def test_an_empty_response_that_claims_to_be_whole() -> None:
    answer = copy.deepcopy(GENERATED)
    answer["output_ids"], meta(answer)["output_token_logprobs"] = [], []
    with pytest.raises(MalformedAnswer, match="no tokens, yet finished by 'stop'"):
        generated(answer)


@pytest.mark.parametrize("answer", [None, [], "text", 3, {}, {"meta_info": []}])
def test_answers_of_another_kind(answer: Any) -> None:
    for read in (generated, scored):
        with pytest.raises(MalformedAnswer, match=r"http://s/generate: .*(Input should be an object|Field required)"):
            read(answer)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: meta(a)["input_token_logprobs"].pop(), "1 log-probs for 2 tokens"),
        (lambda a: meta(a)["input_token_logprobs"].__setitem__(1, [-0.25, 4, None]), "for token 5"),
        (drop("input_top_logprobs_shape"), "meta_info.input_top_logprobs_shape: Field required"),
        (
            put("input_top_logprobs_shape", [2, 3]),
            r"top log-probs of shape \[2, 3\], expected \[2, 2\]",
        ),
        (put("input_top_logprobs_null_prefix", 0), "input_top_logprobs_null_prefix: Input should be 1, found 0"),
        (
            put("input_top_logprobs_val_flat_b64_dtype", "float16"),
            "val_flat_b64_dtype: Input should be 'float32', found 'float16'",
        ),
        (put("input_top_logprobs_idx_flat_b64", "AAAA"), "have 3 bytes of int32, expected 16"),
        (put("input_top_logprobs_idx_flat_b64", "not base64!"), "idx_flat_b64: .* found 'not base64!'"),
        (put("input_top_logprobs_idx_flat_b64", encoded([[5, 2], [3, 10]], "<i4")), "token id 10 is outside"),
        (put("input_top_logprobs_val_flat_b64", encoded([[-1, np.nan], [0, 0]], "<f4")), "not finite"),
    ],
)
def test_broken_scores(change: Callable[[Any], Any], problem: str) -> None:
    answer = copy.deepcopy(SCORED)
    change(answer)
    with pytest.raises(MalformedAnswer, match=problem):
        scored(answer)


def test_the_last_id_of_the_vocabulary_may_be_named_zero_by_the_server() -> None:
    answer = copy.deepcopy(SCORED)
    for name in (9, 0):
        meta(answer)["input_token_logprobs"][2] = [-3.0, name, None]
        assert scored(answer, top_k=0, ids=(5, 9)).logprobs_R.tolist() == [-0.25, -3.0]
    with pytest.raises(MalformedAnswer, match="for token 8"):
        scored(answer, top_k=0, ids=(5, 8))


def test_what_is_no_json_and_what_is_not_the_whole_batch() -> None:
    with pytest.raises(MalformedAnswer, match="http://s/generate: the answer: Invalid JSON: expected value at line 1"):
        read_generated(b"<html>", prompt=4, max_new_tokens=8, vocab_size=10, where="http://s/generate")
    for content, problem in (
        (b"[]", "0 answers, expected 1"),
        (json.dumps(SCORED).encode(), "should be a valid array"),
    ):
        with pytest.raises(MalformedAnswer, match=f"http://s/generate: .*{problem}"):
            read_scored(content, [[5, 6]], top_k=2, vocab_size=10, where="http://s/generate")
