"""The n-gram repetition penalty against numbers worked out by hand."""

import pytest

from rewards import Sample, repetition_penalty


@pytest.mark.parametrize(
    ("ids", "ngram", "value"),
    [
        ((1, 2, 3, 4), 2, 0.0),
        ((5, 5, 5, 5, 5), 2, -0.75),  # one of four 2-grams is new
        ((1, 2, 1, 2, 1), 2, -0.5),
        ((1, 2, 3, 1, 2, 3), 3, -0.25),
        ((1, 1), 3, 0.0),
        ((1, 1, 1), 3, 0.0),
        ((1, 1, 1), 1, -2 / 3),
        ((), 1, 0.0),
    ],
)
def test_tokens(ids: tuple[int, ...], ngram: int, value: float) -> None:
    score = repetition_penalty(ngram=ngram).score(Sample(prompt="", completion="", completion_ids=ids))
    assert score.value == pytest.approx(value, abs=1e-12)
    assert str(score.value) != "-0.0"


def test_words_in_lower_case_and_scaled() -> None:
    penalty = repetition_penalty(ngram=2, max_penalty=-0.5, unit="words")
    assert penalty.score(Sample(prompt="", completion="So so SO\nso")).value == pytest.approx(-0.5 * 2 / 3)
    assert penalty.score(Sample(prompt="", completion="so it is")).value == 0.0


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="ngram must be >= 1, got 0"):
        repetition_penalty(ngram=0)
    with pytest.raises(ValueError, match="max_penalty must be <= 0, got 1"):
        repetition_penalty(max_penalty=1)
