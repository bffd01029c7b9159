"""Pins loading by name and from a file, and that each mistake gets one line that says what there is instead."""

from pathlib import Path

import pytest

from rewards import RewardFunction, Sample, load, load_reward, math_answer, r1_format, register

SAMPLE = Sample(prompt="", completion="four")
USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path

from rewards import Sample, reward

LIMIT = 5

@dataclass
class Config:
    limit: int = LIMIT

def plain(sample):
    return len(sample.completion) < Config().limit

@reward(weight=0.5, name="shown")
def decorated(sample: Sample) -> float:
    return 0.25

def two_arguments(prompt, completion):
    return 1.0

async def later(sample):
    return 1.0
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(USER_FILE)
    return path


def test_registered_names() -> None:
    assert load_reward("math_answer") is math_answer
    assert load_reward("r1_format") is r1_format
    known = "exact_answer, math_answer, r1_format, thinking_length"
    with pytest.raises(ValueError, match=f"no reward named 'math'; known: {known}; or write"):
        load_reward("math")


def test_plain_and_decorated_functions(user_file: Path) -> None:
    plain = load_reward(f"{user_file}:plain")
    assert isinstance(plain, RewardFunction)
    assert (plain.name, plain.weight, plain.score(SAMPLE).value) == ("plain", 1.0, 1.0)
    decorated = load_reward(f"{user_file}:decorated")
    assert (decorated.name, decorated.weight, decorated.score(SAMPLE).value) == ("shown", 0.5, 0.25)


def test_relative_path(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_file.parent)
    assert load_reward("my rewards.py:plain").score(SAMPLE).value == 1.0


def test_equal_file_names_do_not_meet(tmp_path: Path) -> None:
    loaded = []
    for value in (1, 2):
        path = tmp_path / str(value) / "json.py"  # also hides nothing of the standard library
        path.parent.mkdir()
        path.write_text(f"VALUE = {value}\ndef f(sample):\n    return VALUE\n")
        loaded.append(load_reward(f"{path}:f"))
    assert [function.score(SAMPLE).value for function in loaded] == [1.0, 2.0]
    assert loaded[0].fn.__module__ != loaded[1].fn.__module__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "has no 'other'; functions in it: plain, decorated, two_arguments, later"),
        ("", "has no ''; functions in it: plain"),
        ("LIMIT", "has a int, not a function, named 'LIMIT'; functions in it: plain"),
        ("Config", "has a type, not a function, named 'Config'"),
        ("two_arguments", r"must take one argument, the Sample; its signature is \(prompt, completion\)"),
        ("later", "is async"),
    ],
)
def test_wrong_functions(user_file: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(f"{user_file}:{name}")
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.py' not found .*; write path/to/file.py:function"):
        load_reward(f"{tmp_path / 'missing.py'}:f")
    with pytest.raises(FileNotFoundError, match="not found"):
        load_reward(f"{tmp_path}:f")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must end in \.py"):
        load_reward(f"{tmp_path / 'notes.txt'}:f")
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        load_reward(f"{tmp_path / 'broken.py'}:f")


def test_register_returns_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_REGISTRY", dict(load._REGISTRY))

    def mine(sample: Sample) -> float:
        return 0.5

    assert register(mine) is mine
    assert load_reward("mine").score(SAMPLE).value == 0.5
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register(mine)


def test_a_weight_in_front_of_the_star() -> None:
    assert load_reward("0.1*r1_format").weight == 0.1
    assert load_reward("r1_format").weight == 1.0, "the registered reward itself must not change"
    with pytest.raises(ValueError, match=r"'ten' before the star is not a number; write e\.g\. 0\.1\*name"):
        load_reward("ten*r1_format")
