"""Removes from a training set what evaluation sets contain.

    grpo decontaminate corpus.jsonl --against gsm8k/test.jsonl math500/test.jsonl --out clean.jsonl

writes the rows that share no passage with an evaluation text, unchanged and in order, and beside them
`clean.jsonl.report.json` with every match and both texts. What counts as a passage is in overlap.py.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from pipelines.console import console
from pipelines.data import iter_rows
from pipelines.overlap import Overlap, evaluation_texts, row_texts

_SHOWN_CHARS = 2000
_ROWS_PER_NOTE = 100_000


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """`grpo decontaminate`: a training set without what evaluation sets contain."""

    data: Positional[str] = ""
    """Training set: file, glob or hub id."""
    against: tuple[str, ...] = ()
    """Evaluation sets: files, globs or hub ids."""
    out: str = ""
    """File for the clean rows, .jsonl."""
    split: str = "train"
    """Split of a training set from the hub."""
    against_split: str = "test"
    """Split of evaluation sets from the hub."""
    ngram: int = 13
    """Words in a row that a training text may not share; 13 as GPT-3, 8 is stricter."""
    max_shared: int = 10
    """Passages in the rows of more evaluation problems than this are form and do not count."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""

    def __post_init__(self) -> None:
        if self.ngram < 2 or self.max_shared < 1:
            raise ValueError(f"need ngram >= 2 and max_shared >= 1, got {self.ngram} and {self.max_shared}")


def run_decontaminate(config: DecontaminateConfig) -> Path:
    """The whole of `grpo decontaminate`; the file of clean rows."""
    out = Path(config.out)
    if not config.data or not config.against or not config.out:
        raise ValueError("need a training set, --against FILE... and --out FILE.jsonl")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    overlap = Overlap(
        evaluation_texts(config.against, config.against_split), ngram=config.ngram, max_shared=config.max_shared
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.new")
    matches: list[dict[str, Any]] = []
    bad: list[str] = []
    total = 0
    with fresh.open("w", encoding="utf-8") as file, console.status("comparing"):
        for total, where, row in iter_rows(config.data, config.split):
            if total % _ROWS_PER_NOTE == 0:
                console.print(f"{total:,} rows, {len(matches):,} contaminated")
            questions, others = ([], []) if isinstance(row, str) else row_texts(row)
            if isinstance(row, str) or not questions + others:
                bad.append(f"{where}: {row if isinstance(row, str) else 'no text in a field that is known'}")
            elif match := overlap.find(questions + others, questions):
                matches.append({
                    "row": where, "evaluation": match.where, "passage": match.passage,
                    "text": "\n".join(questions + others)[:_SHOWN_CHARS],
                    "evaluation_text": match.evaluation_text[:_SHOWN_CHARS],
                })  # fmt: skip
            else:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    if len(bad) > config.max_bad_share * total:
        fresh.unlink()
        raise ValueError(f"{config.data}: {len(bad)} of {total} rows are malformed; first: {bad[0]}")
    report = {
        "rows": total, "malformed": len(bad), "contaminated": len(matches), "ngram": config.ngram,
        "by_evaluation_file": Counter(match["evaluation"].rpartition(", ")[0] for match in matches), "matches": matches,
    }  # fmt: skip
    out.with_name(f"{out.name}.report.json").write_text(json.dumps(report, indent=2) + "\n")
    fresh.replace(out)
    console.print(
        f"{total:,} rows, {len(matches):,} contaminated and {len(bad):,} malformed left out; clean rows in {out}, "
        f"matches in {out.name}.report.json",
        soft_wrap=True,
    )
    return out
