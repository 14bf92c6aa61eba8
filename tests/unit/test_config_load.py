import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.config import ConfigError, RunConfig, check_paths, dump_config, json_schema, load_config
from megatron_bpdg.config.objective import SampledToken, TeacherTopK
from megatron_bpdg.config.training import Training
from megatron_bpdg.config.weights import Fixed, Newline
from megatron_bpdg.config.yaml_text import dump_yaml, parse_yaml

MINIMAL = """\
output: runs/one
student: {checkpoint: student}
teacher: {checkpoint: teacher}
data: {train: train.jsonl}
objective: {name: lsm}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_text


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert all(f"  - {problem}" in message for problem in caught.value.problems)
    return caught.value.problems


def test_minimal_file_gets_the_defaults(write: Any) -> None:
    cfg = load_config(write(MINIMAL))
    assert cfg.output == Path("runs/one")
    assert cfg.objective == TeacherTopK(name="lsm")
    assert cfg.gate is None
    assert cfg.training.lr == 2e-6


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E6", 1e6), ("2.e+3", 2e3), (".5e1", 5.0), ("-1e-2", -0.01), ("2e-06", 2e-6), ("3.5", 3.5)],
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: float) -> None:
    assert parse_yaml(text) == value
    assert isinstance(parse_yaml(text), float)


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "0x1e-6z", "'1e-6'", "v1e-6"])
def test_texts_that_resemble_numbers_stay_texts(text: str) -> None:
    assert isinstance(parse_yaml(text), str)


def test_overrides(write: Any) -> None:
    path = write(MINIMAL + "gate: {partition: {name: fixed, size: 8}}\n")
    cfg = load_config(
        path,
        ["training.lr=1e-6", "gate.partition.size=32", "evaluation.k=[1, 4]", "evaluation.data.math=m.jsonl", "seed=7"],
    )
    assert cfg.training.lr == 1e-6
    assert cfg.gate is not None
    assert cfg.gate.partition == Fixed(name="fixed", size=32)
    assert (cfg.evaluation.k, cfg.evaluation.data, cfg.seed) == ([1, 4], {"math": Path("m.jsonl")}, 7)
    assert load_config(path, ["gate=null"]).gate is None
    swapped = load_config(path, ["gate.partition={name: newline}", "objective={name: sampled_token, clip: 0.3}"])
    assert swapped.gate is not None
    assert swapped.gate.partition == Newline(name="newline")
    assert swapped.objective == SampledToken(name="sampled_token", clip=0.3)


def test_later_overrides_win(write: Any) -> None:
    assert load_config(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("gate", ["", "gate:\n", "gate: {}\n", "gate: {tau: 1.0}\n"])
def test_an_override_inside_an_absent_variant_changes_its_default(write: Any, gate: str) -> None:
    cfg = load_config(write(MINIMAL + gate), ["gate.partition.size=32"])
    assert cfg.gate is not None
    assert cfg.gate.partition == Fixed(name="fixed", size=32)


def test_malformed_overrides_are_listed_together(write: Any) -> None:
    found = problems(
        write(MINIMAL + "seed: 3\n"), "lr", "seed=", "=1", "a..b=1", "seed.x=1", "seed=[", "training.lr=-1"
    )
    assert len(found) == 7
    for problem, text in zip(found, ["'lr'", "'seed='", "'=1'", "'a..b=1'", "seed = 3 is not a section", "not YAML"]):
        assert text in problem
    assert found[-1] == "training.lr = -1: should be greater than 0"


def test_every_problem_is_listed_with_field_value_and_remedy(write: Any) -> None:
    text = """\
output: runs/one
sedd: 1
student: {checkpoint: s, dtype: float23}
teacher: {}
data: {trian: x, grader: train}
rollout: {temperature: 1.0}
objective: {name: lsm, top_k: 0, clip: 0.3}
gate: {partition: {name: newline, min_size: 9, max_size: 3}, tau: -1}
training: {learning_rate: 3, steps: many}
layout: 4
evaluation:
"""
    assert problems(write(text)) == [
        "layout = 4: should be a section, `field: value` lines",
        "student.dtype = 'float23': should be one of float32, bfloat16; did you mean float32?",
        "teacher: engine: megatron needs `checkpoint`",
        "data.train: required, but not given (training prompts (.parquet or .jsonl); for kind: sft, lines with "
        "`response`)",
        "data.grader.name = 'train': should be one of math_verify, exact, module:Class",
        "data.trian: unknown key; did you mean data.train?",
        "rollout.temperature: unknown key; did you mean rollout.sampling.temperature or "
        "evaluation.sampling.temperature?",
        "objective.top_k = 0: should be greater than or equal to 1",
        f"objective.clip: unknown key; known here: {', '.join(TeacherTopK.model_fields)}",
        "gate.partition: min_size 9 exceeds max_size 3",
        "gate.tau = -1: should be greater than or equal to 0",
        "training.steps = 'many': should be a valid integer, unable to parse string as an integer",
        f"training.learning_rate: unknown key; known here: {', '.join(Training.model_fields)}",
        "evaluation = null: should be a section, `field: value` lines; remove the line for the defaults",
        "sedd: unknown key; did you mean seed?",
    ]


def test_problems_with_the_choice_of_a_variant(write: Any) -> None:
    path = write(MINIMAL)
    assert problems(path, "objective.name=lms") == [
        "objective.name = 'lms': should be one of sampled_token, lsm, forward_kl, reverse_kl, jsd, sft, "
        "module:Class; did you mean lsm?"
    ]
    assert problems(path, "gate={partition: {size: 3}}") == [
        "gate.partition.name: required, but not given; one of fixed, newline, token, sequence, module:Class"
    ]
    assert problems(path, "objective=lsm") == ["objective = 'lsm': should be a section, `field: value` lines"]
    assert problems(path, "objective.name=forward_kl", "objective.jsd_bta=0.1") == [
        "objective.jsd_bta: unknown key; did you mean objective.jsd_beta?"
    ]


def test_conflicts_between_sections(write: Any) -> None:
    assert problems(write(MINIMAL), "teacher=null") == ["kind: opd needs a `teacher` section"]


def test_micro_batches_have_one_measure(write: Any) -> None:
    path = write(MINIMAL)
    assert problems(path, "training.micro_batch_size=2", "training.micro_batch_tokens=4096") == [
        "training: micro_batch_size: 2 and micro_batch_tokens: 4096 exclude each other: remove micro_batch_size to "
        "fill micro-batches by tokens"
    ]
    assert problems(path, "training.micro_batch_tokens=0") == [
        "training.micro_batch_tokens = 0: should be greater than or equal to 1"
    ]


def test_every_way_of_sharing_counts_as_processes(write: Any) -> None:
    layout = "layout={tensor_parallel: 2, pipeline_parallel: 3, context_parallel: 4, data_parallel: 5}"
    assert load_config(write(MINIMAL), [layout]).layout.world_size == 120
    assert problems(write(MINIMAL), "layout={context_parallel: 2, expert_parallel: 4}") == [
        "layout: expert_parallel x expert_tensor_parallel = 4 x 1 = 4 must divide tensor_parallel x context_parallel x "
        "data_parallel = 1 x 2 x 1 = 2: experts are spread over those ranks"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "line 2, column 1: duplicate key 'seed', first given in line 1"),
        ("training:\n  lr: 1\n  steps: 2\n  lr: 3", "line 4, column 3: duplicate key 'lr', first given in line 2"),
        ("{a: 1, a: 2}", "duplicate key 'a'"),
        ("a: [", "line 1, column 5"),
        ("a:\n\tb: 1", "line 2, column 1"),
        ("", "holds nothing"),
        ("- 1", "holds a list"),
        ("a: !!python/object/apply:os.getcwd []", "line 1"),
        ("? {a: 1}\n: 2", "unhashable"),
    ],
)
def test_files_that_are_no_config(write: Any, text: str, message: str) -> None:
    (problem,) = problems(write(text))
    assert message in problem


def test_duplicate_keys_in_an_override(write: Any) -> None:
    assert "duplicate key 'size'" in problems(write(MINIMAL), "gate={partition: {name: fixed, size: 1, size: 2}}")[0]


def test_merge_keys_may_be_overridden() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


def test_unreadable_files(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == ["cannot be read: No such file or directory"]
    (tmp_path / "latin.yaml").write_bytes(b"output: \xff\n")
    assert "utf-8" in problems(tmp_path / "latin.yaml")[0]


def test_dump_round_trip(write: Any) -> None:
    cfg = load_config(
        write(MINIMAL), ["gate.tau=1e-7", "output='1e-6'", "evaluation.data={'on': a.jsonl, b: 'true'}", "seed=5"]
    )
    assert load_config(write(dump_config(cfg))) == cfg


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(SCALARS, lambda leaf: st.lists(leaf) | st.dictionaries(st.text(), leaf), max_leaves=8))
def test_yaml_round_trip(data: Any) -> None:
    assert parse_yaml(dump_yaml({"data": data})) == {"data": data}


def test_missing_paths_are_reported_together(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = load_config(write(MINIMAL), ["student.tokenizer=tokenizer", "evaluation.data={aime: a.jsonl, dir: student}"])
    (tmp_path / "student").mkdir()
    with pytest.raises(ConfigError) as caught:
        check_paths(cfg)
    assert caught.value.problems == [
        "student.tokenizer: tokenizer does not exist",
        "teacher.checkpoint: teacher does not exist",
        "data.train: train.jsonl does not exist",
        "evaluation.data.aime: a.jsonl does not exist",
        "evaluation.data.dir: student is not a file",
    ]
    assert str(tmp_path) in str(caught.value)
    for name in ("teacher", "tokenizer"):
        (tmp_path / name).mkdir()
    for name in ("train.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    check_paths(cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update={"data": {}})}))


def test_json_schema_describes_every_section() -> None:
    schema = json_schema()
    assert schema["properties"].keys() == RunConfig.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert {"output", "student", "data", "objective"} <= set(schema["required"])


def test_overrides_do_not_depend_on_yaml_1_1() -> None:
    """The reason for a loader of our own; fails when PyYAML changes its mind."""
    assert yaml.safe_load("1e-6") == "1e-6"


OWN = """\
from dataclasses import dataclass

@dataclass
class Thing:
    size: int = 3

def halves(response): return response * 0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "own_things_of_a_user"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


PLACES = ["objective", "gate.partition", "data.grader"]


@pytest.mark.parametrize("place", PLACES)
def test_a_class_of_the_users_own(write: Any, own: str, place: str) -> None:
    path = write(MINIMAL)
    assert own not in sys.modules
    cfg = load_config(path, [f"{place}={{name: '{own}:Thing', args: {{size: 5}}}}"])
    assert cfg == load_config(write(dump_config(cfg)))
    section: Any = cfg
    for part in place.split("."):
        section = getattr(section, part)
    assert section.make().size == 5


@pytest.mark.parametrize("place", [*PLACES, "weights"])
def test_what_is_wrong_with_a_class_of_the_users_own(write: Any, own: str, place: str) -> None:
    path = write(MINIMAL)
    here = "weights.0" if place == "weights" else place

    def problem(section: str) -> str:
        (found,) = problems(path, f"{place}={f'[{section}]' if place == 'weights' else section}")
        return found

    assert problem("{name: 'no_such_module:Thing'}") == (
        f"{here}.name = 'no_such_module:Thing': cannot import 'no_such_module' (ModuleNotFoundError: No module named "
        "'no_such_module'); is it on PYTHONPATH?"
    )
    assert problem(f"{{name: '{own}_broken:Thing'}}") == (
        f"{here}.name = '{own}_broken:Thing': cannot import '{own}_broken' (ZeroDivisionError: division by zero); "
        "correct the module"
    )
    assert problem(f"{{name: '{own}:Thin'}}") == (
        f"{here}.name = '{own}:Thin': '{own}' has no class or function 'Thin'; it has dataclass, Thing, halves"
    )
    assert problem(f"{{name: '{own}:Thing', args: {{sise: 5}}}}") == (
        f"{here}.args = {{'sise': 5}}: do not fit {own}:Thing(size: int = 3) -> None: got an unexpected keyword "
        "argument 'sise'"
    )
    assert problem(f"{{name: '{own}:halves', args: {{size: 5}}}}") == (
        f"{here}.args = {{'size': 5}}: {own}:halves is not a class: remove args"
    )
    assert problem(f"{{name: '{own}:Thing', arg: 1}}").startswith(f"{here}.arg: unknown key; did you mean {here}.args")


def test_the_gate_may_stand_among_the_weights(write: Any) -> None:
    path = write(MINIMAL)
    cfg = load_config(path, ["weights=[{name: drift_gate, tau: 2.0, partition: {name: token}}]"])
    gate = load_config(path, ["gate={tau: 2.0, partition: {name: token}}"]).gate
    assert cfg.drift_gate is not None
    assert gate is not None
    assert cfg.drift_gate.model_dump(exclude={"name"}) == gate.model_dump()
    assert problems(path, "weights=[{name: drift_gate}]", "gate={tau: 1.0}") == [
        "gate and weights hold 2 drift gates: a run measures one drift; keep one of them"
    ]
    assert problems(path, "weights=[{name: drift_gate, tau: -1}]") == [
        "weights.0.tau = -1: should be greater than or equal to 0"
    ]
    assert problems(path, "weights=[{name: drift_gat}]") == [
        "weights.0.name = 'drift_gat': should be one of drift_gate, module:Class; did you mean drift_gate?"
    ]


def test_users_classes_are_in_the_json_schema() -> None:
    schema = json_schema()
    user = {"$ref": "#/$defs/UserClass"}
    assert user in schema["properties"]["objective"]["oneOf"]
    assert user in schema["properties"]["weights"]["items"]["oneOf"]
    assert user in schema["$defs"]["GateConfig"]["properties"]["partition"]["oneOf"]
    assert {"type": "string"} in schema["$defs"]["Data"]["properties"]["grader"]["anyOf"]
    assert schema["$defs"]["UserClass"]["properties"]["args"]["type"] == "object"
