import json
import random
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from megatron_bpdg.data.arithmetic import ALPHABET, ArithmeticTask, make_arithmetic
from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.data.graders import grade_exact
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.models.shape import ModelShape


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_known_trace() -> None:
    assert ArithmeticTask().solve("37+8-55+99=") == "37+8=45\n45-55=90\n90+99=89\n#89"


def test_traces_reexecute_and_follow_the_prompt() -> None:
    task, rng = ArithmeticTask(min_operands=4, max_operands=6, operand_digits=2), random.Random(1)
    lengths = set()
    for _ in range(500):
        prompt = task.sample_prompt(rng)
        *steps, last = task.solve(prompt).split("\n")
        # The left-hand sides, chained, must spell the prompt; each right-hand side must be what Python computes.
        value, rebuilt = prompt[:2], prompt[:2]
        for step in steps:
            left, right = step.split("=")
            assert left.startswith(value)
            rebuilt += left.removeprefix(value)
            assert int(right) == eval(left) % 100
            value = right
        assert rebuilt + "=" == prompt
        assert last == f"#{eval(prompt[:-1]) % 100}"
        lengths.add(len(steps))
    assert lengths == {4, 5, 6}


def test_dataset_files(tmp_path: Path) -> None:
    make_arithmetic(tmp_path, seed=3, num_train=300, num_test=50)
    train, test, sft = (read(tmp_path / f"{name}.jsonl") for name in ("train", "test", "sft"))
    assert (len(train), len(test)) == (300, 50)
    prompts = [row["prompt"] for row in train + test]
    assert len(set(prompts)) == 350
    assert len({row["id"] for row in train + test}) == 350
    assert [(row["id"], row["prompt"]) for row in sft] == [(row["id"], row["prompt"]) for row in train]
    assert all(grade_exact(row["response"], problem["answer"]) for row, problem in zip(sft, train))
    assert all(int(row["answer"]) == eval(row["prompt"][:-1]) % 100 for row in test)


def test_every_second_trace_goes_on_from_a_slip(tmp_path: Path) -> None:
    make_arithmetic(tmp_path, seed=3, num_train=30, num_test=5)
    traces, recoveries = read(tmp_path / "sft.jsonl"), read(tmp_path / "sft_recovery.jsonl")
    assert recoveries[::2] == traces[::2]
    for trace, recovery in zip(traces[1::2], recoveries[1::2], strict=True):
        assert recovery["id"] == f"{trace['id']}-slip"
        *right, slip = recovery["prompt"].removeprefix(trace["prompt"]).splitlines()
        assert trace["response"].startswith("".join(f"{line}\n" for line in right))
        left, wrong = slip.split("=")
        assert int(wrong) != eval(left) % 100
        for line in recovery["response"].splitlines()[:-1]:
            left, result = line.split("=")
            assert left.startswith(wrong)
            assert int(result) == eval(left) % 100
            wrong = result
        assert recovery["response"].endswith(f"#{wrong}")


def test_same_seed_same_bytes_other_seed_other_prompts(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_arithmetic(tmp_path / name, seed=seed, num_train=40, num_test=10)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["train.jsonl"] != third["train.jsonl"]
    assert not [name for name in first if name.endswith(".tmp")]


def test_no_overlap_in_a_crowded_space(tmp_path: Path) -> None:
    task = ArithmeticTask(min_operands=1, max_operands=1, operand_digits=1, value_digits=1)
    assert task.num_prompts == 9 * 18
    make_arithmetic(tmp_path, seed=0, num_train=60, num_test=21, task=task)
    rows = read(tmp_path / "train.jsonl") + read(tmp_path / "test.jsonl")
    assert len({row["prompt"] for row in rows}) == 81
    with pytest.raises(ValueError, match="exceeds half of the 162"):
        make_arithmetic(tmp_path, seed=0, num_train=60, num_test=22, task=task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"min_operands": 0}, "min_operands"), ({"min_operands": 7}, "exceeds max_operands"), ({"value_digits": 0}, "va")],
)
def test_bad_task(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArithmeticTask(**fields)


@pytest.mark.parametrize("prompt", ["37=", "37+8", "+8=", "3 +8=", "37*8="])
def test_bad_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="chain"):
        ArithmeticTask().solve(prompt)


def test_tokenizer_round_trip_from_disk(tmp_path: Path) -> None:
    make_arithmetic(tmp_path, seed=0, num_train=20, num_test=5)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    for row in read(tmp_path / "sft.jsonl"):
        for text in (row["prompt"], row["response"]):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 2 + len(ALPHABET) == 17
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode([*tokenizer.encode("#4"), 1, 0], skip_special_tokens=True) == "#4"
    assert tokenizer.encode("\n\n") == [16, 16]


def test_tokenizer_survives_a_qwen3_config_beside_it(tmp_path: Path) -> None:
    """Exported checkpoints carry both in one directory."""
    build_char_tokenizer(ALPHABET).save_pretrained(str(tmp_path))
    Qwen3Config(num_hidden_layers=2, hidden_size=64, vocab_size=17).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert tokenizer.decode(tokenizer.encode("1+2=3\n#3")) == "1+2=3\n#3"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_tokenizer_refuses_other_characters() -> None:
    with pytest.raises(Exception, match=r"unk|UNK"):
        build_char_tokenizer(ALPHABET).encode("1*2")
    with pytest.raises(ValueError, match="distinct"):
        build_char_tokenizer("aab")


@pytest.mark.parametrize(("model", "tied"), [("teacher", False), ("student", True)])
def test_the_model_shapes_are_read_alike_by_us_and_transformers(tmp_path: Path, model: str, tied: bool) -> None:
    make_arithmetic(tmp_path, 0, 20, 5)
    ours = ModelShape.from_hf(read_hf_config(tmp_path / model))
    theirs = AutoConfig.from_pretrained(str(tmp_path / model))
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.tie_word_embeddings, theirs.tie_word_embeddings) == (tied, tied)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 1e6
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
