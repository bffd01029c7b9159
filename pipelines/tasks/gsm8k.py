"""GSM8K (arXiv:2110.14168): grade-school word problems; the gold answer stands behind `####` in `answer`."""

from typing import Any

from rewards import extract_answer


def check_row(row: dict[str, Any]) -> str | None:
    """None for a row with a question and a gold answer, else the reason."""
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            return f"field {key!r} is missing or not a text"
    if extract_answer(row["answer"], ("hash",)).answer is None:
        return "field 'answer' has no `#### result`"
    return None
