"""The code reward in a rubric's hands, and grading a file of programs."""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.base import RewardFunction, Sample, Score, ScoreStatus
from rewards.code_programs import grade_file
from rewards.code_reward import code_reward
from rewards.sandbox import open_sandbox
from rewards.sandbox_limits import Limits, SandboxError

ROW = {"tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "entry_point": "add"}
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
HALF = "```python\ndef add(a, b):\n    return 3\n```"


@pytest.fixture(scope="module")
def working() -> None:
    try:
        open_sandbox(num_waiting=0).close()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["all", "fraction"])
def code(request: pytest.FixtureRequest, working: None) -> Iterator[RewardFunction]:
    function = code_reward(mode=request.param, timeout_s=10, num_workers=2)
    yield function
    function.fn.close()  # type: ignore[attr-defined]


def sample(completion: str, row: dict[str, Any] | None = None, prompt: str = "Write add.") -> Sample:
    return Sample(prompt=prompt, completion=completion, row=ROW if row is None else row)


def scores(function: RewardFunction, *samples: Sample) -> list[Score]:
    return function.score_groups([samples])[0]


def test_value_info_and_metrics(code: RewardFunction):
    right, half, none = scores(code, sample(RIGHT), sample(HALF), sample("I cannot."))
    is_fraction = code.fn._mode == "fraction"  # type: ignore[attr-defined]
    assert [score.value for score in (right, half, none)] == [1.0, 0.5 if is_fraction else 0.0, 0.0]
    assert [score.info["status"] for score in (right, half, none)] == ["ok", "wrong", "no-code"]
    assert half.info["first_failure"] == "assert add(2, 2) == 4"
    assert (half.info["passed"], half.info["total"], half.metrics["passed"]) == (1, 2, 0.5)
    assert (half.metrics["wrong"], half.metrics["ok"], right.metrics["ok"]) == (1.0, 0.0, 1.0)
    assert all(score.status is ScoreStatus.OK for score in (right, half, none))


def test_only_the_answer_counts_not_the_thinking(code: RewardFunction):
    thought = f"<think>{RIGHT}</think>{HALF}"
    answered = f"<think>{HALF}</think>{RIGHT}"
    cut_off = f"<think>maybe\n{RIGHT}"
    values = [score.info["status"] for score in scores(code, *map(sample, (thought, answered, cut_off)))]
    assert values == ["wrong", "ok", "no-code"]
    assert scores(code, sample(RIGHT, prompt="Write add. <think>"))[0].info["status"] == "no-code"


def test_a_broken_row_fails_its_sample_only(code: RewardFunction):
    broken = {"tests": ["assert ("], "entry_point": "add"}
    found = scores(code, sample(RIGHT, {}), sample(RIGHT), sample(RIGHT, broken))
    assert [score.value for score in found] == [None, 1.0, None]
    assert [score.status for score in found] == [ScoreStatus.ERROR, ScoreStatus.OK, ScoreStatus.ERROR]
    assert "neither" in found[0].info["error"] and "broken" in found[2].info["error"]


def test_travels_to_another_process(code: RewardFunction):
    assert scores(code, sample(RIGHT))[0].value == 1.0
    travelled = pickle.loads(pickle.dumps(code.fn))
    try:
        assert [score.value for score in travelled([sample(RIGHT)])] == [1.0]
    finally:
        travelled.close()


def test_settings_are_checked_when_the_reward_is_made():
    wrong: list[dict[str, Any]] = [{"mode": "some"}, {"style": "prose"}, {"timeout_s": -1}]
    for settings in wrong:
        with pytest.raises(ValueError, match="must be"):
            code_reward(**settings)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_grade_file(working: None, tmp_path: Path):
    rows = [
        {"id": "a", "code": "def add(a, b): return a + b", **ROW},
        {"id": "b", "code": "def add(a, b): return 3", **ROW},
        {"id": "c", "code": "while True: pass", **ROW},
        {"id": "d", "code": "", **ROW},
        {"id": 5, "code": "print(input())", "tests": [{"input": "x", "output": "x"}]},
    ]
    said: list[str] = []
    summary = grade_file(
        write_rows(tmp_path / "in.jsonl", rows),
        tmp_path / "out.jsonl",
        limits=Limits(timeout_s=2),
        announce=said.append,
    )
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["value"], row["status"]) for row in out] == [
        ("a", 1.0, "ok"), ("b", 0.0, "wrong"), ("c", 0.0, "timeout"), ("d", 0.0, "no-code"), (5, 1.0, "ok"),
    ]  # fmt: skip
    assert 2 <= out[2]["seconds"] < 4 and out[3]["seconds"] == 0
    assert (summary.num_programs, summary.mean_value, summary.counts["ok"]) == (5, 0.4, 2)
    assert said == [summary.description] and summary.text().startswith("code sandbox: ")


def test_grade_file_names_the_line_that_is_no_task(tmp_path: Path):
    path = write_rows(tmp_path / "in.jsonl", [{"id": 1, "code": "x", **ROW}, {"id": 2, "code": "x"}])
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: .*neither"):
        grade_file(path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="line 1: a row is an object"):
        grade_file(write_rows(path, [{"id": 1, **ROW}]), tmp_path / "out.jsonl")


def test_process_ends_although_nobody_closed_the_reward(working: None):
    source = (
        "from rewards.code_reward import code_reward\nfrom rewards.base import Sample\n"
        f"f = code_reward()\nprint(f.score(Sample(prompt='', completion={RIGHT!r}, row={ROW!r})).value)\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, cwd=root)
    assert ended.stdout.splitlines()[-1] == "1.0", ended.stderr
