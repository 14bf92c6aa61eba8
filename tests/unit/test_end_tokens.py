"""Which tokens end a response: the union of what a checkpoint's files and its tokenizer say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.data.end_tokens import end_ids


def write(folder: Path, **files: Any) -> Path:
    for name, eos in files.items():
        (folder / f"{name}.json").write_text(json.dumps({} if eos is ... else {"eos_token_id": eos}))
    return folder


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, (1,)),
        ({"config": 7}, (1, 7)),
        ({"config": None, "generation_config": [9, 1, 4]}, (1, 4, 9)),
        ({"config": [3, 2], "generation_config": 2}, (1, 2, 3)),
        ({"config": ..., "generation_config": []}, (1,)),
    ],
)
def test_the_union(tmp_path: Path, files: dict[str, Any], ids: tuple[int, ...]) -> None:
    assert end_ids(write(tmp_path, **files), build_char_tokenizer("ab"), "student") == ids


@pytest.mark.parametrize("bad", ["7", 7.0, True, -1, [1, None], [[1]], 2**40])
def test_what_is_no_id_is_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id .* should be a token id, or a list"):
        end_ids(write(tmp_path, generation_config=bad), build_char_tokenizer("ab"), "student")


def test_none_at_all_and_files_that_are_none(tmp_path: Path) -> None:
    endless = build_char_tokenizer("ab")
    endless.eos_token = None
    with pytest.raises(ValueError, match="student names no token that ends a response: set eos_token in"):
        end_ids(tmp_path, endless, "student")
    assert end_ids(write(tmp_path, config=5), endless, "student") == (5,)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
            end_ids(tmp_path, endless, "student")
