"""What one graded program may use, and the error for a sandbox that does not work.

Usage: `Limits(timeout_s=10, memory_mb=2048)`.
"""

import math
from dataclasses import dataclass


class SandboxError(RuntimeError):
    """The sandbox itself failed, which says nothing about the program; the message has the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of one sandbox; every one of them ends the program, none of them ends the grader."""

    timeout_s: float = 6.0
    """Wall time for all the calls of a function-style task, or for one case of a stdin-style task."""
    total_timeout_s: float = 60.0
    """Wall time for all cases of a stdin-style task together."""
    memory_mb: int = 1024
    """Address space of each process, and resident memory of all processes of a sandbox together."""
    max_processes: int = 32
    """Processes and threads of one sandbox."""
    tmp_mb: int = 64
    """Size of /tmp, the only place a program can write to."""
    max_files: int = 20_000
    """Files in /tmp."""
    max_output_bytes: int = 4 << 20
    """What a stdin-style program may print in one case."""

    def __post_init__(self) -> None:
        for name in (
            "timeout_s",
            "total_timeout_s",
            "memory_mb",
            "max_processes",
            "tmp_mb",
            "max_files",
            "max_output_bytes",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.memory_mb < 128:
            raise ValueError(f"memory_mb must be >= 128, a Python interpreter's need, got {self.memory_mb}")
        if self.max_processes < 4:
            raise ValueError(f"max_processes must be >= 4, the sandbox's own need, got {self.max_processes}")
