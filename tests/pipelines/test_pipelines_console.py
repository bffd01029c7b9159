"""Progress where the output is no terminal: plain lines, a tenth of the way apart, with the time left."""

import pytest

from pipelines import console


def test_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, *(float(step) for step in range(1, 100))])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress_bar("training", 40) as bar:
        for step in range(5):
            bar.advance(f"reward {step}", steps=7)
        bar.advance("end", steps=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["7/40", "14/40", "21/40", "28/40", "35/40", "40/40"]
    assert lines[0] == "training 7/40  5 s left  reward 0"  # 7 steps took a second, 33 are left
    assert lines[-1] == "training 40/40  0 s left  end"


def test_lines_are_a_tenth_of_the_way_apart(capsys: pytest.CaptureFixture[str]):
    with console.progress_bar("sampling", 256) as bar:
        for _ in range(256):
            bar.advance("")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].startswith("sampling 26/256") and lines[-1].startswith("sampling 256/256")
