"""Which gradients are not applied, and what is said when that goes on: the guard before every optimizer step.

A step whose gradient norm is not finite, or far above the usual, is skipped: weights, optimizer and schedule stay as
they were. PaLM skipped the batches around a spike by hand (arXiv:2204.02311 section 5.1); ZClip (arXiv:2504.02507) and
AdaGC (arXiv:2502.11034) take the limit from past norms, as here. Their limits, made for pretraining, are a few times
the usual; batches of RL differ by more, with the number of groups that have spread, and clipping bounds a finite
gradient already. So ours compares with the median, which a few outliers do not move, and is off by default.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.sample_file import write_samples
from models import CausalLM
from models.parallel import local

WINDOW, MIN_NORMS = 100, 10
"""Norms of applied steps from which the median is taken, and how many it needs."""

TokenTerm = tuple[Tensor, Tensor, Tensor]
"""Of a micro-batch the place of the sample, the loss and the log-probability of each trained token, [N] each."""


@dataclass(frozen=True, kw_only=True)
class Culprits:
    """What is known about a skipped step."""

    reason: str
    parameters: list[str]
    """Whose gradient holds a number that is not finite."""
    samples: list[dict[str, Any]]
    """Place in the batch and what of it is not finite; if nothing is, the samples with the largest loss."""

    def write(self, folder: Path, batch: Sequence[TrainingSample], step: int) -> None:
        """`culprits.json`, and the batch beside it as `grpo.sample_file.read_samples` takes it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(folder / "batch.safetensors", batch, step)
        (folder / "culprits.json").write_text(json.dumps({"step": step, **asdict(self)}, indent=2) + "\n")


class StepsSkippedError(FloatingPointError):
    """More steps were skipped in a row than are allowed."""

    def __init__(self, message: str, culprits: Culprits, batch: Sequence[TrainingSample]) -> None:
        super().__init__(message)
        self.culprits, self.batch = culprits, batch

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.culprits, self.batch)  # else it could not come from another process


class StepGuard:
    """Remembers the norms of applied steps and how many were skipped in a row."""

    def __init__(self, norm_limit: float, max_skipped: int) -> None:
        """`norm_limit` in medians of past norms, 0 for none; `max_skipped` in a row."""
        self.norm_limit, self.max_skipped = norm_limit, max_skipped
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped_in_a_row = 0

    def judge(self, norm: float) -> str | None:
        """Why a step with this gradient norm is to be skipped; None if it is to be applied. Counts it either way."""
        reason = None
        if not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        elif self.norm_limit and len(self.norms) >= MIN_NORMS:
            usual = statistics.median(self.norms)
            if norm > self.norm_limit * usual:
                reason = f"the gradient norm is {norm:.3g}, the median of the last {len(self.norms)} is {usual:.3g}"
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if reason else 0
        if reason is None and norm > 0:  # a batch without spread says nothing about what is usual
            self.norms.append(norm)
        return reason

    def stop_if_exhausted(
        self, reason: str, step: int, model: CausalLM, batch: Sequence[TrainingSample], tokens: Sequence[TokenTerm]
    ) -> None:
        """Raises StepsSkippedError if too many steps were skipped in a row. To be called with the gradient still there,
        before it is clipped.
        """
        if self.skipped_in_a_row <= self.max_skipped:
            return
        parameters = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not torch.isfinite(local(p.grad)).all()
        ]
        message = (
            f"{self.skipped_in_a_row} optimizer steps in a row were skipped, {step} had been taken before; at last "
            f"{reason}. Lower the learning rate, or look for rewards or log-probabilities that are not finite"
        )
        culprits = Culprits(reason=reason, parameters=parameters, samples=samples_at_fault(batch, tokens))
        raise StepsSkippedError(message, culprits, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped_in_a_row = state["skipped_in_a_row"]


def samples_at_fault(batch: Sequence[TrainingSample], tokens: Sequence[TokenTerm]) -> list[dict[str, Any]]:
    """Per sample with a fault its place and the names of what is not finite; without any, the eight largest losses."""
    if not tokens:
        return []  # another rank than the one that holds the samples
    places_N, losses_N, logprobs_N = (torch.cat([x.cpu() for x in part]) for part in zip(*tokens, strict=True))
    rows = []
    for place in places_N.unique().tolist():
        of_sample, sample = places_N == place, batch[place]
        numbers = {
            "advantage": [sample.advantage],
            "sampling_logprobs": sample.sampling_logprobs,
            "logprobs": logprobs_N[of_sample].tolist(),
            "loss": losses_N[of_sample].tolist(),
        }
        bad = [name for name, values in numbers.items() if not all(map(math.isfinite, values))]
        rows.append({"sample": place, "loss": losses_N[of_sample].mean().item(), "not_finite": bad})
    at_fault = [row for row in rows if row["not_finite"]]
    return at_fault or sorted(rows, key=lambda row: -abs(row["loss"]))[:8]
