import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bpdg.evaluation.benchmark import EVAL_FILE, EvalResult, append_eval, read_evals

RESULT = EvalResult("aimé24", 10, 4, ["a", "b", "c"], [0, 1, 4], 0.25, 17.5)


def test_pass_at() -> None:
    assert RESULT.pass_at(1).value == pytest.approx(5 / 12)
    value, low, high = RESULT.pass_at(2)
    assert value == 0.5
    assert low < 0.5 < high
    with pytest.raises(ValueError, match="pass@5 of 4"):
        RESULT.pass_at(5)


def read(run: Path, record: dict[str, Any]) -> list[EvalResult]:
    (run / EVAL_FILE).write_text(json.dumps(record) + "\n")
    return read_evals(run)


def test_json_round_trip(tmp_path: Path) -> None:
    append_eval(tmp_path, RESULT)
    (line,) = (tmp_path / EVAL_FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == asdict(RESULT)
    assert "aimé24" in line
    assert read(tmp_path, asdict(RESULT)) == [RESULT]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": [0, 1]}, "3 problem_ids and 2 counts"),
        ({"problem_ids": [], "correct": []}, "0 problem_ids"),
        ({"problem_ids": ["a", "a", "c"]}, "twice"),
        ({"correct": [0, 5, -1]}, r"\[5, -1\], outside 0\.\.4"),
        ({"samples": 0}, "samples = 0"),
        ({"step": -1}, "step"),
        ({"truncated_fraction": 1.5}, "truncated_fraction = 1.5"),
        ({"truncated_fraction": math.nan}, "truncated_fraction = nan"),
        ({"mean_response_tokens": math.inf}, "mean_response_tokens = inf"),
    ],
)
def test_fields_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"'aimé24'.*{message}"):
        replace(RESULT, **changes)


@pytest.mark.parametrize("changes", [{"step": "10"}, {"correct": [0, 1.5, 2]}, {"correct": 3}, {"extra": 1}])
def test_json_that_does_not_fit(tmp_path: Path, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        read(tmp_path, {**asdict(RESULT), **changes})


def test_json_that_lacks_a_field(tmp_path: Path) -> None:
    record = asdict(RESULT)
    del record["samples"]
    with pytest.raises(ValueError, match="samples"):
        read(tmp_path, record)


def test_file_keeps_what_was_written(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    assert read_evals(run) == []
    later = replace(RESULT, step=20)
    append_eval(run, RESULT)
    before = (run / EVAL_FILE).read_bytes()
    append_eval(run, later)
    assert (run / EVAL_FILE).read_bytes().startswith(before)
    assert read_evals(run) == [RESULT, later]


def test_unfinished_last_line_is_left_out_and_replaced(tmp_path: Path) -> None:
    append_eval(tmp_path, RESULT)
    with (tmp_path / EVAL_FILE).open("a") as stream:
        stream.write('{"benchmark": "aim')
    assert read_evals(tmp_path) == [RESULT]
    append_eval(tmp_path, RESULT)
    assert read_evals(tmp_path) == [RESULT, RESULT]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    append_eval(tmp_path, RESULT)
    with (tmp_path / EVAL_FILE).open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(ValueError, match=rf"(?s){EVAL_FILE}:2: .*remove or repair"):
        read_evals(tmp_path)
