"""The quickstart's report: one HTML file with the table, the curves and three groups, readable without a server.

Everything that a model wrote is escaped.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from grpo.metrics import read_metrics, read_rows

_CURVES = (
    ("reward/math_answer", "accuracy on training problems"),
    ("reward/thinking_length", "thinking, words"),
    ("reward/r1_format", "right format"),
    ("policy/entropy", "entropy per token"),
    ("mismatch/abs_max", "largest |log-probability difference| between engine and learner"),
    ("groups/without_spread", "groups whose rewards are all equal"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } figure { display: inline-block; margin: .5rem }
figcaption { font-size: 13px } svg { background: #fafafa } pre { white-space: pre-wrap; background: #f6f6f6; padding:
.6rem } .right { border-left: 4px solid #2a7 } .wrong { border-left: 4px solid #c55 }
"""


def curve(points: Sequence[tuple[float, float]], width: int = 360, height: int = 150) -> str:
    """A line through (step, value) points as SVG, with the extremes of both axes written beside it."""
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(min(ys), 0.0), max(ys)
    pad = 28

    def place(x: float, y: float) -> str:
        across = pad + (x - left) / ((right - left) or 1) * (width - 2 * pad)
        down = height - pad - (y - low) / ((high - low) or 1) * (height - 2 * pad)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    return (
        f'<svg width="{width}" height="{height}" role="img">'
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>'
        f'<g font-size="11" fill="#666"><text x="2" y="{pad - 8}">{high:.3g}</text>'
        f'<text x="2" y="{height - pad + 4}">{low:.3g}</text>'
        f'<text x="{pad}" y="{height - 8}">step {left:.0f}</text>'
        f'<text x="{width - pad}" y="{height - 8}" text-anchor="end">{right:.0f}</text></g></svg>'
    )


def example_groups(run_dir: Path) -> list[dict[str, Any]]:
    """Three groups with right and wrong completions, if there are: of the first, a middle and the last logged step."""
    records = read_rows(run_dir / "groups.jsonl")
    if not records:
        return []
    steps = sorted({record["step"] for record in records})
    chosen = []
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        of_step = [record for record in records if record["step"] == step]
        chosen.append(max(of_step, key=lambda record: len({row["reward"] for row in record["completions"]})))
    return chosen


def _group_html(record: dict[str, Any]) -> str:
    completions = "".join(
        f'<pre class="{"right" if row["metrics"].get("math_answer") else "wrong"}">'
        f"reward {'-' if row['reward'] is None else format(row['reward'], '.2f')} | {escape(row['text'])}</pre>"
        for row in record["completions"][:6]
    )
    return f"<h3>step {record['step']}</h3><pre>{escape(record['prompt'])}</pre>{completions}"


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before RL, after RL): the numbers of the summary as a person reads them."""

    def accuracy(name: str) -> str:
        low, high = summary[f"accuracy_{name}_low"], summary[f"accuracy_{name}_high"]
        return f"{summary[f'accuracy_{name}']:.1%} ({low:.1%} to {high:.1%})"

    def row(title: str, key: str, form: str) -> tuple[str, str, str]:
        return title, format(summary[f"{key}_before"], form), format(summary[f"{key}_after"], form)

    return [
        (
            f"accuracy on {summary['num_heldout']} held-out problems (95% interval)",
            accuracy("before"),
            accuracy("after"),
        ),
        row("in the right format", "format", ".1%"),
        row("thinking, words", "think", ".1f"),
        row("completions that write out every step", "full_chain_share", ".1%"),
        row("accuracy of those", "full_chain_accuracy", ".1%"),
        row(f"control: thought forbidden (guessing: {summary['guessing_floor']:.0%})", "no_thought_accuracy", ".1%"),
    ]


def _table_html(summary: dict[str, Any]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in table_rows(summary)
    )
    return f"<table><tr><th></th><th>before RL</th><th>after RL</th></tr>{rows}</table>"


def write_report(out: Path, summary: dict[str, Any], run_dir: Path) -> Path:
    """Writes `report.html` into `out` from the summary and the run's own files; its path."""
    metrics = read_metrics(run_dir)
    figures = "".join(
        f"<figure>{curve([(row['step'], row[name]) for row in metrics if name in row])}"
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for name, title in _CURVES
    )
    others = {k: v for k, v in summary.items() if not k.endswith(("_before", "_after", "_low", "_high"))}
    body = f"""<h1>R1-Zero in miniature</h1>
<p>A base model, pretrained from text in this run, mostly answers at once and is then barely better than guessing
({summary["guessing_floor"]:.0%}). In {summary["full_chain_share_before"]:.1%} of its completions it writes out every
step, and is then right {summary["full_chain_accuracy_before"]:.1%} of the time. GRPO, rewarded for right answers and
the right form alone, <b>draws out and sharpens that behaviour; it does not create it</b>. The control: with an empty
thought forced on the model, accuracy is {summary["no_thought_accuracy_before"]:.1%} before and
{summary["no_thought_accuracy_after"]:.1%} after RL.</p> {_table_html(summary)} <p>Shares and accuracies are of
{summary["num_heldout"]} held-out problems, one completion each, sampled at the training temperature; <i>think</i>
counts words between the think tags.</p> <h2>Curves</h2>{figures} <h2>Groups</h2>{
        "".join(_group_html(record) for record in example_groups(run_dir))
    } <h2>The run</h2><pre>{escape(json.dumps(others, indent=2))}</pre>"""
    path = out / "report.html"
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>R1-Zero in miniature</title><style>{_STYLE}</style>{body}'
    )
    return path
