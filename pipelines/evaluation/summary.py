"""From records to numbers: accuracy, pass@k, cons@k, what was cut off, what failed, and the extractors side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from statistics import fmean
from typing import Any

from pipelines.evaluation.judge import Record
from pipelines.evaluation.voting import Vote, consensus
from pipelines.statistics import Estimate, mean_estimate, pass_at_k
from rewards import answers_equal


@dataclass(frozen=True, kw_only=True)
class ExtractorResult:
    """One way of reading the answers."""

    accuracy: Estimate
    answered: float
    """Share of completions in which it found an answer."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one evaluation found."""

    accuracy: float
    """Mean over problems of their share of right completions: avg@n, which is pass@1. Of scored ones only."""
    accuracy_low: float
    """Lower end of the 95% interval: Wilson's for one completion per problem, clustered by problem for several."""
    accuracy_high: float
    """Upper end."""
    standard_error: float = 0.0
    """Of the accuracy, clustered by problem."""
    accuracy_of_all: float = 0.0
    """The same with everything that was not scored counted as wrong: the accuracy cannot be lower."""
    num_problems: int
    num_unscored: int
    """Problems without a scored completion: prompt too long, completion failed, no gold answer; not in the accuracy."""
    samples_per_problem: int = 1
    num_unscored_samples: int = 0
    """Completions that failed or got no score."""
    failures: dict[str, int] = field(default_factory=dict)
    """Kind of failure -> completions; `no_room` are those of prompts too long to be evaluated."""
    retries: int = 0
    """Times that a server was busy and asked to come again."""
    truncated: float
    """Share of completions cut at the token limit."""
    mean_tokens: float = 0.0
    """Sampled tokens per completion."""
    pass_at: dict[str, Estimate] = field(default_factory=dict)
    """k -> pass@k."""
    cons_at: dict[str, Estimate] = field(default_factory=dict)
    """k -> accuracy of the majority of k answers."""
    metrics: dict[str, float]
    """Mean of each reward's value and metrics."""
    extractors: dict[str, ExtractorResult] = field(default_factory=dict)
    disagreements: dict[str, int] = field(default_factory=dict)
    """`a, not b` -> completions that extractor a calls right and b wrong."""
    seconds: float
    """Of sampling, by the process that finished it."""
    tokens_per_s: float
    """Tokens sampled in that time, per second."""
    records: list[Record]
    """One per completion, see docs/evaluation.md."""

    def summary(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "records"}


def default_ks(num_samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the number of samples itself; none for a single one, where all are the accuracy."""
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return (*powers, num_samples) if num_samples > 1 else ()


def is_right(record: Record, accuracy: str) -> bool | None:
    """None for a completion that failed or got no score."""
    return record["metrics"][accuracy] >= 1.0 if accuracy in record["metrics"] else None


def shares_right(records: Sequence[Record], accuracy: str) -> dict[str, float | None]:
    """Problem -> share of its scored completions that are right, None without any."""
    verdicts: dict[str, list[bool]] = {}
    for record in records:
        right = is_right(record, accuracy)
        verdicts.setdefault(record["prompt_id"], []).extend([] if right is None else [right])
    return {name: fmean(of_problem) if of_problem else None for name, of_problem in verdicts.items()}


def summarize(
    records: Sequence[Record], *, accuracy: str, ks: Sequence[int] = (), seconds: float = 0.0, new_tokens: int = 0
) -> EvalResult:
    """`accuracy` names the reward whose value 1 is a right answer; `ks` are those of pass@k and cons@k."""
    shares = shares_right(records, accuracy)
    known = [share for share in shares.values() if share is not None]
    estimate = mean_estimate(known)
    right = [is_right(record, accuracy) for record in records]
    scored = [record["metrics"] for record, verdict in zip(records, right, strict=True) if verdict is not None]
    completions = [record for record in records if not record["failure"]]
    sizes = Counter(record["prompt_id"] for record in records)
    right_of = Counter(r["prompt_id"] for r, verdict in zip(records, right, strict=True) if verdict)
    names = sorted({name for metrics in scored for name in metrics})
    return EvalResult(
        accuracy=estimate.value,
        accuracy_low=estimate.low,
        accuracy_high=estimate.high,
        standard_error=estimate.standard_error,
        accuracy_of_all=fmean(right_of[name] / size for name, size in sizes.items()),
        num_problems=len(shares),
        num_unscored=len(shares) - len(known),
        samples_per_problem=max(sizes.values()),
        num_unscored_samples=len(records) - len(scored),
        failures=dict(Counter(record["failure"] for record in records if record["failure"])),
        retries=sum(record["retries"] for record in records),
        truncated=_share([record["finish_reason"] == "length" for record in completions]),
        mean_tokens=_share([record["tokens"] for record in completions]),
        pass_at={str(k): _pass_at(records, accuracy, k) for k in ks},
        cons_at=_cons_at(records, accuracy, ks),
        metrics={name: fmean(metrics[name] for metrics in scored if name in metrics) for name in names},
        extractors=_extractors(records),
        disagreements=_disagreements(records),
        seconds=seconds,
        tokens_per_s=new_tokens / seconds if seconds else 0.0,
        records=list(records),
    )


def _share(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _scored_by_problem(records: Sequence[Record], accuracy: str) -> dict[str, list[Record]]:
    problems: dict[str, list[Record]] = {}
    for record in records:
        if is_right(record, accuracy) is not None:
            problems.setdefault(record["prompt_id"], []).append(record)
    return problems


def _pass_at(records: Sequence[Record], accuracy: str, k: int) -> Estimate:
    """Of the problems with at least k scored completions."""
    return mean_estimate(
        [
            pass_at_k(num_samples=len(scored), num_right=sum(is_right(r, accuracy) is True for r in scored), k=k)
            for scored in _scored_by_problem(records, accuracy).values()
            if len(scored) >= k
        ]
    )


def _cons_at(records: Sequence[Record], accuracy: str, ks: Sequence[int]) -> dict[str, Estimate]:
    """Of the problems with at least k scored completions; empty where the reward says no answers, as for programs."""
    problems = _scored_by_problem(records, accuracy)
    if not any("extracted" in record["info"].get(accuracy, {}) for scored in problems.values() for record in scored):
        return {}

    @cache
    def equal(one: str, other: str) -> bool:
        return answers_equal(one, other)[0]

    votes = {
        name: [Vote(answer=r["info"][accuracy]["extracted"], right=is_right(r, accuracy) is True) for r in scored]
        for name, scored in problems.items()
    }
    return {
        str(k): mean_estimate([consensus(of, k, equal, seed=name) for name, of in votes.items() if len(of) >= k])
        for k in ks
    }


def _extractors(records: Sequence[Record]) -> dict[str, ExtractorResult]:
    readings: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        for name, reading in record.get("extractors", {}).items():
            if reading is not None:
                readings.setdefault(name, {}).setdefault(record["prompt_id"], []).append(reading)
    return {
        name: ExtractorResult(
            accuracy=mean_estimate([fmean(reading["right"] for reading in of) for of in problems.values()]),
            answered=fmean(reading["answer"] is not None for of in problems.values() for reading in of),
        )
        for name, problems in readings.items()
    }


def _disagreements(records: Sequence[Record]) -> dict[str, int]:
    """Pairs of extractors in both directions, those that never disagree left out."""
    counts: Counter[str] = Counter()
    for record in records:
        known = {name: reading for name, reading in record.get("extractors", {}).items() if reading is not None}
        for one, other in combinations(known, 2):
            if known[one]["right"] != known[other]["right"]:
                right, wrong = (one, other) if known[one]["right"] else (other, one)
                counts[f"{right}, not {wrong}"] += 1
    return dict(sorted(counts.items()))
