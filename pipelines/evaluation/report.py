"""An evaluation as a page of Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.evaluation.summary import EvalResult
from pipelines.statistics import Estimate

_SHOWN_FAILURES = 5
_SHOWN_CHARS = 200


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def interval(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(result: EvalResult, about: Mapping[str, Any]) -> str:
    """The whole page; `about` is what was evaluated and how, one line each."""
    what = "one completion per problem" if result.samples_per_problem == 1 else "mean over completions, by problem"
    parts = [
        "# Evaluation\n",
        table(("", ""), about.items()),
        "## Accuracy\n",
        f"**{percent(result.accuracy)}**, 95% interval {percent(result.accuracy_low)} to "
        f"{percent(result.accuracy_high)} ({what}).\n",
        _counts(result),
    ]
    if result.pass_at:
        rows = [
            (k, interval(value), interval(result.cons_at[k]) if k in result.cons_at else "", value.num_problems)
            for k, value in result.pass_at.items()
        ]
        parts += ["## Several completions\n", table(("k", "pass@k", "cons@k", "problems"), rows)]
    if result.extractors:
        rows = [(name, interval(one.accuracy), percent(one.answered)) for name, one in result.extractors.items()]
        parts += ["## Ways of reading the answer\n", table(("extractor", "accuracy", "found an answer"), rows)]
        if result.disagreements:
            parts.append(table(("right for", "completions"), result.disagreements.items()))
    parts += ["## Rewards and metrics\n", table(("", "mean"), ((n, f"{v:.4g}") for n, v in result.metrics.items()))]
    if result.failures:
        failed = [record for record in result.records if record["failure"]][:_SHOWN_FAILURES]
        rows = [(r["id"], r["failure"], r["error"][:_SHOWN_CHARS].replace("\n", " ")) for r in failed]
        parts += [f"## Failures, the first {len(rows)}\n", table(("completion", "kind", "error"), rows)]
    return "\n".join(parts)


def _counts(result: EvalResult) -> str:
    failures = ", ".join(f"{count} {kind}" for kind, count in sorted(result.failures.items())) or "none"
    rows = [
        ("problems", result.num_problems),
        ("completions per problem", result.samples_per_problem),
        ("problems not evaluated (not in the accuracy)", result.num_unscored),
        ("completions not scored", result.num_unscored_samples),
        ("failures", failures),
        ("accuracy if all that was not scored is wrong", percent(result.accuracy_of_all)),
        ("cut at the token limit", percent(result.truncated)),
        ("tokens per completion", f"{result.mean_tokens:.1f}"),
    ]
    if result.retries:
        rows.append(("retries asked for by the server", result.retries))
    return table(("", ""), rows)
