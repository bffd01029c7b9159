"""Rewards on their own: try a function on stored completions, grade files of answers or of programs.

    grpo reward test my_rewards.py:short completions.jsonl
    grpo reward math PAIRS.jsonl --out OUT.jsonl [--policy strict]
    grpo reward code PROGRAMS.jsonl --out OUT.jsonl [--allow-unsafe-code] [--sandbox-url URL]

Rows for `test`: {"prompt", "completion", ...columns}, or the records of `grpo eval`. What they may also have:
completion_ids, finish_reason, group_id, index, step; without group_id, equal prompts are a group.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pipelines.console import console
from pipelines.data import NumberedRow, load_rows
from rewards import Sample, Score, load_reward

_BINS = 10
_BAR_WIDTH = 40
_SAMPLE_FIELDS = ("completion_ids", "finish_reason", "group_id", "index", "step")
_SHOWN_CHARS = 300


class RewardAction:
    """One of the three things that `grpo reward` does."""


@dataclass(frozen=True, kw_only=True)
class TryReward(RewardAction):
    """`grpo reward test`: what a reward says about stored completions."""

    reward: Annotated[Positional[str], arg(metavar="REWARD")] = ""
    """The reward, `[weight*]name` or `[weight*]path/to/file.py:function`."""
    data: Annotated[Positional[str], arg(metavar="DATA.jsonl")] = ""
    """The completions."""
    limit: int = 0
    """Completions to score, 0 for all."""
    show: int = 3
    """Failures to show in full."""


@dataclass(frozen=True, kw_only=True)
class GradeMath(RewardAction):
    """`grpo reward math`: compare answers with gold answers."""

    pairs: Annotated[Positional[str], arg(metavar="PAIRS.jsonl")] = ""
    """Rows {id, gold, pred, kind}, kind "answer" or "completion"."""
    out: str = ""
    """File for the verdicts."""
    policy: str = "strict"
    """How much notation is forgiven, see docs/math_answers.md."""


@dataclass(frozen=True, kw_only=True)
class GradeCode(RewardAction):
    """`grpo reward code`: run programs against their tests, in a sandbox."""

    programs: Annotated[Positional[str], arg(metavar="PROGRAMS.jsonl")] = ""
    """Rows {id, code, entry_point, tests}."""
    out: str = ""
    """File for the results."""
    allow_unsafe_code: bool = False
    """Run programs with resource limits alone where no sandbox works."""
    sandbox_url: str = ""
    """A sandbox server to use instead of this machine."""


REWARD_ACTIONS: dict[str, Callable[[], RewardAction]] = {"test": TryReward, "math": GradeMath, "code": GradeCode}


def run_reward(config: RewardAction) -> int:
    """The whole of `grpo reward`; exit status 1 if a tested reward failed on a sample."""
    if isinstance(config, TryReward):
        _need("test REWARD DATA.jsonl", config.reward, config.data)
        return _test(config)
    if isinstance(config, GradeMath):
        from rewards.math_pairs import grade_file as grade_pairs

        _need("math PAIRS.jsonl --out OUT.jsonl", config.pairs, config.out)
        for name, value in grade_pairs(Path(config.pairs), Path(config.out), config.policy).items():
            _print(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")
    else:
        assert isinstance(config, GradeCode)
        from rewards.code_programs import grade_file as grade_programs

        _need("code PROGRAMS.jsonl --out OUT.jsonl", config.programs, config.out)
        summary = grade_programs(
            Path(config.programs),
            Path(config.out),
            sandbox=config.sandbox_url or "auto",
            allow_unsafe_code=config.allow_unsafe_code,
            announce=_print,
        )
        _print(summary.text().splitlines()[-1])  # the first line has been announced
    return 0


def _need(usage: str, *values: str) -> None:
    if not all(values):
        raise ValueError(f"something is missing: grpo reward {usage}")


def _test(config: TryReward) -> int:
    if config.limit < 0 or config.show < 0:
        raise ValueError(f"limit and show must be >= 0, got {config.limit} and {config.show}")
    function = load_reward(config.reward)
    rows = load_rows(config.data, split="train", check=_row_problem, max_bad_share=0.0, report=_print)
    groups = read_groups(rows[: config.limit or None])
    started = time.perf_counter()
    scored = function.score_groups(groups)
    seconds = time.perf_counter() - started
    samples = [sample for group in groups for sample in group]
    scores = [score for group in scored for score in group]
    _print(f"{function.name}: {len(scores)} samples in {len(groups)} groups, {seconds:.2f} s")
    for line in describe_scores(scores):
        _print(line)
    flat = sum(len(group) > 1 and len({score.value for score in group}) == 1 for group in scored)
    if any(len(group) > 1 for group in groups):
        _print(f"groups without spread: {flat} of {len(groups)}")
    _show_failures(list(zip(samples, scores, strict=True)), config.show)
    return int(any(score.status.is_failure() for score in scores))


def _print(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)


def _row_problem(row: dict[str, Any]) -> str | None:
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            return f"field {name!r} is missing or not a text"
    return None


def read_groups(rows: Sequence[NumberedRow]) -> list[list[Sample]]:
    """Rows as samples, grouped by group_id, or by prompt where there is none. ValueError for a field that is wrong."""
    groups: dict[str, list[Sample]] = {}
    for row in rows:
        known = {name: row.row[name] for name in _SAMPLE_FIELDS if row.row.get(name) is not None}
        if "completion_ids" in known:
            known["completion_ids"] = tuple(known["completion_ids"])
        group = groups.setdefault(str(known.get("group_id", row.row["prompt"])), [])
        nested = row.row.get("row")
        columns = nested if isinstance(nested, dict) else row.row
        own = ("prompt", "completion", *_SAMPLE_FIELDS) if columns is row.row else ()
        group_id = group[0].group_id if group else f"line {row.number}"
        settings = {"group_id": group_id, "index": len(group)} | known
        try:
            sample = Sample(
                prompt=row.row["prompt"],
                completion=row.row["completion"],
                row={name: value for name, value in columns.items() if name not in own},
                **settings,
            )
        except ValueError as error:
            raise ValueError(f"line {row.number}: {error}") from None
        group.append(sample)
    return list(groups.values())


def describe_scores(scores: Sequence[Score]) -> list[str]:
    """Lines with the distribution of the values, how many are missing and why, the metrics and the time."""
    values = sorted(score.value for score in scores if score.value is not None)
    count = len(scores)
    lines: list[str] = []
    if values:
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        median = values[len(values) // 2]
        lines.append(
            f"value: mean {mean:.4g}, standard deviation {deviation:.4g}, min {values[0]:.4g}, median {median:.4g}, "
            f"max {values[-1]:.4g}"
        )
        lines += _histogram(values)
    statuses = Counter(score.status.value for score in scores)
    missing = sum(score.value is None and not score.status.is_failure() for score in scores)
    lines += [
        f"{what}: {number} ({number / count:.1%})"
        for what, number in (("None", missing), ("errors", statuses["error"]), ("timeouts", statuses["timeout"]))
    ]
    named: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.metrics.items():
            named.setdefault(name, []).append(value)
    lines += [f"metric {name}: mean {sum(of_name) / len(of_name):.4g}" for name, of_name in sorted(named.items())]
    times = sorted(score.seconds for score in scores)
    lines.append(
        f"time per sample: mean {_time(sum(times) / count)}, median {_time(times[count // 2])}, max {_time(times[-1])}"
    )
    return lines


def _histogram(values: Sequence[float]) -> list[str]:
    """A line per value if there are few, else per tenth of the range."""
    counts: Iterable[tuple[str, int]]
    distinct = Counter(values)
    if len(distinct) <= _BINS:
        counts = [(f"{value:.4g}", number) for value, number in sorted(distinct.items())]
    else:
        low, width = values[0], (values[-1] - values[0]) / _BINS
        bins = Counter(min(int((value - low) / width), _BINS - 1) for value in values)
        counts = [(f"{low + i * width:.4g} to {low + (i + 1) * width:.4g}", bins[i]) for i in range(_BINS)]
    longest = max(number for _, number in counts)
    indent = max(len(title) for title, _ in counts) + 2
    return [f"{title:>{indent}}  {'#' * -(-number * _BAR_WIDTH // longest)} {number}" for title, number in counts]


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def _show_failures(scored: Sequence[tuple[Sample, Score]], show: int) -> None:
    failed = [(sample, score) for sample, score in scored if score.status.is_failure()]
    missing = [(sample, score) for sample, score in scored if score.value is None and not score.status.is_failure()]
    for title, chosen in (("failure", failed), ("None", missing)):
        for number, (sample, score) in enumerate(chosen[:show], 1):
            _print(f"\n{title} {number} of {len(chosen)}: {sample.where()}")
            _print(f"  prompt     {sample.prompt[-_SHOWN_CHARS:]!r}\n  completion {sample.completion[:_SHOWN_CHARS]!r}")
            details = str(score.info.get("error") or dict(score.info)).strip()
            _print("\n".join(f"  {line}" for line in details.splitlines()))
