"""The embedded task: chains of additions and subtractions modulo 10^d, worked one step per line.

    prompt    37+8-55=
    response  37+8=45
              45-55=90
              #90

Every line needs only the line before it and the next operand of the prompt, and the modulus keeps the running value in
the range seen in training whatever it is. So a teacher that has learned correct traces still has something to say
after a student's slip: it can go on correctly from the wrong value.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen3Config

from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.tracking.files import replacing

ALPHABET = "0123456789+-=#\n"
_PROMPT = re.compile(r"(\d+)((?:[+-]\d+)+)=")
_OPERAND = re.compile(r"([+-])(\d+)")


@dataclass(frozen=True)
class ArithmeticTask:
    """Difficulty of the chain; by default a short one of one-digit operands, learned in minutes on a laptop.

    Attributes:
        min_operands: fewest additions and subtractions of a prompt; each is one line of the trace.
        max_operands: most of them.
        operand_digits: longest operand. The length is drawn uniformly, then the number; never zero, no leading zeros.
        value_digits: d; running values are taken modulo 10^d, and the start has exactly d digits.
    """

    min_operands: int = 3
    max_operands: int = 4
    operand_digits: int = 1
    value_digits: int = 2

    def __post_init__(self) -> None:
        for name in ("min_operands", "operand_digits", "value_digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"ArithmeticTask.{name} = {getattr(self, name)} must be at least 1")
        if self.min_operands > self.max_operands:
            raise ValueError(
                f"ArithmeticTask.min_operands = {self.min_operands} exceeds max_operands = {self.max_operands}"
            )

    @property
    def modulus(self) -> int:
        return int(10**self.value_digits)

    @property
    def num_prompts(self) -> int:
        """Number of distinct prompts."""
        signed_operands = 2 * (10**self.operand_digits - 1)
        starts = self.modulus - self.modulus // 10
        lengths = range(self.min_operands, self.max_operands + 1)
        return sum(int(starts * signed_operands**length) for length in lengths)

    def sample_prompt(self, rng: random.Random) -> str:
        prompt = str(rng.randrange(self.modulus // 10, self.modulus))
        for _ in range(rng.randint(self.min_operands, self.max_operands)):
            digits = rng.randint(1, self.operand_digits)
            prompt += f"{rng.choice('+-')}{rng.randrange(10 ** (digits - 1), 10**digits)}"
        return f"{prompt}="

    def solve(self, prompt: str) -> str:
        """The worked response, without end-of-sequence; the answer stands after its last '#'.

        Raises:
            ValueError: `prompt` is not of the form `37+8-5=`.
        """
        chain = _PROMPT.fullmatch(prompt)
        if chain is None:
            raise ValueError(f"prompt {prompt!r} is not a chain like '37+8-5='")
        return self._finish(int(chain[1]), _OPERAND.findall(chain[2]))

    def recover(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        """A slip and how to go on from it: (worked lines up to a random wrong result, the right rest).

        The rest is consistent with the wrong value, so its answer is not the prompt's.
        """
        *lines, _ = self.solve(prompt).splitlines(keepends=True)
        slip = rng.randrange(len(lines))
        left, right = lines[slip].rstrip("\n").split("=")
        wrong = (int(right) + rng.randrange(1, self.modulus)) % self.modulus
        rest = self._finish(wrong, _OPERAND.findall(prompt)[slip + 1 :])
        return f"{''.join(lines[:slip])}{left}={wrong}\n", rest

    def _finish(self, value: int, operands: list[tuple[str, str]]) -> str:
        lines = []
        for sign, operand in operands:
            result = (value + int(sign + operand)) % self.modulus
            lines.append(f"{value}{sign}{operand}={result}\n")
            value = result
        return f"{''.join(lines)}#{value}"


def make_arithmetic(
    out_dir: Path, seed: int, num_train: int, num_test: int, task: ArithmeticTask = ArithmeticTask()
) -> None:
    """Write the data of the embedded task and the shapes of its two models; the same arguments give the same bytes.

    Files of `out_dir`: `train.jsonl` and `test.jsonl` with {id, prompt, answer}, no prompt twice within or across them;
    `sft.jsonl` with {id, prompt, response}, the worked traces of the training prompts; `sft_recovery.jsonl`, the same
    with a slip in every second one, put into the prompt so that only the right rest is learned; `tokenizer/`.
    A teacher trained on right traces alone has little to say about a student's mistakes.
    ``teacher/config.json`` describes a 4-layer Qwen3, ``student/config.json`` a narrower one with tied embeddings.

    Raises:
        ValueError: a negative count, or more prompts asked for than half of those the task has.
    """
    total = num_train + num_test
    if num_train < 1 or num_test < 1:
        raise ValueError(f"num_train = {num_train} and num_test = {num_test} must be at least 1")
    # Beyond half of the space, drawing until a new prompt comes up gets slow and the test set means little.
    if 2 * total > task.num_prompts:
        raise ValueError(
            f"num_train + num_test = {total} exceeds half of the {task.num_prompts} prompts of {task}: "
            "ask for fewer or widen the task"
        )
    rng = random.Random(seed)
    drawn: dict[str, str] = {}
    while len(drawn) < total:
        prompt = task.sample_prompt(rng)
        drawn[prompt] = task.solve(prompt)
    traces = list(drawn.items())
    splits = {"train": traces[:num_train], "test": traces[num_train:]}
    files = {
        name: [
            {"id": f"{name}-{index}", "prompt": prompt, "answer": trace.rpartition("#")[2]}
            for index, (prompt, trace) in enumerate(split)
        ]
        for name, split in splits.items()
    }
    files["sft"] = [
        {"id": f"train-{index}", "prompt": prompt, "response": trace}
        for index, (prompt, trace) in enumerate(splits["train"])
    ]
    files["sft_recovery"] = files["sft"].copy()
    for index in range(1, num_train, 2):
        prompt = splits["train"][index][0]
        slip, rest = task.recover(prompt, rng)
        files["sft_recovery"][index] = {"id": f"train-{index}-slip", "prompt": prompt + slip, "response": rest}

    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        with replacing(out_dir / f"{name}.jsonl") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    tokenizer = build_char_tokenizer(ALPHABET)
    tokenizer.save_pretrained(out_dir / "tokenizer")
    for name, hidden, tied in (("teacher", 128, False), ("student", 96, True)):
        Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            num_hidden_layers=4,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).save_pretrained(out_dir / name)
