"""The order of samples, and the arrays they lie in.

Pinned: (1) every sample once per epoch, also where an epoch ends within a step; the same seed gives the same order;
(2) steps of a number of tokens are full to the last sample that fits, and lose none; (3) under a curriculum no sample
is longer than the limit, which grows to the longest at its end, and at first there are no more than a step takes; (4)
micro-batches hold each sample once, within the budget; (5) a batch has the loss positions of `grpo.packing.pack`.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from grpo.batch import TrainingSample
from grpo.packing import pack
from pipelines.sample_order import ordered_steps
from pipelines.token_store import TokenStore

LENGTHS = np.array([random.Random(i).randrange(1, 60) for i in range(50)])


def first_steps(
    count: int, *, samples: int = 8, tokens: int = 0, seed: int = 0, curriculum: int = 0
) -> list[list[int]]:
    steps = ordered_steps(
        LENGTHS, samples_per_step=samples, tokens_per_step=tokens, seed=seed, curriculum_steps=curriculum
    )
    return list(itertools.islice(steps, count))


def test_each_sample_once_per_epoch() -> None:
    places = list(itertools.chain(*first_steps(25)))
    epochs = [places[start : start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert first_steps(25) == first_steps(25) and first_steps(3, seed=1) != first_steps(3)


def test_steps_of_a_number_of_tokens() -> None:
    steps = first_steps(30, tokens=200)
    places = list(itertools.chain(*steps))
    assert sorted(places[:50]) == list(range(50)) and sorted(places[50:100]) == list(range(50))
    for step, following in itertools.pairwise(steps):
        tokens = int(LENGTHS[step].sum())
        assert tokens <= 200 < tokens + LENGTHS[following[0]], "the next sample had no room"


def test_a_curriculum_lets_longer_samples_in_by_and_by() -> None:
    limits = [int(LENGTHS[step].max()) for step in first_steps(40, curriculum=40)]
    ascending = sorted(LENGTHS.tolist())
    assert limits[0] <= ascending[7] and set(first_steps(1, curriculum=40)[0]) <= set(np.argsort(LENGTHS)[:9])
    for step, limit in enumerate(limits):
        assert limit <= ascending[max(8, round((step + 1) / 41 * 50)) - 1], step
    assert np.mean(limits[:10]) + 20 < np.mean(limits[30:])
    after = list(itertools.chain(*first_steps(100, curriculum=20)[20:]))
    counts = np.bincount(after, minlength=50)
    assert counts.min() >= 11 and counts.max() <= 14, "afterwards all are equal again"
    few = ordered_steps(LENGTHS[:5], samples_per_step=64, tokens_per_step=70, seed=0, curriculum_steps=4)
    assert sorted({place for step in itertools.islice(few, 9) for place in step}) == list(range(5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"samples": 51}, "samples_per_step=51 exceeds the 50"), ({"tokens": 40}, "tokens exceeds tokens_per_step=40")],
)
def test_steps_that_cannot_be_filled(flags: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_steps(1, **flags)


def test_batches_are_those_of_pack() -> None:
    rng = random.Random(0)
    some = []
    for length in [*LENGTHS.tolist(), 60, 60]:
        mask = [False, *(rng.random() < 0.6 for _ in range(length - 1))]
        ids = [rng.randrange(100) for _ in mask]
        some.append(TrainingSample(token_ids=ids, loss_mask=mask, sampling_logprobs=[0.0] * length))
    some = [sample for sample in some if sample.num_trained]
    store = TokenStore.of((sample.token_ids, sample.loss_mask) for sample in some)
    assert store.num_trained == sum(sample.num_trained for sample in some) == store.trained_in(range(len(store)))
    (theirs,) = pack(some, 10_000, "token")
    (places,) = store.micro_batches(range(len(store)), 10_000)
    ours = store.batch(places, 1 / store.num_trained)
    for name in ("ids_T", "predictors_N", "targets_N", "weights_N"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.layout.lengths == theirs.layout.lengths

    groups = store.micro_batches(range(len(store)), 64)
    assert sorted(itertools.chain(*groups)) == list(range(len(store)))
    sizes = [store.tokens_in(group) for group in groups]
    assert max(sizes) <= 64 and len(sizes) <= 1.1 * len(store.ids_W) / 64
    assert len(store.batch(groups[0], 1.0).ids_T) == sizes[0]
