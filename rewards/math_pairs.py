"""Grading a file of (gold, prediction) pairs: what `grpo reward math PAIRS.jsonl --out OUT.jsonl` does.

This file reads and writes JSON Lines; the comparison is `math_compare.compare`, the extraction extract.py.

Usage: `grade_file(Path("pairs.jsonl"), Path("out.jsonl"), "strict").summary`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.extract import extract_answer, own_turn
from rewards.math_answer import read_gold
from rewards.math_compare import compare
from rewards.math_scalars import POLICIES, STRICT, MathPolicy

KINDS = ("answer", "completion")


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedPair:
    """The outcome of one pair."""

    verdict: bool | None
    """Whether the prediction is right; None where the gold cannot be read."""
    status: str
    """ "ok", or "unreadable gold"."""
    reason: str
    """The stage that decided, or the problem."""
    method: str
    """How the answer was extracted; "given" for a bare answer."""
    extracted: str | None
    """The answer that was compared."""
    seconds: float
    """Wall time."""


def grade_pair(gold: str, predicted: str, kind: str = "answer", policy: MathPolicy = STRICT) -> GradedPair:
    """Grade one prediction: a bare answer (kind "answer"), or a text to extract it from (kind "completion")."""
    if kind not in KINDS:
        raise ValueError(f"the kind of a pair must be one of {', '.join(KINDS)}, got {kind!r}")
    started = time.perf_counter()
    bare, problem = read_gold(gold)
    method, answer = ("given", predicted) if kind == "answer" else _final_answer(predicted)
    if bare is None:
        verdict, status, reason = None, "unreadable gold", problem
    elif answer is None:
        verdict, status, reason = False, "ok", "no answer found"
    else:
        outcome = compare(bare, answer, policy)
        verdict, status, reason = outcome.equal, "ok", outcome.reason
    seconds = time.perf_counter() - started
    return GradedPair(verdict=verdict, status=status, reason=reason, method=method, extracted=answer, seconds=seconds)


def _final_answer(completion: str) -> tuple[str, str | None]:
    """The method and the answer, read behind the thinking; nothing inside thinking that never ends."""
    _, closed, answer_part = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return "none", None
    found = extract_answer(own_turn(answer_part))
    return found.method, found.answer


def grade_file(pairs_path: Path | str, out_path: Path | str, policy: str = "strict") -> dict[str, Any]:
    """Grade every row {id, gold, pred, kind} of a file, write {id, verdict, status, seconds, ...}, return a summary.

    The summary counts rows, verdicts and unreadable golds, and, where the rows have an `expect`, agreement with it.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    rows = [json.loads(line) for line in Path(pairs_path).read_text(encoding="utf-8").split("\n") if line.strip()]
    graded: list[tuple[dict[str, Any], GradedPair]] = []
    with Path(out_path).open("w", encoding="utf-8") as out:
        for number, row in enumerate(rows, 1):
            missing = [key for key in ("id", "gold", "pred") if key not in row]
            if missing:
                raise ValueError(f"row {number} of {pairs_path} has no {missing[0]!r}; its keys: {', '.join(row)}")
            pair = grade_pair(str(row["gold"]), str(row["pred"]), row.get("kind", "answer"), POLICIES[policy])
            graded.append((row, pair))
            record = {
                "id": row["id"],
                "verdict": pair.verdict,
                "status": pair.status,
                "seconds": round(pair.seconds, 6),
                "method": pair.method,
                "extracted": pair.extracted and pair.extracted[:200],
                "reason": pair.reason,
            }
            out.write(json.dumps(record) + "\n")
    return _summary(graded, policy)


def _summary(graded: list[tuple[dict[str, Any], GradedPair]], policy: str) -> dict[str, Any]:
    seconds = sorted(pair.seconds for _, pair in graded) or [0.0]
    summary: dict[str, Any] = {
        "policy": policy,
        "rows": len(graded),
        "correct": sum(pair.verdict is True for _, pair in graded),
        "wrong": sum(pair.verdict is False for _, pair in graded),
        "unreadable_gold": sum(pair.verdict is None for _, pair in graded),
        "median_s": seconds[len(seconds) // 2],
        "max_s": seconds[-1],
    }
    expected = [(bool(row["expect"]), bool(pair.verdict)) for row, pair in graded if "expect" in row]
    if expected:
        summary["agreement"] = sum(a == b for a, b in expected) / len(expected)
        summary["false_positives"] = sum(b and not a for a, b in expected)
        summary["false_negatives"] = sum(a and not b for a, b in expected)
    return summary
