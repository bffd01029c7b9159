"""Pins packing.

1. Every trained token appears exactly once, beside its own predictor, advantage, temperature, log-probability.
2. Weights sum to 1 over all micro-batches: 1 / tokens of the batch, or 1 / (samples * tokens of the sample).
3. No micro-batch exceeds the budget; samples stay whole.
4. Samples without a trained token leave the batch and its denominators.
5. What cannot be packed is refused.
6. Several ranks get equally many micro-batches, of nearly the same cost in each round, and the weights of one rank.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batch import Aggregation, MicroBatch, TrainingSample
from grpo.packing import pack, pack_for_ranks


def make_sample(number: int, mask: Sequence[bool]) -> TrainingSample:
    """Token n of sample s has the id 100 s + n, which the log-probability repeats, so that both can be traced."""
    ids = [100 * number + n for n in range(len(mask))]
    return TrainingSample(
        token_ids=ids,
        loss_mask=mask,
        sampling_logprobs=[-float(token) for token in ids],
        advantage=float(number),
        temperature=1 + number / 8,
    )


MASKS = st.lists(st.booleans(), max_size=11).map(lambda mask: [False, *mask])
BATCHES = st.lists(MASKS, min_size=1, max_size=9).filter(lambda masks: any(map(any, masks)))

EXAMPLE = [
    make_sample(1, [False, False, True, True]),
    make_sample(2, [False, True, False, True, True, True]),
    make_sample(3, [False, True]),
]


def weights_of(batches: Sequence[MicroBatch]) -> dict[int, float]:
    """Trained token -> weight; each token once."""
    pairs = [pair for batch in batches for pair in zip(batch.targets_N.tolist(), batch.weights_N.tolist(), strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("token_budget", [6, 8, 10, 100])
@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("token", {1: 1 / 7, 2: 1 / 7, 3: 1 / 7}),
        ("sequence", {1: 1 / 6, 2: 1 / 12, 3: 1 / 3}),
    ],
)
def test_weights_by_hand(aggregation: Aggregation, weights: dict[int, float], token_budget: int) -> None:
    found = weights_of(pack(EXAMPLE, token_budget, aggregation))
    assert found.keys() == {102, 103, 201, 203, 204, 205, 301}
    assert found == pytest.approx({token: weights[token // 100] for token in found}, rel=1e-6)


def test_tensors_by_hand() -> None:
    first, second = pack(EXAMPLE, 8, "token")
    assert first.ids_T.tolist() == [200, 201, 202, 203, 204, 205]
    assert first.layout.lengths == (6,)
    assert first.predictors_N.tolist() == [0, 2, 3, 4]
    assert second.ids_T.tolist() == [100, 101, 102, 103, 300, 301]
    assert second.layout.lengths == (4, 2)
    assert second.layout.positions_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert second.predictors_N.tolist() == [1, 2, 4]
    assert second.targets_N.tolist() == [102, 103, 301]
    assert second.sampling_logprobs_N.tolist() == [-102, -103, -301]
    assert second.advantages_N.tolist() == [1, 1, 3]
    assert second.temperatures_N.tolist() == [1.125, 1.125, 1.375]


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@settings(deadline=None)  # a busy machine is slow, not wrong
@given(masks=BATCHES, spare=st.integers(0, 30))
def test_every_trained_token_once(aggregation: Aggregation, masks: list[list[bool]], spare: int) -> None:
    samples = [make_sample(number, mask) for number, mask in enumerate(masks, 1)]
    budget = max(len(sample.token_ids) for sample in samples) + spare
    batches = pack(samples, budget, aggregation)
    for batch in batches:
        assert len(batch.ids_T) == sum(batch.layout.lengths) <= budget
        ids_T, predictors_N = batch.ids_T, batch.predictors_N
        assert torch.equal(ids_T[predictors_N + 1], batch.targets_N)
        assert torch.equal(ids_T[predictors_N], batch.targets_N - 1), "predicted from another sample"
        assert torch.equal(batch.layout.positions_T, ids_T % 100), "a sample was cut or mixed"
        assert torch.equal(batch.sampling_logprobs_N, -batch.targets_N.float())
        assert torch.equal(batch.advantages_N, (batch.targets_N // 100).float())
        assert torch.equal(batch.temperatures_N, 1 + (batch.targets_N // 100) / 8)
    found = weights_of(batches)
    trained = {
        100 * number + n for number, mask in enumerate(masks, 1) for n, is_trained in enumerate(mask) if is_trained
    }
    assert found.keys() == trained
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_samples_without_trained_tokens_leave_no_trace(aggregation: Aggregation) -> None:
    idle = make_sample(9, [False, False])
    (batch,) = pack([idle, *EXAMPLE, idle], 100, aggregation)
    assert 900 not in batch.ids_T
    assert weights_of([batch]) == weights_of(pack(EXAMPLE, 100, aggregation))


def test_a_sample_of_exactly_the_budget_fits() -> None:
    assert [len(batch.ids_T) for batch in pack(EXAMPLE, 6, "token")] == [6, 6]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 6 tokens exceeds token_budget=5; raise the budget"):
        pack(EXAMPLE, 5, "token")
    for nothing in ([], [make_sample(1, [False, False])]):
        with pytest.raises(ValueError, match="no sample has a token to train"):
            pack(nothing, 100, "token")


def test_malformed_samples_are_refused() -> None:
    with pytest.raises(AssertionError, match="the first token has nothing before it"):
        make_sample(1, [True, True])
    with pytest.raises(AssertionError, match=r"differ in length: \[2, 3\]"):
        TrainingSample(token_ids=[1, 2, 3], loss_mask=[False, True, True], sampling_logprobs=[0.0, -1.0])


@given(masks=BATCHES, token_budget=st.integers(12, 40), num_ranks=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_ranks_share_a_batch(masks: list[list[bool]], token_budget: int, num_ranks: int) -> None:
    samples = [make_sample(number, mask) for number, mask in enumerate(masks)]
    parts = pack_for_ranks(samples, token_budget, "sequence", num_ranks=num_ranks, quadratic_at=8)
    assert len({len(part) for part in parts}) == 1 and len(parts) == num_ranks
    batches = [batch for part in parts for batch in part]
    assert all(len(batch.ids_T) <= token_budget for batch in batches)
    wanted = weights_of(pack(samples, token_budget, "sequence"))
    assert weights_of(batches) == pytest.approx(wanted, rel=1e-6)
    rounds = list(zip(*parts, strict=True))
    assert all(any(len(batch.targets_N) for batch in of_round) for of_round in rounds), "a round of no use"
    assert all(len(batch.targets_N) for of_round in rounds[:-1] for batch in of_round), "idle before the last round"


def test_ranks_get_rounds_of_equal_cost() -> None:
    """64 samples of 20 to 650 tokens for 4 ranks: the time in step is within 5% of what an even split would take."""
    samples = [make_sample(n, [False] + [True] * (19 + 10 * n)) for n in range(64)]
    parts = pack_for_ranks(samples, 2048, "token", num_ranks=4, quadratic_at=200)

    def cost(batch: MicroBatch) -> float:
        return sum(length * (1 + length / 200) for length in batch.layout.lengths)

    costs = [[cost(batch) for batch in part] for part in parts]
    in_step = sum(max(round_) for round_ in zip(*costs, strict=True))
    assert in_step < 1.05 * sum(map(sum, costs)) / 4
    fewest = len(pack(samples, 2048, "token"))
    assert len(parts[0]) == -(-fewest // 4)
