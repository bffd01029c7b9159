"""The reward for GRPO: does the program in the completion pass the row's tests?

Usage: `code = code_reward(mode="fraction")`, then `Rubric([code]).score_groups(groups)`; on the command line
`code_reward(mode="fraction", timeout_s=10)`.

What a row must hold is in `rewards.code_task`; where the program is found in `rewards.code_extract`; what the sandbox
covers in `rewards.code_grade`. The sandbox is opened by the first sample, and the line about its tier printed then.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from rewards.base import RewardFunction
from rewards.code_extract import Style, extract_code
from rewards.code_grade import CodeGrader
from rewards.code_task import CodeResult, CodeStatus, Mode, task_from_row
from rewards.sample import Sample, Score, ScoreStatus
from rewards.sandbox_limits import Limits, SandboxError


def code_reward(
    *,
    mode: Mode = "all",
    sandbox: str = "auto",
    timeout_s: float = 6.0,
    total_timeout_s: float = 60.0,
    memory_mb: int = 1024,
    num_workers: int | None = None,
    packages: str | None = None,
    allow_unsafe_code: bool = False,
    style: Style = "chat",
    is_ambiguity_refused: bool = False,
    weight: float = 1.0,
    name: str = "code",
) -> RewardFunction:
    """Make a reward that is 1 for a program that passes all tests, else 0; or, in mode "fraction", the share it passes.

    `sandbox`: auto, bubblewrap, unshare, rlimits (with `allow_unsafe_code`), or the URL of a SandboxFusion server.
    `packages`: a folder of importable packages (pip install -t), visible to solutions and tests.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {', '.join(get_args(Style))}, got {style!r}")
    settings = {
        "sandbox": sandbox,
        "limits": Limits(timeout_s=timeout_s, total_timeout_s=total_timeout_s, memory_mb=memory_mb),
        "num_workers": num_workers,
        "packages": None if packages is None else Path(packages),
        "allow_unsafe_code": allow_unsafe_code,
    }
    return RewardFunction(
        fn=_Code(settings, mode, style, is_ambiguity_refused), name=name, weight=weight, batch=True, on_error="skip"
    )


class _Code:
    """The batch function; can travel to another process, where it opens a sandbox of its own."""

    def __init__(self, settings: dict[str, Any], mode: Mode, style: Style, is_ambiguity_refused: bool) -> None:
        self._settings = settings
        self._mode: Mode = mode
        self._style: Style = style
        self._is_ambiguity_refused = is_ambiguity_refused
        self._grader: CodeGrader | None = None
        self._grader_pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_grader": None, "_grader_pid": 0}

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        grader = self._open()
        with ThreadPoolExecutor(grader.num_workers) as threads:
            return list(threads.map(lambda sample: self._score(grader, sample), samples))

    def close(self) -> None:
        """Close the sandbox; the next call opens another."""
        grader, self._grader = self._grader, None
        if grader is not None and self._grader_pid == os.getpid():
            atexit.unregister(self.close)
            grader.close()

    def _open(self, announce: Callable[[str], object] = print) -> CodeGrader:
        if self._grader is None or self._grader_pid != os.getpid():
            self._grader, self._grader_pid = CodeGrader(**self._settings), os.getpid()
            atexit.register(self.close)
            announce(self._grader.description)
        return self._grader

    def _score(self, grader: CodeGrader, sample: Sample) -> Score:
        try:
            task = task_from_row(sample.row)
            extracted = extract_code(
                _answer(sample),
                entry_point=task.entry_point,
                is_ambiguity_refused=self._is_ambiguity_refused,
                style=self._style,
                prompt=str(sample.row.get("prompt") or sample.prompt),
            )
            result = grader.grade(task, extracted.code, stop_at_first=self._mode == "all")
        except (SandboxError, ValueError) as error:  # this sample's trouble, not the batch's
            return Score(value=None, info={"error": f"{type(error).__name__}: {error}"}, status=ScoreStatus.ERROR)
        return self._as_score(result, extracted.method)

    def _as_score(self, result: CodeResult, method: str) -> Score:
        metrics = {"passed": result.value("fraction") or 0.0}
        metrics |= {str(status): float(result.status is status) for status in CodeStatus}
        info = {
            "status": str(result.status),
            "passed": result.num_passed,
            "total": result.num_tests,
            "first_failure": result.first_failure,
            "reason": result.error,
            "method": method,
            "seconds": result.seconds,
        }
        is_broken = result.status is CodeStatus.ERROR
        return Score(
            value=result.value(self._mode),
            metrics={} if is_broken else metrics,
            info=info | ({"error": result.error} if is_broken else {}),
            status=ScoreStatus.ERROR if is_broken else ScoreStatus.OK,
        )


def _answer(sample: Sample) -> str:
    """What follows the thinking; "" where the thinking was opened and never closed."""
    is_open = sample.think_prefilled or "<think>" in sample.completion
    return "" if is_open and "</think>" not in sample.completion else sample.answer_part
