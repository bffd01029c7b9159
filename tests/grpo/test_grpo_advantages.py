"""Pins the group-relative advantage.

1. The divisor is the sample's standard deviation (n - 1) plus 1e-6; with scale "none" there is no divisor.
2. Equal rewards give exact zeros, never rounding noise that the divisor would blow up.
3. None takes no part and stays None; fewer than two rewards leave no baseline.
4. A group of one is refused.
5. Adding a constant to all rewards, or scaling them, changes nothing; advantages sum to 0.
"""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import group_advantages

GroupScale = Literal["std", "none"]
EIGHTHS = st.integers(-800, 800).map(lambda k: k / 8)
GROUPS = st.lists(EIGHTHS, min_size=2, max_size=12)


def complete(advantages: list[float | None]) -> list[float]:
    assert None not in advantages
    return [advantage for advantage in advantages if advantage is not None]


def assert_equal(advantages: list[float | None], expected: list[float | None]) -> None:
    assert [a is None for a in advantages] == [e is None for e in expected]
    present = [e for e in expected if e is not None]
    assert [a for a in advantages if a is not None] == pytest.approx(present, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]),
        ([1, 3, 5], [-2 / 2.000001, 0.0, 2 / 2.000001]),
        ([1, None, 3, 5, None], [-2 / 2.000001, None, 0.0, 2 / 2.000001, None]),
        ([-6, 2], [-4 / 5.656855249492381, 4 / 5.656855249492381]),  # the deviation is the root of 32
        ([0.0, 1e-6], [-0.5e-6 / 1.7071067811865475e-6, 0.5e-6 / 1.7071067811865475e-6]),  # the 1e-6 damps noise
    ],
)
def test_standard_deviation_by_hand(rewards: list[float | None], expected: list[float | None]) -> None:
    assert_equal(group_advantages(rewards, scale="std"), expected)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        ([-6, None, 2], [-4.0, None, 4.0]),
    ],
)
def test_without_scale_by_hand(rewards: list[float | None], expected: list[float | None]) -> None:
    assert_equal(group_advantages(rewards, scale="none"), expected)


@pytest.mark.parametrize("scale", ["std", "none"])
@settings(deadline=None)  # a busy machine is slow, not wrong
@given(reward=st.floats(-1e6, 1e6), size=st.integers(2, 20))
def test_equal_rewards_give_exact_zeros(scale: GroupScale, reward: float, size: int) -> None:
    assert group_advantages([reward, None, *[reward] * (size - 1)], scale=scale) == [0.0, None, *[0.0] * (size - 1)]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("rewards", [[None, None], [1.0, None], [None, None, 0.5]])
def test_fewer_than_two_rewards_have_no_baseline(scale: GroupScale, rewards: list[float | None]) -> None:
    assert group_advantages(rewards, scale=scale) == [None] * len(rewards)


@pytest.mark.parametrize("rewards", [[], [1.0], [None]])
def test_group_of_one_is_refused(rewards: list[float | None]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 completions for its baseline, got {len(rewards)}"):
        group_advantages(rewards, scale="std")


@settings(deadline=None)
@given(rewards=GROUPS)
def test_equals_the_expression_in_torch(rewards: list[float]) -> None:
    r = torch.tensor(rewards, dtype=torch.float64)
    centred = complete(group_advantages(rewards, scale="none"))
    assert centred == pytest.approx((r - r.mean()).tolist(), abs=1e-11)
    scaled = complete(group_advantages(rewards, scale="std"))
    assert scaled == pytest.approx(((r - r.mean()) / (r.std() + 1e-6)).tolist(), abs=1e-9)


@settings(deadline=None)
@given(rewards=GROUPS, constant=EIGHTHS, factor=st.floats(0.5, 50))
def test_invariant_to_the_scale_of_rewards(rewards: list[float], constant: float, factor: float) -> None:
    advantages = complete(group_advantages(rewards, scale="std"))
    shifted = group_advantages([reward + constant for reward in rewards], scale="std")
    assert shifted == pytest.approx(advantages, abs=1e-9)
    scaled = group_advantages([reward * factor for reward in rewards], scale="std")
    assert scaled == pytest.approx(advantages, rel=1e-4, abs=1e-9)  # 1e-6 against deviations of at least 0.018
    assert sum(advantages) == pytest.approx(0, abs=1e-9)


@settings(deadline=None)
@given(rewards=GROUPS, data=st.data())
def test_order_within_the_group_does_not_matter(rewards: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rewards))))
    advantages = group_advantages(rewards, scale="std")
    assert group_advantages([rewards[i] for i in order], scale="std") == [advantages[i] for i in order]
