"""SGLang's answers to `/generate`, checked and made into tensors.

The server's log-probs of *sampled* tokens are over the full vocabulary at the sampling temperature; top-p and top-k do
not change them. Those of *given* tokens (a prompt, or a response to be scored) are at temperature 1, always.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bpdg.serving.http.client import MalformedAnswer, ServerError


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


def read_generated(answer: Any, *, prompt: int, max_new_tokens: int, vocab_size: int, where: str) -> Generated:
    """Parse the answer to one sampling request with `return_logprob`.

    Args:
        prompt: length of the text that was gone on with, in tokens.

    Raises:
        CutShort: the server has less room than prompt and response need.
        MalformedAnswer: what is missing, or does not fit what was asked for.
    """
    fail = _Failure(where)
    meta = fail.member(answer, "meta_info", dict)
    ids = fail.member(answer, "output_ids", list)
    pairs = fail.member(meta, "output_token_logprobs", list)
    finish = fail.member(fail.member(meta, "finish_reason", dict), "type", str)
    if finish not in ("stop", "length", "abort"):
        fail(f"finish_reason.type is {finish!r}")
    if len(pairs) != len(ids):
        fail(f"{len(ids)} tokens but {len(pairs)} log-probs")
    if len(ids) > max_new_tokens:
        fail(f"{len(ids)} tokens, more than the {max_new_tokens} asked for")
    if finish == "length" and len(ids) < max_new_tokens:
        raise CutShort(
            f"{where}: asked for up to {max_new_tokens} tokens after {prompt}, the server stopped after {len(ids)}: it "
            f"has room for {prompt + len(ids)} tokens in one request; raise its --context-length or "
            "--max-total-tokens, or lower max_new_tokens"
        )
    if not ids and finish != "abort":
        fail(f"no tokens, yet finished by {finish!r}")
    _check_ids(ids, vocab_size, fail)
    logprobs_R = _logprobs(pairs, ids, fail)
    return Generated(ids, logprobs_R, finish, _spans(meta, len(ids), fail), fail.member(meta, "weight_version", str))


def read_scored(answer: Any, *, ids: list[int], top_k: int, vocab_size: int, where: str) -> Scored:
    """Parse the answer to one scoring request: ``logprob_start_len`` one before the first of the scored `ids`.

    Raises:
        MalformedAnswer: what is missing, or does not fit what was asked for.
    """
    fail = _Failure(where)
    meta = fail.member(answer, "meta_info", dict)
    pairs = fail.member(meta, "input_token_logprobs", list)
    if len(pairs) != len(ids) + 1:
        fail(f"{len(pairs) - 1} log-probs for {len(ids)} tokens: the server cut or did not see the whole text")
    # The first entry belongs to the token before the response and has no value.
    # SGLang 0.5.23 names the last id of the vocabulary 0 here, and gives its log-prob all the same.
    logprobs_R = _logprobs(pairs[1:], ids, fail, zero=vocab_size - 1)
    support_RK = support_logprobs_RK = None
    if top_k:
        shape, skipped = meta.get("input_top_logprobs_shape"), meta.get("input_top_logprobs_null_prefix")
        if shape != [len(ids), top_k] or skipped != 1:
            fail(f"top log-probs of shape {shape} after {skipped} positions, expected [{len(ids)}, {top_k}] after 1")
        support_RK = _array(meta, "input_top_logprobs_idx_flat_b64", "int32", len(ids), top_k, fail)
        support_logprobs_RK = _array(meta, "input_top_logprobs_val_flat_b64", "float32", len(ids), top_k, fail)
        if not bool(support_logprobs_RK.isfinite().all()):
            fail("a top log-prob is not finite")
        _check_ids([int(support_RK.min()), int(support_RK.max())], vocab_size, fail)
    return Scored(logprobs_R, support_RK, support_logprobs_RK, fail.member(meta, "weight_version", str))


class _Failure:
    """Raises MalformedAnswer with the place it happened."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, problem: str) -> None:
        raise MalformedAnswer(f"{self.where}: {problem}")

    def member(self, value: Any, name: str, kind: type) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get(name), kind):
            found = (
                type(value.get(name)).__name__ if isinstance(value, dict) else f"an answer of {type(value).__name__}"
            )
            self(f"`{name}` should be a {kind.__name__}, found {found}")
        return value[name]


def _check_ids(ids: list[int], vocab_size: int, fail: _Failure) -> None:
    if bad := [token for token in ids if not isinstance(token, int) or not 0 <= token < vocab_size]:
        fail(f"token id {bad[0]!r} is outside the vocabulary of {vocab_size}")


def _logprobs(pairs: list[Any], ids: list[int], fail: _Failure, zero: int | None = None) -> Tensor:
    """Values of ``[log-prob, id, text]`` entries, whose ids must be `ids`; that of the token `zero` may be 0."""
    for position, (entry, token) in enumerate(zip(pairs, ids)):
        names = (token, 0) if token == zero else (token,)
        if (
            not isinstance(entry, list)
            or len(entry) < 2
            or entry[1] not in names
            or not isinstance(entry[0], float | int)
        ):
            fail(f"log-prob {position} is {entry!r}, for token {token}")
    logprobs_R = torch.tensor([float(entry[0]) for entry in pairs], dtype=torch.float32)
    if not bool(logprobs_R.isfinite().all()):
        fail("a log-prob is not finite: the server's weights or dtype are broken")
    return logprobs_R


def _spans(meta: dict[str, Any], length: int, fail: _Failure) -> list[tuple[str, int, int]] | None:
    raw = meta.get("weight_versions")
    if raw is None:
        return None
    try:
        spans = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in raw]
    except (KeyError, TypeError, ValueError):
        fail(f"weight_versions is {raw!r}")
    edges = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != edges[:-1] or edges[-1] != length or edges != sorted(edges):
        fail(f"weight_versions {spans} do not cover the {length} tokens")
    return spans


def _array(meta: dict[str, Any], name: str, dtype: str, rows: int, columns: int, fail: _Failure) -> Tensor:
    text = fail.member(meta, name, str)
    if meta.get(f"{name}_dtype") != dtype:
        fail(f"{name} is of type {meta.get(f'{name}_dtype')!r}, expected {dtype}")
    try:
        # A bytearray is writable, which torch asks for.
        raw = bytearray(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise MalformedAnswer(f"{fail.where}: {name} is not base64") from error
    if len(raw) != 4 * rows * columns:
        fail(f"{name} has {len(raw)} bytes, expected {4 * rows * columns}")
    return torch.from_numpy(np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))).view(rows, columns)
