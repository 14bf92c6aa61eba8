"""Which tokens end a response: one rule for the sampler, whichever engine samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = ("config.json", "generation_config.json")


def end_ids(folder: Path, tokenizer: Any, owner: str) -> tuple[int, ...]:
    """Every id that ends a response, ascending: the tokenizer's, config.json's and generation_config.json's together.

    The union, as SGLang takes it. Chat models name several: where one is missed, a response runs on to the limit, and
    everything after its real end is trained on.

    Args:
        folder: HF directory, or a checkpoint's hf folder.
        tokenizer: HF tokenizer.
        owner: whose they are, for messages.

    Raises:
        ValueError: there is none, or a file names something else than ids of the vocabulary.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for file in (folder / name for name in _FILES):
        if not file.is_file():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a JSON object: {error}") from error
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if bad := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
            raise ValueError(f"{file}: eos_token_id {bad[0]!r} should be a token id, or a list of them")
        found |= set(ids)
    if not found:
        raise ValueError(
            f"{owner} names no token that ends a response: set eos_token in tokenizer_config.json, or eos_token_id in "
            "generation_config.json"
        )
    return tuple(sorted(found))
