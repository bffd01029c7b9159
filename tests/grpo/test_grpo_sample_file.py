"""Pins the file of training samples: what is read equals what was written, and damage is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batch import TrainingSample
from grpo.sample_file import read_samples, sample_path, write_samples

FLOATS = st.floats(allow_nan=False)


@st.composite
def training_samples(draw: st.DrawFn) -> TrainingSample:
    length = draw(st.integers(2, 9))
    fill = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed))
    experts = draw(st.none() | fill.map(lambda rng: rng.integers(0, 256, (length - 1, 2, 3)).astype(np.uint16)))
    return TrainingSample(
        token_ids=draw(st.lists(st.integers(0, 200_000), min_size=length, max_size=length)),
        loss_mask=[False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))],
        sampling_logprobs=draw(st.lists(FLOATS, min_size=length, max_size=length)),
        advantage=draw(FLOATS),
        temperature=draw(FLOATS),
        expert_ids=experts,
        policy_lags=draw(st.none() | st.lists(st.integers(-1, 300), min_size=length, max_size=length)),
        old_logprobs=draw(st.none() | st.lists(FLOATS, min_size=length, max_size=length)),
    )


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(training_samples(), max_size=5))
def test_what_is_read_equals_what_was_written(samples: list[TrainingSample], tmp_path_factory) -> None:
    path = sample_path(tmp_path_factory.mktemp("run"), 12)
    write_samples(path, samples, step=12)
    again = read_samples(path)
    assert again == samples
    for one, other in zip(again, samples, strict=True):
        assert type(one.token_ids[0]) is int and type(one.loss_mask[0]) is bool and type(one.advantage) is float
        if one.expert_ids is None or other.expert_ids is None:
            assert one.expert_ids is other.expert_ids
        else:
            assert one.expert_ids.dtype == other.expert_ids.dtype and np.array_equal(one.expert_ids, other.expert_ids)
    assert [file.name for file in path.parent.iterdir()] == ["step_000012.safetensors"]


def test_damage_is_refused(tmp_path: Path) -> None:
    path = sample_path(tmp_path, 3)
    with pytest.raises(
        FileNotFoundError, match=r"step_000003.safetensors does not exist: .*--trainer.dump-samples-every 1"
    ):
        read_samples(path)
    write_samples(path, [TrainingSample(token_ids=[1, 2], loss_mask=[False, True], sampling_logprobs=[0.0, -1.0])], 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a file of training samples, or damaged"):
        read_samples(path)
