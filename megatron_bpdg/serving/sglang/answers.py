"""SGLang's answers to `/generate`, checked and made into tensors; `ask_scores` asks for those about given text.

The server's log-probs of *sampled* tokens are over the full vocabulary at the sampling temperature; top-p and top-k do
not change them. Those of *given* tokens (a prompt, or a response to be scored) are at temperature 1, always.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AliasGenerator, AliasPath, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor

from megatron_bpdg.serving.http.client import MalformedAnswer, Server, ServerError


class CutShort(ServerError):
    """The server ended a response at a limit of its own, before the one that was asked for."""


@dataclass(frozen=True)
class Generated:
    """Sampled tokens of one request. R = sampled tokens.

    Attributes:
        ids: sampled tokens, the end-of-sequence token included.
        logprobs_R: their log-probs, float32.
        finish: "stop" (ended by itself), "length" (hit the limit) or "abort" (cut off by somebody).
        spans: (weight version, first token, end) in order; without per-token versions, None.
        version: the server's weight version when it answered.
    """

    ids: list[int]
    logprobs_R: Tensor
    finish: str
    spans: list[tuple[str, int, int]] | None
    version: str


@dataclass(frozen=True)
class Scored:
    """What a model says about given tokens. R = scored tokens, K = support size.

    Attributes:
        logprobs_R: log-probs of the tokens, float32.
        support_RK, support_logprobs_RK: the K most likely ids (int32, likeliest first) and their log-probs (float32);
            None where none were asked for.
        version: the server's weight version.
    """

    logprobs_R: Tensor
    support_RK: Tensor | None
    support_logprobs_RK: Tensor | None
    version: str


# Log-prob, id, and the text of the id, which is null unless asked for.
_Pairs = list[tuple[float | None, int, Any]]
_Base64 = Annotated[bytes, BeforeValidator(lambda text: base64.b64decode(str(text), validate=True))]


class _Span(BaseModel, strict=True):
    version: str
    start: int
    end: int


class _Sampled(BaseModel, strict=True):
    ids: list[int] = Field(validation_alias="output_ids")
    pairs: _Pairs = Field(validation_alias=AliasPath("meta_info", "output_token_logprobs"))
    finish: Literal["stop", "length", "abort"] = Field(validation_alias=AliasPath("meta_info", "finish_reason", "type"))
    version: str = Field(validation_alias=AliasPath("meta_info", "weight_version"))
    spans: list[_Span] | None = Field(None, validation_alias=AliasPath("meta_info", "weight_versions"))


class _Given(
    BaseModel, strict=True, alias_generator=AliasGenerator(validation_alias=lambda name: AliasPath("meta_info", name))
):
    input_token_logprobs: _Pairs
    weight_version: str


class _GivenAndTop(_Given):
    input_top_logprobs_shape: list[int]
    input_top_logprobs_null_prefix: Literal[1]
    input_top_logprobs_idx_flat_b64: _Base64
    input_top_logprobs_idx_flat_b64_dtype: Literal["int32"]
    input_top_logprobs_val_flat_b64: _Base64
    input_top_logprobs_val_flat_b64_dtype: Literal["float32"]


_PLAIN, _WITH_TOP = TypeAdapter(list[_Given]), TypeAdapter(list[_GivenAndTop])


def read_generated(content: bytes, *, prompt: int, max_new_tokens: int, vocab_size: int, where: str) -> Generated:
    """Parse the answer to one sampling request with `return_logprob`.

    Args:
        prompt: length of the text that was gone on with, in tokens.

    Raises:
        CutShort: the server has less room than prompt and response need.
        MalformedAnswer: what is missing, or does not fit what was asked for.
    """
    with _refusing(where):
        answer = _Sampled.model_validate_json(content)
        ids, finish = answer.ids, answer.finish
        if len(answer.pairs) != len(ids):
            raise ValueError(f"{len(ids)} tokens but {len(answer.pairs)} log-probs")
        if len(ids) > max_new_tokens:
            raise ValueError(f"{len(ids)} tokens, more than the {max_new_tokens} asked for")
        if finish == "length" and len(ids) < max_new_tokens:
            raise CutShort(
                f"{where}: asked for up to {max_new_tokens} tokens after {prompt}, the server stopped after "
                f"{len(ids)}: it has room for {prompt + len(ids)} tokens in one request; raise its --context-length "
                "or --max-total-tokens, or lower max_new_tokens"
            )
        if not ids and finish != "abort":
            raise ValueError(f"no tokens, yet finished by {finish!r}")
        _check_ids(ids, vocab_size)
        logprobs_R = _logprobs(answer.pairs, ids)
        spans = None if answer.spans is None else [(span.version, span.start, span.end) for span in answer.spans]
        edges = [0, *(end for _, _, end in spans or [])]
        if spans is not None and (
            [start for _, start, _ in spans] != edges[:-1] or edges[-1] != len(ids) or edges != sorted(edges)
        ):
            raise ValueError(f"weight_versions {spans} do not cover the {len(ids)} tokens")
    return Generated(ids, logprobs_R, finish, spans, answer.version)


async def ask_scores(
    server: Server, texts: Sequence[tuple[list[int], list[int]]], *, top_k: int, vocab_size: int
) -> list[Scored]:
    """Scores of the second parts of texts given the first, in one request.

    Raises:
        ServerError: see `Server.post`; MalformedAnswer where a length differs from what was sent.
    """
    body = {
        "input_ids": [given + scored for given, scored in texts],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": [len(given) - 1 for given, _ in texts],
    }
    if top_k:
        body |= {
            "top_logprobs_num": top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    content = await server.post_raw("/generate", body)
    scored = [ids for _, ids in texts]
    return read_scored(content, scored, top_k=top_k, vocab_size=vocab_size, where=f"{server.url}/generate")


def read_scored(content: bytes, texts: Sequence[list[int]], *, top_k: int, vocab_size: int, where: str) -> list[Scored]:
    """Parse the answer to a batch of texts: ``logprob_start_len`` one before the first of the scored ids.

    Args:
        texts: the scored ids of each.

    Raises:
        MalformedAnswer: what is missing, or does not fit what was asked for.
    """
    with _refusing(where):
        answers = (_WITH_TOP if top_k else _PLAIN).validate_json(content)
        if len(answers) != len(texts):
            raise ValueError(f"{len(answers)} answers, expected {len(texts)}")
        return [_scored(answer, ids, top_k, vocab_size) for answer, ids in zip(answers, texts)]


def _scored(answer: _Given, ids: list[int], top_k: int, vocab_size: int) -> Scored:
    pairs = answer.input_token_logprobs
    if len(pairs) != len(ids) + 1:
        raise ValueError(
            f"{len(pairs) - 1} log-probs for {len(ids)} tokens: the server cut or did not see the whole text"
        )
    # The first entry belongs to the token before the response and has no value.
    # SGLang 0.5.23 names the last id of the vocabulary 0 here, and gives its log-prob all the same.
    logprobs_R = _logprobs(pairs[1:], ids, zero=vocab_size - 1)
    if not isinstance(answer, _GivenAndTop):
        return Scored(logprobs_R, None, None, answer.weight_version)
    if answer.input_top_logprobs_shape != [len(ids), top_k]:
        raise ValueError(f"top log-probs of shape {answer.input_top_logprobs_shape}, expected [{len(ids)}, {top_k}]")
    support_RK = _array(answer.input_top_logprobs_idx_flat_b64, "int32", len(ids), top_k)
    support_logprobs_RK = _array(answer.input_top_logprobs_val_flat_b64, "float32", len(ids), top_k)
    if not bool(support_logprobs_RK.isfinite().all()):
        raise ValueError("a top log-prob is not finite")
    _check_ids([int(support_RK.min()), int(support_RK.max())], vocab_size)
    return Scored(logprobs_R, support_RK, support_logprobs_RK, answer.weight_version)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """What is wrong inside becomes a MalformedAnswer that names the place."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "the answer"
        found = "" if first["type"] == "missing" else f", found {first['input']!r:.200}"
        raise MalformedAnswer(f"{where}: {name}: {first['msg']}{found}") from error
    except ValueError as error:
        raise MalformedAnswer(f"{where}: {error}") from error


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary of {vocab_size}")


def _logprobs(pairs: _Pairs, ids: list[int], zero: int | None = None) -> Tensor:
    """Values of the pairs, whose ids must be `ids`; that of the token `zero` may be 0."""
    for position, (pair, token) in enumerate(zip(pairs, ids)):
        if pair[0] is None or pair[1] not in ((token, 0) if token == zero else (token,)):
            raise ValueError(f"log-prob {position} is {list(pair)}, for token {token}")
    logprobs_R = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    if not bool(logprobs_R.isfinite().all()):
        raise ValueError("a log-prob is not finite: the server's weights or dtype are broken")
    return logprobs_R


def _array(raw: bytes, dtype: str, rows: int, columns: int) -> Tensor:
    if len(raw) != 4 * rows * columns:
        raise ValueError(f"top log-probs have {len(raw)} bytes of {dtype}, expected {4 * rows * columns}")
    # A bytearray is writable, which torch asks for.
    return torch.from_numpy(np.frombuffer(bytearray(raw), dtype=np.dtype(dtype).newbyteorder("<"))).view(rows, columns)
