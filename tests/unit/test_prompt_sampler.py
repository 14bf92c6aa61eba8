from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpdg.data.sampler import PromptSampler

SIZES = st.integers(1, 12).flatmap(lambda problems: st.tuples(st.just(problems), st.integers(1, problems)))


def stream(problems: int, per_step: int, seed: int, steps: int) -> list[int]:
    sampler = PromptSampler(problems, per_step, seed)
    return [index for step in range(steps) for index in sampler.batch(step)]


@given(SIZES, st.integers(0, 5))
def test_every_epoch_is_a_permutation_and_no_batch_repeats(sizes: tuple[int, int], seed: int) -> None:
    problems, per_step = sizes
    drawn = iter(stream(problems, per_step, seed, steps=4 * problems))
    while epoch := list(islice(drawn, problems)):
        assert sorted(epoch) == list(range(problems))
    sampler = PromptSampler(problems, per_step, seed)
    for step in range(4 * problems):
        assert len(set(sampler.batch(step))) == per_step


@given(SIZES, st.integers(0, 60), st.lists(st.integers(0, 60), max_size=5))
def test_a_batch_depends_on_its_step_alone(sizes: tuple[int, int], step: int, calls_before: list[int]) -> None:
    fresh, used = PromptSampler(*sizes, seed=3), PromptSampler(*sizes, seed=3)
    for other in calls_before:
        used.batch(other)
    assert fresh.batch(step) == used.batch(step) == used.batch(step)


def test_seeds_and_epochs_differ() -> None:
    assert stream(50, 5, 0, 10) != stream(50, 5, 1, 10)
    two_epochs = stream(50, 5, 0, 20)
    assert two_epochs[:50] != two_epochs[50:]
    assert two_epochs[:50] != list(range(50))


def test_values_are_plain_integers() -> None:
    assert all(type(index) is int for index in PromptSampler(5, 3, 0).batch(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 4, 0), "prompts_per_step"), ((0, 1, 0), "from 0"), ((3, 0, 0), "draw 0"), ((3, 1, -1), "seed = -1")],
)
def test_bad_arguments(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSampler(*arguments)


def test_bad_step() -> None:
    with pytest.raises(ValueError, match="step = -1"):
        PromptSampler(3, 1, 0).batch(-1)
