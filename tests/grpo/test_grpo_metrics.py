"""Pins the metrics files.

1. `metrics.jsonl` has one object per step; TensorBoard has the same numbers.
2. A run that continues drops the rows it will write again, in both.
3. A last line cut short by a crash is left out; damage anywhere else is an error that names the line.
4. wandb and trackio get the same numbers and the configuration; a resumed run goes on in the same tracked run; one that
   is not installed is named, with how to get it.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.metrics import MetricsLogger, Tracker, check_trackers, read_metrics


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def write_rows(run_dir: Path, steps: range, *, resume_from: int, offset: float = 0.0) -> None:
    logger = MetricsLogger(run_dir, resume_from=resume_from)
    for step in steps:
        logger.log(step, {"reward/mean": step + offset, "policy/loss": -0.5})
    logger.close()


def wait_for_the_next_second() -> None:
    """TensorBoard orders its files by the second in their names."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def test_rows_and_tensorboard(tmp_path: Path) -> None:
    write_rows(tmp_path, range(3), resume_from=0)
    assert read_metrics(tmp_path) == [{"step": n, "reward/mean": float(n), "policy/loss": -0.5} for n in range(3)]
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert scalars(tmp_path, "policy/loss") == [(0, -0.5), (1, -0.5), (2, -0.5)]


def test_resume_drops_later_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, range(5), resume_from=0)
    wait_for_the_next_second()
    write_rows(tmp_path, range(3, 6), resume_from=3, offset=0.25)
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3.25, 4.25, 5.25]
    assert scalars(tmp_path, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 3.25), (4, 4.25), (5, 5.25)]


def test_rows_dropped_at_once(tmp_path: Path) -> None:
    """Before the first new row, so that a second crash leaves no old row behind."""
    write_rows(tmp_path, range(5), resume_from=0)
    MetricsLogger(tmp_path, resume_from=2).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_start_over_in_the_same_folder(tmp_path: Path) -> None:
    write_rows(tmp_path, range(5), resume_from=0)
    write_rows(tmp_path, range(1), resume_from=0, offset=0.25)
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0.25]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_half_a_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    write_rows(tmp_path, range(3), resume_from=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-1][:-cut])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    write_rows(tmp_path, range(2, 4), resume_from=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path, range(3), resume_from=0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
    damaged = path.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON; the file was damaged"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsLogger(tmp_path, resume_from=3)
    assert path.read_text() == damaged, "the evidence is kept"


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


STUB = """
import json
CALLS = __file__.removesuffix(".py") + ".calls"

def note(*call):
    with open(CALLS, "a") as file:
        file.write(json.dumps(call) + "\\n")

class config:
    update = staticmethod(lambda values, allow_val_change: note("config", values))

class Run:
    log = staticmethod(lambda values, step: note("log", step, values))
    finish = staticmethod(lambda: note("finish"))

def init(**arguments):
    note("init", arguments)
    return Run
"""
"""In place of a tracker's package: writes down how it is called."""


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)
    PartialState._reset_state()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_same_and_go_on(name: Tracker, stubs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"trainer": {"steps": 2}}')
    for first in (0, 1):
        logger = MetricsLogger(run_dir, first, trackers=(name,))
        for step in range(first, 2):
            logger.log(step, {"reward/mean": step / 3})
        logger.close()
    calls = [json.loads(line) for line in (stubs / f"{name}.calls").read_text().splitlines()]
    kinds = [call[0] for call in calls]
    assert kinds == ["init", "config", "log", "log", "finish", "init", "config", "log", "finish"]
    assert calls[0] == calls[5] and calls[0][1]["project"] == "grpo" and calls[0][1]["resume"] == "allow"
    run_id = (run_dir / "tracker_id").read_text()
    assert calls[0][1]["name"] == f"my_run-{run_id}" and (name == "trackio" or calls[0][1]["id"] == run_id)
    assert calls[1][1] == {"trainer": {"steps": 2}}
    assert [call[1:] for call in calls if call[0] == "log"] == [[n, {"reward/mean": n / 3}] for n in (0, 1, 1)]
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1]


def test_trackers_are_optional_and_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails from now on
    with pytest.raises(ValueError, match="trackers: wandb is not installed; run `pip install wandb`, or leave it out"):
        check_trackers(("wandb",))
    MetricsLogger(tmp_path, 0).close()
    assert not (tmp_path / "tracker_id").exists()
