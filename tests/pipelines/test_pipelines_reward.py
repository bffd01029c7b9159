"""`grpo reward`: trying a function on stored completions, the wiring of the graders, users' mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.data import NumberedRow
from pipelines.reward_command import describe_scores, read_groups
from rewards import Score, ScoreStatus
from rewards.sandbox_limits import SandboxError

FILE = """
from rewards import Score, reward

@reward(timeout_s=1)
def exact(completion: str, answer: str):
    if completion == "hang":
        while True:
            pass
    if completion == "none":
        return Score(value=None, info={"reason": "no idea"})
    return Score(value=1 / len(completion) if completion == answer else 0.0, metrics={"length": len(completion)})

@reward(group=True)
def place(samples):
    return [float(sample.index) for sample in samples]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    rows = [{"prompt": f"q{i // 3}", "completion": text, "answer": "4"} for i, text in enumerate("454444")]
    write(tmp_path / "good.jsonl", rows)
    rows += [{"prompt": "q", "completion": text, "answer": ""} for text in ("hang", "none", "")]
    write(tmp_path / "bad.jsonl", rows)
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_reward_that_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:exact", "good.jsonl"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "exact: 6 samples in 2 groups",
        "value: mean 0.8333, standard deviation 0.3727, min 0, median 1, max 1",
        "  0  ######## 1",
        "  1  ######################################## 5",
        "None: 0 (0.0%)",
        "errors: 0 (0.0%)",
        "timeouts: 0 (0.0%)",
        "metric length: mean 1",
        "time per sample: mean ",
        "groups without spread: 1 of 2",
    ):
        assert line in shown


def test_failures_are_shown_with_their_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:exact", "bad.jsonl", "--show", "1"]) == 1
    shown = capsys.readouterr().out
    assert "errors: 1 (11.1%)" in shown and "timeouts: 1 (11.1%)" in shown and "None: 1 (11.1%)" in shown
    assert "failure 1 of 2: the sample with group_id='line 7', index=0" in shown
    assert "completion 'hang'" in shown and "took longer than 1 s; the worker was killed" in shown
    assert "None 1 of 1" in shown and "{'reason': 'no idea'}" in shown
    assert "failure 2" not in shown


def test_group_rewards_and_limits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward", "test", "mine.py:place", "good.jsonl", "--limit", "5"]) == 0
    assert "place: 5 samples in 2 groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test", "mine.py:exact"], "something is missing: grpo reward test REWARD DATA.jsonl"),
        (["test"], "something is missing"),
        (["math", "good.jsonl"], "something is missing: grpo reward math PAIRS.jsonl --out OUT.jsonl"),
        (["code", "--out", "x"], "something is missing: grpo reward code PROGRAMS.jsonl --out OUT.jsonl"),
        (["test", "mine.py:nothing", "good.jsonl"], "mine.py has no 'nothing'; functions in it: exact, place"),
        (["test", "mine.py:exact", "missing.jsonl"], "data file missing.jsonl not found"),
        (["test", "mine.py:exact", "empty.jsonl"], "line 2: field 'completion' is missing or not a text"),
        (["test", "mine.py:exact", "odd.jsonl"], "line 1: finish_reason must be one of stop, length, abort, error"),
        (["test", "mine.py:exact", "good.jsonl", "--limits", "3"], "'--limits'; did you mean '--limit'?"),
        (["grade"], "unknown recipe 'grade'; known: test, math, code"),
        (["math", "missing.jsonl", "--out", "x"], "missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(folder / "empty.jsonl", [{"prompt": "q", "completion": "4"}, {"prompt": "q"}])
    write(folder / "odd.jsonl", [{"prompt": "q", "completion": "4", "finish_reason": "eos"}])
    assert cli.main(["reward", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo: error: ") and message in line


def test_rows_become_samples() -> None:
    stored = {"prompt": "q", "completion": "c", "completion_ids": [1, 2], "finish_reason": "length", "answer": "4"}
    evaluated = {"id": "x-1", "prompt": "q", "completion": "c", "row": {"answer": "5", "prompt": "raw"}, "value": 1.0}
    rows = [stored, evaluated, {**stored, "group_id": "own", "index": 7, "step": 2}]
    groups = read_groups([NumberedRow(number=i, row=row) for i, row in enumerate(rows, 1)])
    assert [[(sample.group_id, sample.index, sample.step) for sample in group] for group in groups] == [
        [("line 1", 0, 0), ("line 1", 1, 0)],
        [("own", 7, 2)],
    ]
    assert (groups[0][0].row, groups[0][0].completion_ids, groups[0][0].truncated) == ({"answer": "4"}, (1, 2), True)
    assert groups[0][1].row == {"answer": "5", "prompt": "raw"}


def test_a_histogram_of_many_values() -> None:
    lines = describe_scores([Score(value=i / 10) for i in range(101)] + [Score(value=None, status=ScoreStatus.ERROR)])
    assert lines[1].split() == ["0", "to", "1", "#" * 37, "10"]
    assert lines[10].split() == ["9", "to", "10", "#" * 40, "11"]
    assert "errors: 1 (1.0%)" in lines and "None: 0 (0.0%)" in lines


def test_grading_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    rows = [("a", "1/2", "0.5", "answer"), ("b", "4", "so 5 #### 5", "completion")]
    write(pairs, [{"id": i, "gold": gold, "pred": pred, "kind": kind} for i, gold, pred, kind in rows])
    assert cli.main(["reward", "math", str(pairs), "--out", str(out)]) == 0
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["verdict"], row["status"]) for row in graded] == [("a", True, "ok"), ("b", False, "ok")]
    assert all(row["seconds"] >= 0 for row in graded)
    assert "correct          1" in capsys.readouterr().out
    assert cli.main(["reward", "math", str(pairs), "--out", str(out), "--policy", "guess"]) == 2
    assert "policy must be one of" in capsys.readouterr().err


def test_grading_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    class Summary:
        def text(self) -> str:
            return "1 programs"

    def grade_file(programs: Path, out: Path, **settings: object) -> Summary:
        seen.update(settings, programs=programs, out=out)
        return Summary()

    monkeypatch.setattr("rewards.code_programs.grade_file", grade_file)
    assert cli.main(["reward", "code", "p.jsonl", "--out", "o.jsonl", "--allow-unsafe-code"]) == 0
    assert "1 programs" in capsys.readouterr().out
    assert (seen["programs"], seen["out"], seen["sandbox"]) == (Path("p.jsonl"), Path("o.jsonl"), "auto")
    assert seen["allow_unsafe_code"] is True
    cli.main(["reward", "code", "p.jsonl", "--out", "o.jsonl", "--sandbox-url", "http://box:8080"])
    assert (seen["sandbox"], seen["allow_unsafe_code"]) == ("http://box:8080", False)

    def refuse(*args: object, **settings: object) -> None:
        raise SandboxError("no sandbox works here; pass --allow-unsafe-code")

    monkeypatch.setattr("rewards.code_programs.grade_file", refuse)
    assert cli.main(["reward", "code", "p.jsonl", "--out", "o.jsonl"]) == 3, "the machine's fault, not the input's"
    assert capsys.readouterr().err.startswith("grpo: error: no sandbox works here; pass --allow-unsafe-code; ")


def test_grading_does_not_wait_for_torch(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [{"id": 1, "gold": "1", "pred": "1"}])
    code = "import sys; from pipelines.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    arguments = ["reward", "math", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)
    assert result.stdout.endswith("0 False\n"), result.stderr
