"""What `grpo doctor` says: one line per check."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.console import console

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    level: Literal["ok", "warning", "error"]
    check: str
    text: str
    """What was seen, with the numbers and, in a run, the step where it began."""
    remedy: str = ""
    """What to do or try; empty for `ok`."""
    seconds: float | None = None
    """That the check took, where it took any."""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({self.seconds:.1f} s)"
        return f"{self.level:<8} {self.check:<11} {self.text}{took}" + (f"; {self.remedy}" if self.remedy else "")


def show(finding: Finding) -> None:
    console.print(str(finding), style=_STYLES[finding.level], soft_wrap=True)


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if there is an error among them."""
    return int(any(finding.level == "error" for finding in findings))
