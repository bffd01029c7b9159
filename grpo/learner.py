"""The learner: holds the policy, turns training samples into optimizer steps, hands out its weights.

learner = Learner(model, LearnerConfig(lr=3e-4), total_steps=100)
report = learner.update(samples)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Aggregation, MicroBatch, TrainingSample, pack
from grpo.logprobs import token_logprobs
from grpo.losses import KLEstimator, clipped_policy_loss, kl_penalty
from grpo.mismatch import MismatchMeter
from grpo.schedule import Decay, learning_rate
from models import CausalLM, SequenceLayout
from models.balance import load_metrics
from models.moe import Routing
from rollout.weight_source import WeightSource


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Objective and optimizer."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises."""
    lr_decay: Decay = "constant"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    clip_low: float = 0.2
    """Probability ratios below 1 - clip_low get no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """Probability ratios above 1 + clip_high get no gradient where the advantage is positive."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against the initial policy; 0 keeps no copy of it."""
    kl_estimator: KLEstimator = "k3"
    """How that KL is estimated from sampled tokens."""
    aggregation: Aggregation = "token"
    """Average over all tokens of the batch, or over each sample's tokens first."""
    token_budget: int = 8192
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"lr must be >= 0, got {self.lr}")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 <= clip_low < 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0, got {self.grad_clip}; inf turns clipping off")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be >= 0, got {self.kl_coef}")
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be >= 1, got {self.token_budget}")


class Learner:
    """One copy of the policy in training, in this process."""

    def __init__(self, model: CausalLM, config: LearnerConfig, total_steps: int) -> None:
        """`total_steps` counts optimizer steps and only shapes the learning rate's decay."""
        self.model = model
        self.config = config
        self.total_steps = total_steps
        self.step = 0
        self.reference = copy.deepcopy(model).requires_grad_(False) if config.kl_coef else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """One optimizer step over all samples. Raises FloatingPointError if the gradient is not finite."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)  # an update that raised must not leave its gradient to this one
        meters = _Meters()
        for micro_batch in pack(samples, config.token_budget, config.aggregation):
            self._backward(micro_batch, meters)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} at optimizer step {self.step}; lower the learning rate, "
                "or look for rewards or log-probabilities that are not finite"
            )
        lr = learning_rate(
            self.step,
            peak=config.lr,
            warmup_steps=config.warmup_steps,
            total_steps=self.total_steps,
            decay=config.lr_decay,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return meters.report() | {"policy/grad_norm": norm.item(), "policy/lr": lr}

    def _backward(self, batch: MicroBatch, meters: "_Meters") -> None:
        config = self.config
        output = self.model(batch.ids_T, batch.layout)
        logprobs_N, entropies_N = self._logprobs(self.model, output.hidden_TD, batch)
        loss_N, cut_N = clipped_policy_loss(
            logprobs_N, batch.sampling_logprobs_N, batch.advantages_N, config.clip_low, config.clip_high
        )
        terms_N = loss_N
        if self.reference is not None:
            with torch.no_grad():
                hidden_TD = self.reference(batch.ids_T, batch.layout).hidden_TD
                reference_N, _ = self._logprobs(self.reference, hidden_TD, batch)
            kl_N = kl_penalty(logprobs_N, reference_N, config.kl_estimator)
            terms_N = loss_N + config.kl_coef * kl_N
            meters.add("policy/kl_to_initial", kl_N, batch.weights_N)
        (terms_N * batch.weights_N).sum().backward()
        meters.add("policy/loss", terms_N, batch.weights_N)
        meters.add("policy/entropy", entropies_N, batch.weights_N)
        meters.add("policy/clipped", cut_N.float(), batch.weights_N)
        meters.mismatch.add(logprobs_N.detach(), batch.sampling_logprobs_N)
        meters.add_experts(output.routing)

    def _logprobs(self, model: CausalLM, hidden_TD: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        predictors_ND = hidden_TD.index_select(0, batch.predictors_N)
        return token_logprobs(predictors_ND, model.lm_head.weight, batch.targets_N, batch.temperatures_N)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it; one fewer than tokens per sequence."""
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences])
        ids_T = torch.tensor([token for sequence in sequences for token in sequence])
        hidden_TD = self.model(ids_T, layout).hidden_TD
        ones_T = torch.ones(len(ids_T) - 1)
        logprobs_T, _ = token_logprobs(hidden_TD[:-1], self.model.lm_head.weight, ids_T[1:], ones_T)
        logprobs = logprobs_T.tolist()
        return [logprobs[s : e - 1] for s, e in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]

    def named_weights(self) -> WeightSource:
        """Every weight under its Hugging Face name, as views that the next update changes."""
        return WeightSource(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs beside the model's weights."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


class _Meters:
    """Weighted sums over micro-batches; the weights of a batch sum to 1, so sums are means."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._expert_counts: dict[int, Tensor] = {}
        self.mismatch = MismatchMeter()

    def add(self, name: str, values_N: Tensor, weights_N: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + (values_N.detach() * weights_N).sum().item()

    def add_experts(self, routing: dict[int, Routing]) -> None:
        for layer, routed in routing.items():
            counts_E = torch.bincount(routed.ids_TK.flatten(), minlength=routed.scores_TE.shape[1])
            self._expert_counts[layer] = self._expert_counts.get(layer, 0) + counts_E

    def report(self) -> dict[str, float]:
        return self._sums | self.mismatch.report() | load_metrics(self._expert_counts)
