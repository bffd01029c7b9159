"""Language consistency: shares of words by script, counted by hand."""

import pytest

from rewards import Sample, language_consistency

NIHAO = "\u4f60\u597d"  # two Chinese characters
PRIVET = "\u043f\u0440\u0438\u0432\u0435\u0442"  # one Russian word
KANA = "\u305d\u308c"  # two hiragana


@pytest.mark.parametrize(
    ("language", "thinking", "value"),
    [
        ("en", "first add the numbers", 1.0),
        ("en", f"first {NIHAO} add", 0.5),
        ("zh", f"first {NIHAO} add", 0.5),
        ("zh", f"{NIHAO}{NIHAO} so", 0.8),
        ("ru", f"{PRIVET} world {PRIVET} world", 0.5),
        ("ja", f"{KANA}{NIHAO} then", 0.8),
        ("en", f"so{NIHAO}so", 0.5),
        ("zh", rf"{NIHAO} x + y = \frac{{3}}{{4}} 12", 1.0),
        ("en", "x + 3 = 4", 0.0),
        ("en", "", 0.0),
        ("en", "l'addition donne cinq", 1.0),  # not covered: one script, another language
    ],
)
def test_share_of_words(language: str, thinking: str, value: float) -> None:
    sample = Sample(prompt="", completion=f"<think>{thinking}</think> {PRIVET} 4")
    assert language_consistency(language=language).score(sample).value == pytest.approx(value)


def test_prefilled_thinking_and_whole_completions() -> None:
    sample = Sample(prompt="A: <think>\n", completion=f"two words</think> {PRIVET} {PRIVET}")
    assert language_consistency().score(sample).value == 1.0
    whole = language_consistency(part="completion").score(sample)
    assert whole.value == 0.5
    assert whole.info == {"words": {"LATIN": 2, "CYRILLIC": 2}}


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"language must be one of ar, bg, .*, got 'xx'"):
        language_consistency(language="xx")
    with pytest.raises(ValueError, match="part must be"):
        language_consistency(part="answer")  # type: ignore[arg-type]
