"""How far the sampler is from the learner, measured on the tokens that were sampled: probabilities and experts.

Both claim to hold the same weights, so any difference is numerics, stale weights or another model.

    meter.add(learner_logprobs_N, sampling_logprobs_N, lags_N)
    meter.add_experts(output.routing, expert_ids_TLK, num_sequences=8)
    meter.report()      # {"mismatch/abs_mean": ..., "mismatch/kl_k3": ..., "mismatch/other_experts": ...}

Shapes: T packed tokens, N trained tokens, L layers with experts, K experts per token, E experts.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.moe import Routing

QUANTILES = {"p0.1": 0.001, "p1": 0.01, "p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class MismatchMeter:
    """Accumulates over micro-batches; every token counts the same."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._lags: list[Tensor] = []
        self._rows = 0
        # [4] rows recorded in all layers; choices recorded; those with other experts; tokens with any such choice.
        self._experts: Tensor | None = None

    def add(self, learner_N: Tensor, sampler_N: Tensor, lags_N: Tensor | None = None) -> None:
        """Log-probabilities of the same sampled tokens, both at the sampling temperature; `lags_N` is by how many
        versions the sampler's weights were older, nought without it."""
        assert learner_N.shape == sampler_N.shape, f"{learner_N.shape} and {sampler_N.shape}"
        self._differences.append(learner_N.double() - sampler_N.double())
        self._lags.append(torch.zeros_like(learner_N, dtype=torch.long) if lags_N is None else lags_N)

    def add_experts(self, routing: Mapping[int, Routing], recorded_TLK: Tensor | None, num_sequences: int) -> None:
        """What the learner's routers chose themselves, replay or not, against the recording, -1 where there is none.

        The last token of each sequence is none that a sampler runs, so it is not missed.
        """
        if not routing:
            return
        chosen_TLK = torch.stack([routing[layer].chosen_TK for layer in sorted(routing)], dim=1)
        self._rows += len(chosen_TLK) - num_sequences
        if recorded_TLK is None:
            return
        is_recorded_TL = recorded_TLK[:, :, 0] >= 0
        differs_TL = (chosen_TLK.sort(-1).values != recorded_TLK.sort(-1).values).any(-1) & is_recorded_TL
        counts = (is_recorded_TL.all(1), is_recorded_TL, differs_TL, differs_TL.any(1))
        counted = torch.stack([of_kind.sum() for of_kind in counts])
        self._experts = counted if self._experts is None else self._experts + counted

    def merge(self, other: "MismatchMeter") -> None:
        """Adds what another rank has seen."""
        self._differences += other._differences
        self._lags += other._lags
        self._rows += other._rows
        if other._experts is not None:
            self._experts = other._experts if self._experts is None else self._experts + other._experts

    def report(self) -> dict[str, float]:
        """Under `mismatch/`: mean and largest |difference|; KL(sampler || learner) per token as k1 (unbiased, of either
        sign) and k3 (never negative); quantiles of pi_learner / pi_sampler; k3 per version lag, if there is any lag;
        shares of rows without recorded experts, of choices (token and layer) with other experts than the sampler's, as
        sets, and of tokens with any such choice."""
        report: dict[str, float] = {}
        if self._differences:
            d, lags = torch.cat(self._differences), torch.cat(self._lags)
            k3 = torch.expm1(d) - d
            report |= {
                "mismatch/abs_mean": d.abs().mean().item(),
                "mismatch/abs_max": d.abs().max().item(),
                "mismatch/kl_k1": -d.mean().item(),
                "mismatch/kl_k3": k3.mean().item(),
            }
            ordered = d.sort().values
            for name, share in QUANTILES.items():
                report[f"mismatch/ratio_{name}"] = ordered[round(share * (len(d) - 1))].exp().item()
            if lags.any():
                for lag in lags.unique().tolist():
                    report[f"mismatch/kl_k3_lag_{lag}"] = k3[lags == lag].mean().item()
        rows, choices, other_choices, other_tokens = [0] * 4 if self._experts is None else self._experts.tolist()
        if self._rows:
            report["mismatch/rows_without_experts"] = 1 - rows / self._rows
        if choices:
            report["mismatch/other_experts"] = other_choices / choices
            report["mismatch/tokens_with_other_experts"] = other_tokens / max(1, rows)
        return report


class MismatchAlarm:
    """Speaks up when the mismatch KL crosses a limit, once per crossing.

    Where both sides compute in float32, k3 is 1e-9 and less; 1e-4 means that something is wrong. In bfloat16, 6e-4 was
    measured on a dense 8B model and 1.5e-3 on a 30B mixture of experts without replay (arXiv:2510.11370); 1e-2 is far
    outside. Samples of older weights differ by what the policy has learnt since, and need a limit of their own.
    """

    def __init__(self, kl_limit: float, tell: Callable[[str], None]) -> None:
        self._limit, self._tell = kl_limit, tell
        self._is_above = False

    def check(self, report: Mapping[str, float]) -> dict[str, float]:
        """{"mismatch/alarm": 1.0} while the KL is above the limit, or not a number; nothing if none was measured."""
        kl = report.get("mismatch/kl_k3")
        if kl is None:
            return {}
        was_above, self._is_above = self._is_above, not kl <= self._limit  # a NaN must not pass
        if self._is_above and not was_above:
            largest = report.get("mismatch/abs_max", math.nan)
            self._tell(
                f"mismatch: KL(sampler || learner) is {kl:.2g} per token, allowed {self._limit:.2g}; the largest "
                f"log-probability difference is {largest:.2g}. The engine computes another policy than the learner: "
                "see sync/probe_difference and mismatch/other_experts; with a bfloat16 engine the limit should be 1e-2"
            )
        return {"mismatch/alarm": float(self._is_above)}
