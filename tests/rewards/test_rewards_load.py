"""Pins loading by name, with settings, from a file or an entry point, and that each mistake gets one line that says
what there is instead.
"""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from rewards import RewardFunction, Sample, load, load_reward, load_rubric, math_answer, r1_format, register

SAMPLE = Sample(prompt="", completion="four")
USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from functools import partial
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

def nothing():
    return 1.0

def limited(limit, name="limited"):
    return reward(name=name)(partial(shorter_than, limit=limit))

def shorter_than(completion, limit):
    return len(completion) < limit
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(USER_FILE)
    return path


def test_registered_names() -> None:
    assert load_reward("math_answer") is math_answer
    assert load_reward("r1_format") is r1_format
    with pytest.raises(
        ValueError, match=r"no reward named 'math'; known: code_reward, cosine_length, .*; or write path"
    ):
        load_reward("math")


@pytest.mark.parametrize("name", sorted(load._REGISTRY))
def test_each_registered_reward_scores(name: str) -> None:
    function = load_reward(name)
    assert function.name == name
    assert not function.score(Sample(prompt="", completion="4", row={"answer": "4"})).status.is_failure()


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
        ("other", "has no 'other'; functions in it: plain, decorated, nothing, limited, shorter_than"),
        ("", "has no ''; functions in it: plain"),
        ("LIMIT", "has a int, not a function, named 'LIMIT'; functions in it: plain"),
        ("Config", "has a type, not a function, named 'Config'"),
        ("nothing", r"reward 'nothing' takes nothing of the sample; its signature is \(\)"),
        ("limited(max=4)", r"limited': missing a required argument: 'limit'; it takes \(limit, name='limited'\)"),
        ("limited(4)", r"settings need names; write settings as name\(key=1.5, other='text'\)"),
        ("limited(limit=open)", "malformed node or string"),
        ("limited(limit=)", "invalid syntax"),
        ("plain(sample=3)", "'int' object has no attribute"),
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nimport no_such_module_at_all\n", r"No module named 'no_such_module_at_all' \(line 2\)"),
        ("import helpers_beside\n", r"'helpers_beside'; it lies beside the file, so run with PYTHONPATH=.* \(line 1\)"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("import json\n\njson.loads('{')\n", r"JSONDecodeError: .* \(line 3\)"),
        ("from rewards import reward\n@reward(weight='x')\ndef f(sample): return 1\n", r"TypeError: .* \(line 2\)"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "helpers_beside.py").write_text("")
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ValueError, match=f"broken.py cannot be loaded: .*{message}") as caught:
        load_reward(f"{tmp_path / 'broken.py'}:f")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


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
    with pytest.raises(ValueError, match="'cosine_length' is already registered"):
        register(RewardFunction(fn=mine_again, name="cosine_length"))


def mine_again(sample: Sample) -> float:
    return 0.5


def test_settings_in_brackets(user_file: Path) -> None:
    assert load_reward("repetition_penalty").score(SAMPLE).info["error"], "unit='tokens' needs token ids"
    penalty = load_reward("0.5*repetition_penalty(ngram=1, unit='words', max_penalty=-2.0)")
    assert (penalty.weight, penalty.score(Sample(prompt="", completion="so so")).value) == (0.5, -1.0)
    assert load_reward(f"{user_file}:limited(limit=4)").score(SAMPLE).value == 0.0
    assert load_reward(f"2*{user_file}:limited(limit=5, name='a*b:c(d)')").name == "a*b:c(d)"


def test_the_judge_of_a_length_reward_is_a_reward_by_name() -> None:
    right = Sample(prompt="", completion="#### 4", completion_ids=(1,) * 5, row={"answer": "4"})
    for spec in ("cosine_length(max_length=10)", "cosine_length(max_length=10, judge='exact_answer')"):
        assert load_reward(spec).score(right).value == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no reward named 'nobody'"):
        load_reward("kimi_length(judge='nobody')")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "soft_overlong",
            r"'soft_overlong': missing a required argument: 'max_length'; it takes \(\*, max_length",
        ),
        ("soft_overlong(max_length=9, buffer=10)", "buffer must be > 0 and <= max_length=9, got 10"),
        ("r1_format(x=1)", "reward 'r1_format' takes no settings, got x=1"),
        ("nobody(x=1)", r"no reward named 'nobody\(x=1\)'"),
        ("math_answer if r1_format", "no reward named"),
    ],
)
def test_wrong_settings(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        EntryPoint(name="installed", value="rewards.format:tag_count", group="grpo.rewards"),
        EntryPoint(name="maker", value="rewards.format:tagged_format", group="grpo.rewards"),
        EntryPoint(name="stale", value="no_such_package:f", group="grpo.rewards"),
    ]
    monkeypatch.setattr(load, "entry_points", lambda group: EntryPoints(found).select(group=group))
    assert load_reward("0.5*installed").weight == 0.5
    assert load_reward("maker(name='strict', allow_empty_thinking=False)").name == "strict"
    with pytest.raises(ValueError, match="reward 'stale' from no_such_package:f: ModuleNotFoundError"):
        load_reward("stale")
    with pytest.raises(ValueError, match=r"known: .*, installed, .*, maker"):
        load_reward("nobody")


def test_a_rubric_with_gates() -> None:
    rubric = load_rubric(["exact_answer", "0.5*tag_count if exact_answer", "r1_format if tag_count >= 0.25"])
    assert [reward.name for reward in rubric.rewards] == ["exact_answer", "tag_count", "r1_format"]
    assert [(gate.reward, gate.only_if, gate.at_least) for gate in rubric.gates.values()] == [
        ("tag_count", "exact_answer", 1.0),
        ("r1_format", "tag_count", 0.25),
    ]
    sample = Sample(prompt="", completion="<answer>4\n</answer>", row={"answer": "4"})
    assert rubric.score(sample).value == 1.0 + 0.5 * 0.25 + 0.0
    with pytest.raises(ValueError, match="'much' behind >= is not a number"):
        load_rubric(["r1_format if tag_count >= much"])
