"""Two evaluations of the same problems: how much better is the second, and can that be chance?

    grpo eval compare runs/eval-before runs/eval-after --out comparison.md

Most of the spread of an accuracy is which problems happen to be hard; it is the same for both, and drops out of the
difference by problem (arXiv:2411.00640).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pipelines.config import read_config
from pipelines.console import console
from pipelines.evaluation.config import EvalConfig
from pipelines.evaluation.judge import Record, read_records
from pipelines.evaluation.report import percent, table
from pipelines.evaluation.summary import shares_right
from pipelines.statistics import clustered_error, paired_interval, sign_test
from pipelines.tasks import get_task


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`grpo eval compare A B`: the difference of two evaluations of the same problems."""

    before: Annotated[Positional[str], arg(metavar="A")] = ""
    """Folder of the first evaluation."""
    after: Annotated[Positional[str], arg(metavar="B")] = ""
    """Folder of the second; differences are B - A."""
    out: str = ""
    """Markdown file for the comparison, besides a .json of the same name; none if empty."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two evaluations differ in; all numbers are of the problems that both scored."""

    accuracy_before: float
    accuracy_after: float
    difference: float
    """After - before."""
    low: float
    """Lower end of the 95% interval of the difference, paired by problem."""
    high: float
    standard_error: float
    """Of the difference, clustered by problem."""
    better: int
    """Problems of which more completions are right after than before."""
    worse: int
    p_value: float
    """That better and worse are equally probable: exact sign test, for one completion per problem McNemar's."""
    num_problems: int
    num_left_out: int
    """Problems that one of the two did not score."""
    same_prompts: bool
    """Whether the two models saw the same text; not so with another template."""


def compare(before: Sequence[Record], after: Sequence[Record], accuracy: str) -> Comparison:
    """Pairs by problem. Raises ValueError if the two do not have the same problems, or none that both scored."""
    rows_before, rows_after = _problems(before), _problems(after)
    if lacking := sorted(rows_before.keys() ^ rows_after.keys()):
        raise ValueError(
            f"the evaluations are not of the same problems: {len(lacking)} are in one only, such as {lacking[0]}; "
            "evaluate both with the same --data and --limit"
        )
    for name, record in rows_before.items():
        if record["row"] != rows_after[name]["row"]:
            raise ValueError(f"problem {name} is not the same in the two evaluations; use the same --data for both")
    shares_before, shares_after = shares_right(before, accuracy), shares_right(after, accuracy)
    pairs = [
        (first, second)
        for name, first in shares_before.items()
        if first is not None and (second := shares_after[name]) is not None
    ]
    if not pairs:
        raise ValueError("no problem was scored in both evaluations")
    differences = [second - first for first, second in pairs]
    low, high = paired_interval(differences)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        accuracy_before=fmean(first for first, _ in pairs),
        accuracy_after=fmean(second for _, second in pairs),
        difference=fmean(differences),
        low=low,
        high=high,
        standard_error=clustered_error(differences),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
        num_problems=len(pairs),
        num_left_out=len(shares_before) - len(pairs),
        same_prompts=all(record["prompt"] == rows_after[name]["prompt"] for name, record in rows_before.items()),
    )


def _problems(records: Sequence[Record]) -> dict[str, Record]:
    return {record["prompt_id"]: record for record in records}


def run_compare(config: CompareConfig) -> Comparison:
    """The whole of `grpo eval compare`."""
    if not (config.before and config.after):
        raise ValueError("name the folders of two evaluations: grpo eval compare A B")
    tasks = [_task_of(Path(folder)) for folder in (config.before, config.after)]
    if tasks[0] != tasks[1]:
        raise ValueError(f"the evaluations are of the tasks {tasks[0]!r} and {tasks[1]!r}: compare two of one task")
    before, after = read_records(Path(config.before)), read_records(Path(config.after))
    result = compare(before, after, get_task(tasks[0]).accuracy)
    console.print(_line(result), soft_wrap=True)
    if not result.same_prompts:
        console.print("the prompts differ: the two had other templates", style="bold red")
    if config.out:
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(config, result))
        path.with_suffix(".json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return result


def _task_of(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a `grpo eval` (no config.json)")
    return read_config(EvalConfig, folder / "config.json", default=EvalConfig()).task


def _line(result: Comparison) -> str:
    left_out = f"; {result.num_left_out} problems left out, not scored in both" if result.num_left_out else ""
    return (
        f"{percent(result.accuracy_before)} -> {percent(result.accuracy_after)}: difference "
        f"{100 * result.difference:+.1f} points (95% interval {100 * result.low:+.1f} to {100 * result.high:+.1f}), "
        f"{result.better} problems better, {result.worse} worse, p = {result.p_value:.2g}, "
        f"{result.num_problems} problems{left_out}"
    )


def _page(config: CompareConfig, result: Comparison) -> str:
    rows: list[tuple[str, Any]] = [
        ("A", config.before),
        ("B", config.after),
        ("accuracy of A", percent(result.accuracy_before)),
        ("accuracy of B", percent(result.accuracy_after)),
        ("difference, points", f"{100 * result.difference:+.1f}"),
        ("95% interval", f"{100 * result.low:+.1f} to {100 * result.high:+.1f}"),
        ("standard error", f"{100 * result.standard_error:.1f}"),
        ("problems better / worse", f"{result.better} / {result.worse}"),
        ("p-value, exact sign test", f"{result.p_value:.2g}"),
        ("problems", result.num_problems),
        ("left out, not scored in both", result.num_left_out),
        ("same prompts", "yes" if result.same_prompts else "no: other templates"),
    ]
    return f"# Comparison\n\n{table(('', ''), rows)}"
