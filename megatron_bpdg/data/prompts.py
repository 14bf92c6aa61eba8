"""Problems from files, and their prompts as token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_bpdg.data.records import (
    DataError,
    FieldError,
    Row,
    name_field,
    read_records,
    section_field,
    text_field,
)

# Note that DAPO-Math-17k as published already ends its prompts with this sentence, with doubled braces: \boxed{{}}.
BOXED_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."
_CONTENT_FIELDS = ("problem", "prompt", "messages")
# What other programs put into the prompt from beside the messages; here it would get lost.
_NOT_RENDERED = ("tools", "functions", "documents", "system", "system_prompt", "instruction", "input", "images")
# Around a message's number in a trial rendering: private characters, which no template writes by itself.
_MARK, _MARK_END = "\ue000", "\ue001"


@dataclass(frozen=True)
class Problem:
    """One problem: its id, unique in its file, the conversation up to the response, and the answer for the grader.

    A plain text is a single message of the user; without a chat template its content is the prompt as it is.
    """

    id: str
    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Prompts:
    """Problems that are kept, `ids[i]` the prompt of `problems[i]`, and how many were dropped or cut for length."""

    problems: list[Problem] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class SupervisedExample:
    """A prompt and the response to learn, end-of-sequence included, as token ids."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]


def load_problems(path: Path) -> list[Problem]:
    r"""Read problems in file order.

    Layouts:
        .parquet: that of DAPO-Math-17k: `prompt` (list of {role, content}), `reward_model.ground_truth`,
            `data_source`, `extra_info.index`. The id is ``data_source/index``. Contents are left as they are, the
            doubled braces ``\boxed{{}}`` of the published file included.
        .jsonl: one {id, answer} a line with the content as one of `problem` (the bare statement, which gets
            `BOXED_SUFFIX`), `prompt` (a complete text, or a list of messages) and `messages`.

    Raises:
        DataError: naming the rows and fields that are malformed, and ids given twice.
        FileNotFoundError: there is no such file.
    """
    return read_records(path, _dapo_problem if path.suffix == ".parquet" else _json_problem)


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    chat_template: bool,
    enable_thinking: bool | None = None,
    max_prompt_tokens: int,
    overlong: Literal["error", "drop", "truncate_left"] = "error",
) -> Prompts:
    """Render and tokenize the prompts.

    Args:
        problems: as of `load_problems`.
        tokenizer: HF tokenizer. Special tokens come from the chat template alone, none are added.
        chat_template: render conversations up to where the assistant's turn begins; otherwise use plain texts as they
            are.
        enable_thinking: handed to the template unless None.
        max_prompt_tokens: longest prompt in tokens.
        overlong: what to do beyond that: refuse, leave the problem out, or keep the last `max_prompt_tokens` tokens.

    Raises:
        DataError: a prompt cannot be rendered or is empty; prompts are too long and `overlong` is "error", or none
            would be left.
    """
    kept: list[Problem] = []
    ids: list[list[int]] = []
    overlong_lengths: dict[str, int] = {}
    for problem in problems:
        prompt_ids = _encode(problem, tokenizer, chat_template, enable_thinking)
        if len(prompt_ids) > max_prompt_tokens:
            overlong_lengths[problem.id] = len(prompt_ids)
            if overlong != "truncate_left":
                continue
            prompt_ids = prompt_ids[-max_prompt_tokens:]
        kept.append(problem)
        ids.append(prompt_ids)
    if overlong_lengths and (overlong == "error" or not kept):
        longest = max(overlong_lengths, key=overlong_lengths.__getitem__)
        raise DataError(
            f"{len(overlong_lengths)} of {len(problems)} prompts exceed data.max_prompt_tokens = {max_prompt_tokens}; "
            f"the longest is {longest!r} with {overlong_lengths[longest]} tokens. "
            "Raise the limit, or set data.overlong_prompts to drop or truncate_left"
        )
    truncated = len(overlong_lengths) if overlong == "truncate_left" else 0
    return Prompts(kept, ids, dropped=len(problems) - len(kept), truncated=truncated)


def load_sft(path: Path, tokenizer: Any, *, chat_template: bool = False) -> list[SupervisedExample]:
    """Read supervised examples: JSONL lines {id, prompt, response}.

    The prompt is encoded like a plain text of `encode_prompts`, the response by itself, then end-of-sequence.

    Raises:
        DataError: naming the rows and fields that are malformed, and ids given twice.
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: supervised examples are read from .jsonl only")
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to learn; set eos_token in tokenizer_config.json")

    def parse(row: Row) -> tuple[str, SupervisedExample]:
        name, prompt, response = name_field(row, "id"), text_field(row, "prompt"), text_field(row, "response")
        prompt_ids = _encode(Problem(name, _from_user(prompt), ""), tokenizer, chat_template, None)
        response_ids = _tokenize(response, tokenizer, name)
        return name, SupervisedExample(name, prompt_ids, [*response_ids, eos_id])

    return read_records(path, parse)


def _dapo_problem(row: Row) -> tuple[str, Problem]:
    source = text_field(row, "data_source")
    name = f"{source}/{name_field(section_field(row, 'extra_info'), 'index', 'extra_info.')}"
    answer = name_field(section_field(row, "reward_model"), "ground_truth", "reward_model.")
    return name, Problem(name, _messages(row.get("prompt"), "prompt"), answer)


def _json_problem(row: Row) -> tuple[str, Problem]:
    name, answer = name_field(row, "id"), name_field(row, "answer")
    given = [key for key in _CONTENT_FIELDS if key in row]
    if len(given) != 1:
        raise FieldError(f"should have one of {', '.join(_CONTENT_FIELDS)}; has {' and '.join(given) or 'none'}")
    if lost := [other for other in _NOT_RENDERED if row.get(other)]:
        raise FieldError(f"{', '.join(lost)} would not reach the prompt: put the text into the messages, or remove it")
    (key,) = given
    if key == "messages" or isinstance(row[key], list):
        return name, Problem(name, _messages(row[key], key), answer)
    text = text_field(row, key)
    return name, Problem(name, _from_user(f"{text} {BOXED_SUFFIX}" if key == "problem" else text), answer)


def _from_user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _messages(value: object, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise FieldError(f"{name} should be a list of messages {{role, content}}, at least one")
    messages = []
    for index, message in enumerate(value):
        owner = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise FieldError(f"{owner} should be a record {{role, content}}")
        if lost := [key for key, entry in message.items() if entry and key not in ("role", "content")]:
            raise FieldError(f"{owner}.{lost[0]} would not reach the prompt: put it into the content, or remove it")
        if message.get("role") == "system" and message.get("content") == "":
            messages.append({"role": "system", "content": ""})
            continue
        messages.append({key: text_field(message, key, f"{owner}.") for key in ("role", "content")})
    if messages[-1]["role"] == "assistant":
        raise FieldError(f"{name} ends with the assistant's message; the response should come after the user's")
    return messages


def _encode(problem: Problem, tokenizer: Any, chat_template: bool, enable_thinking: bool | None) -> list[int]:
    if chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template: set data.chat_template to false, or give a tokenizer that has one"
            )
        return _encode_chat(problem, tokenizer, {} if enable_thinking is None else {"enable_thinking": enable_thinking})
    if [message["role"] for message in problem.messages] != ["user"]:
        raise DataError(
            f"problem {problem.id!r} is a conversation, which data.chat_template = false cannot render; "
            "set it to true or give plain prompts"
        )
    return _tokenize(problem.messages[0]["content"], tokenizer, problem.id)


def _encode_chat(problem: Problem, tokenizer: Any, switch: dict[str, bool]) -> list[int]:
    def render(contents: Sequence[str]) -> str:
        messages = [{**message, "content": text} for message, text in zip(problem.messages, contents)]
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch))
        except Exception as error:  # templates may raise anything
            raise DataError(f"problem {problem.id!r}: the chat template refuses it ({error})") from error

    contents = [message["content"] for message in problem.messages]
    marked = render([f"{_MARK}{place}{_MARK_END}" for place in range(len(contents))])
    for place, message in enumerate(problem.messages):
        if contents[place] and marked.count(f"{_MARK}{place}{_MARK_END}") != 1:
            raise DataError(
                f"problem {problem.id!r}: message {place}, of role {message['role']!r}, would not reach the prompt: "
                "the chat template does not render such a role there; use the roles that it knows"
            )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in text for token in special for text in contents):
        return _tokenize(render(contents), tokenizer, problem.id)
    # A text that holds "<|im_end|>" must not end the user's turn: control tokens come from the template alone.
    ids: list[int] = []
    for part in re.split(f"({_MARK}\\d+{_MARK_END})", marked):
        if part.startswith(_MARK):
            text = contents[int(part[1:-1])]
            ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
        elif part:
            ids += _tokenize(part, tokenizer, problem.id)
    return ids


def _tokenize(text: str, tokenizer: Any, name: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"problem {name!r}: the tokenizer refuses {text!r:.60} ({error})") from error
    if not ids:
        raise DataError(f"problem {name!r}: {text!r:.60} has no tokens")
    return ids
