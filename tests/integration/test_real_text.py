"""The path of real text: DAPO's parquet layout, a BPE tokenizer with a chat template, math-verify, one gated step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_bpdg.config import RunConfig
from megatron_bpdg.data.prompts import encode_prompts, load_problems
from megatron_bpdg.drift.partition import newline_token_ids
from megatron_bpdg.training.loop import distill
from tests.integration.miniature import metrics, read_lines, write_model, write_shape

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QUESTION = (
    "Solve the following math problem step by step.\n\nWhat is ${a}+{b}$?\n\n"
    "Please reason step by step, and put your final answer within \\boxed{{{{}}}}."
)
POSITIONS = 256
LONG_INDEX = 5


def _rows() -> list[dict[str, Any]]:
    rows = []
    for index in range(8):
        a, b = 3 * index + 1, 7 * index + 2
        question = QUESTION.format(a=a, b=b)
        if index == LONG_INDEX:
            question = "Consider the numbers one, two and three. " * 20 + question
        rows.append(
            {
                "data_source": "math_dapo",
                "prompt": [{"content": question, "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(a + b), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": f"00000000-{index:04d}"},
            }
        )
    return rows


def _write_tokenizer(folder: Path) -> Path:
    """Byte-level BPE as Qwen's: whitespace glued to words, several tokens with newlines, ChatML specials."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["prompt"][0]["content"] for row in _rows()] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real_text")
    pq.write_table(pa.Table.from_pylist(_rows()), root / "dapo.parquet")
    tokenizer = _write_tokenizer(root / "tokenizer")
    # As published: more rows in the embedding than the tokenizer has ids.
    vocab = len(AutoTokenizer.from_pretrained(tokenizer)) + 13
    shape = write_shape(root, vocab_size=vocab, max_position_embeddings=POSITIONS)
    for seed, name in enumerate(("student", "teacher")):
        write_model(root / name, shape, tokenizer, seed)
    return root


def _config(root: Path, output: Path, data: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": str(output),
            "student": {"checkpoint": str(root / "student"), "dtype": "float32"},
            "teacher": {"checkpoint": str(root / "teacher"), "dtype": "float32"},
            "data": {"train": str(root / "dapo.parquet"), **data},
            "rollout": {
                "prompts_per_step": 7,
                "samples_per_prompt": 2,
                "sampling": {"top_p": 0.9, "max_new_tokens": 24},
            },
            "objective": {"name": "lsm", "top_k": 32},
            "gate": {"partition": {"name": "newline", "min_size": 4, "max_size": 16}},
            "training": {"steps": 1, "epochs": 2, "micro_batch_size": 4, "lr": 1e-3},
            "logging": {"tensorboard": False},
        }
    )


@pytest.mark.parametrize("overlong", ["drop", "truncate_left"])
def test_one_gated_step_on_the_published_layout(root: Path, tmp_path: Path, overlong: str) -> None:
    cfg = _config(root, tmp_path / "run", {"max_prompt_tokens": 150, "overlong_prompts": overlong})
    distill(cfg)
    (record,) = metrics(tmp_path / "run")
    assert math.isfinite(record["loss/opd"])
    assert record["rollout/reward_mean"] == 0.0  # random weights solve nothing, but math-verify has read all of it
    assert record["mismatch/abs_mean"] < 1e-5  # full-distribution log-probs, although top-p cut the sampling
    first, second = read_lines(tmp_path / "run" / "drift.jsonl")
    assert set(first["abs_drift_by_block"]) == {0.0}
    assert max(second["abs_drift_by_block"]) > 0
    for sample in read_lines(tmp_path / "run" / "samples.jsonl"):
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert "\\boxed{{}}" in sample["prompt"]


def test_overlong_prompts_are_refused_dropped_or_cut(root: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    problems = load_problems(root / "dapo.parquet")
    dropped = encode_prompts(problems, tokenizer, chat_template=True, max_prompt_tokens=150, overlong="drop")
    cut = encode_prompts(problems, tokenizer, chat_template=True, max_prompt_tokens=150, overlong="truncate_left")
    assert (len(dropped.ids), dropped.dropped, dropped.truncated) == (7, 1, 0)
    assert (len(cut.ids), cut.dropped, cut.truncated) == (8, 0, 1)
    assert len(cut.ids[LONG_INDEX]) == 150
    assert tokenizer.decode(cut.ids[LONG_INDEX]).endswith("<|im_start|>assistant\n")  # the end is what counts
    with pytest.raises(ValueError, match=r"1 of 8 prompts exceed data\.max_prompt_tokens = 150.*overlong_prompts"):
        distill(_config(root, tmp_path / "run", {"max_prompt_tokens": 150}))


def test_the_template_s_thinking_switch_reaches_it(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    (problem, *_) = load_problems(root / "dapo.parquet")
    ends = {
        switch: tokenizer.decode(
            encode_prompts(
                [problem], tokenizer, chat_template=True, enable_thinking=switch, max_prompt_tokens=10_000
            ).ids[0]
        )
        for switch in (None, True, False)
    }
    assert ends[None] == ends[True]
    assert ends[False] == ends[None] + "<think>\n\n</think>\n\n"


def test_newline_tokens_of_a_real_kind_of_tokenizer(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    ids = newline_token_ids(tokenizer.decode, len(tokenizer))
    for text in ("\n", "a\n\nb", "x. \n"):
        assert ids & set(tokenizer.encode(text, add_special_tokens=False))
    assert not ids & set(tokenizer.encode("no line ends here", add_special_tokens=False))
