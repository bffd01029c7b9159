"""The quickstart's report.

Pinned: (1) nothing that a model, a prompt or a configuration says becomes markup; (2) one step is enough, and a run
without logged groups or without a metric still gets its report; (3) the table's numbers are those of the summary;
(4) the example groups are of the first, a middle and the last logged step, and show right beside wrong; (5) curves lie
inside their frame.
"""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import curve, example_groups, table_rows, write_report

ATTACK = "</pre><script>alert('x')</script> & <b onload=1>"
SUMMARY: dict[str, Any] = {
    "learned": True,
    "engine": "native",
    "guessing_floor": 0.1,
    "num_heldout": 512,
    "steps": 1,
    "rollout_tokens_per_s": 1234.5,
    **{
        f"{key}_{when}": value + shift
        for when, shift in (("before", 0.0), ("after", 0.5))
        for key, value in {
            "accuracy": 0.21,
            "format": 0.31,
            "think": 2.4,
            "no_thought_accuracy": 0.11,
            "full_chain_share": 0.07,
            "full_chain_accuracy": 0.49,
        }.items()
    },
    "accuracy_before_low": 0.18,
    "accuracy_before_high": 0.25,
    "accuracy_after_low": 0.67,
    "accuracy_after_high": 0.75,
}


class Page(HTMLParser):
    """Collects a page's elements and its text, and checks that elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        if tag not in ("meta", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def group(step: int, rewards: Sequence[float | None], text: str = "t", prompt: str = "p") -> dict[str, Any]:
    completions = [
        {"text": text, "reward": reward, "metrics": {} if reward is None else {"math_answer": reward}}
        for reward in rewards
    ]
    return {"step": step, "prompt_id": f"p-{step}", "prompt": prompt, "completions": completions}


def run_folder(folder: Path, steps: int, groups: list[dict[str, Any]]) -> Path:
    rows = [{"step": step, "reward/math_answer": 0.1 * step, "policy/entropy": 1.0} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if groups:
        (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    return folder


def report(folder: Path, summary: dict[str, Any] = SUMMARY) -> str:
    path = write_report(folder, summary, folder)
    assert path == folder / "report.html"
    return path.read_text()


def test_nothing_a_model_wrote_becomes_markup(tmp_path: Path) -> None:
    run_folder(tmp_path, 3, [group(0, [1.0, 0.0, None], text=ATTACK, prompt=f"Q {ATTACK}")])
    page = Page(report(tmp_path, SUMMARY | {"engine": ATTACK}))
    assert "script" not in page.elements
    text = "".join(page.texts)
    assert text.count(ATTACK) == 1 + 3 + 1, "prompt, three completions, summary: all of it shown as it was written"


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_a_run_of_few_steps_without_groups(tmp_path: Path, steps: int) -> None:
    page = Page(report(run_folder(tmp_path, steps, [])))
    assert page.elements.count("svg") == 2, "a curve for each metric that the run has"
    assert "h3" not in page.elements


def test_rewards_that_do_not_apply_are_shown_as_such(tmp_path: Path) -> None:
    html = report(run_folder(tmp_path, 1, [group(0, [None, None])]))
    assert html.count("reward - |") == 2


def test_the_table_has_the_numbers_of_the_summary(tmp_path: Path) -> None:
    rows = {title: (before, after) for title, before, after in table_rows(SUMMARY)}
    assert rows == {
        "accuracy on 512 held-out problems (95% interval)": ("21.0% (18.0% to 25.0%)", "71.0% (67.0% to 75.0%)"),
        "in the right format": ("31.0%", "81.0%"),
        "thinking, words": ("2.4", "2.9"),
        "completions that write out every step": ("7.0%", "57.0%"),
        "accuracy of those": ("49.0%", "99.0%"),
        "control: thought forbidden (guessing: 10%)": ("11.0%", "61.0%"),
    }
    texts = Page(report(run_folder(tmp_path, 1, []))).texts
    for title, (before, after) in rows.items():
        at = texts.index(title)
        assert texts[at + 1 : at + 3] == [before, after]
    said = " ".join("".join(texts).split())
    assert "draws out and sharpens that behaviour; it does not create it" in said
    assert "accuracy is 11.0% before and 61.0% after RL" in said, "the control"


def test_example_groups(tmp_path: Path) -> None:
    assert example_groups(tmp_path) == []
    mixed, flat = [1.1, 0.0, 0.1], [0.0, 0.0, 0.0]
    groups = [group(step, rewards) for step in (0, 10, 20, 30) for rewards in (flat, mixed, flat)]
    run_folder(tmp_path, 1, groups)
    chosen = example_groups(tmp_path)
    assert [record["step"] for record in chosen] == [0, 20, 30]
    assert [[row["reward"] for row in record["completions"]] for record in chosen] == [mixed] * 3


def test_a_run_that_logs_no_groups(tmp_path: Path) -> None:
    run_folder(tmp_path, 2, [])
    (tmp_path / "groups.jsonl").write_text("")
    assert example_groups(tmp_path) == []
    assert "h3" not in Page(report(tmp_path)).elements


VALUES = [[0.5], [0.0], [0.0, 0.0], [-1.0, -2.0], [1.0, 1.0], [0.0, 1e9, -1e9], [5e-324, 0.0]]


@pytest.mark.parametrize("values", VALUES)
def test_curves_lie_inside_their_frame(values: list[float]) -> None:
    svg = curve(list(enumerate(values)), width=360, height=150)
    points = re.search(r'points="([^"]*)"', svg)
    assert points is not None
    places = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert len(places) == len(values)
    assert all(28 <= x <= 332 and 28 <= y <= 122 for x, y in places)
    highest = max(range(len(values)), key=lambda i: values[i])
    assert places[highest][1] == min(y for _, y in places), "up is more"


def test_no_curve_without_points() -> None:
    assert curve([]) == ""
