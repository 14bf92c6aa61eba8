"""Prompts and how answers to them are graded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_bpdg.config.section import Section
from megatron_bpdg.config.user import ByName, UserClass


class BuiltInGrader(Section):
    """A grader that comes with the program."""

    name: Literal["math_verify", "exact"]


def _named(value: Any) -> Any:
    """A bare name is short for a section with nothing else."""
    return {"name": value} if isinstance(value, str) else value


GraderConfig = Annotated[BuiltInGrader | UserClass, ByName()]


class Data(Section):
    """Prompts: parquet (DAPO layout) or JSONL."""

    train: Path = Field(description="training prompts (.parquet or .jsonl); for kind: sft, lines with `response`")
    chat_template: bool = Field(True, description="render messages with the tokenizer's chat template")
    enable_thinking: bool | None = Field(None, description="passed to the chat template where it knows the switch")
    max_prompt_tokens: int = Field(2048, ge=1)
    overlong_prompts: Literal["error", "drop", "truncate_left"] = Field(
        "error", description="what to do with prompts over max_prompt_tokens; drops are counted and logged"
    )
    grader: Annotated[
        GraderConfig,
        BeforeValidator(_named, json_schema_input_type=str | GraderConfig),
    ] = Field(
        BuiltInGrader(name="math_verify"),
        description="math_verify | exact | module:function, or {name: module:Class, args: {...}}",
    )
