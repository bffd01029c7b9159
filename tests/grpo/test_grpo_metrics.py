"""Pins the metrics files.

1. `metrics.jsonl` has one object per step; TensorBoard has the same numbers.
2. A run that continues drops the rows it will write again, in both.
3. A last line cut short by a crash is left out; damage anywhere else is an error that names the line.
"""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.metrics import MetricsLogger, read_metrics


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
