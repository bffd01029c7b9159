"""The learner: holds the policy, turns training samples into optimizer steps, hands out its weights.

learner = Learner(model, LearnerConfig(lr=3e-4), total_steps=100)
report = learner.update(samples)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Aggregation, MicroBatch, TrainingSample, pack
from grpo.corrections import CorrectionConfig
from grpo.logprobs import token_logprobs
from grpo.losses import KLEstimator, clipped_policy_loss, kl_penalty
from grpo.mismatch import MismatchMeter
from grpo.optimizer import OptimizerName, build_optimizer
from grpo.schedule import Decay, learning_rate
from models import CausalLM, ModelOutput, SequenceLayout
from models.balance import count_experts, load_metrics
from models.lora import WithoutAdapters, has_adapters
from models.moe import Routing
from rollout.weight_source import WeightSource


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Objective and optimizer."""

    optimizer: OptimizerName = "adamw"
    """AdamW with its state in full, in 8 bits, or in main memory; see `grpo.optimizer`."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises."""
    lr_decay: Decay = "constant"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, of matrices only."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients. 0.999, as in verl and TRL: a mean over 1,000 steps keeps one large
    gradient from being followed by large steps. Where a policy moves far in few steps, a shorter memory adapts sooner:
    Open-Reasoner-Zero (arXiv:2503.24290) and MiniMax-M1 (arXiv:2506.13585) take 0.95, slime's scripts 0.98."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    clip_low: float = 0.2
    """Probability ratios below 1 - clip_low get no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """Probability ratios above 1 + clip_high get no gradient where the advantage is positive."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against the initial policy; 0 keeps no copy of it, nor does LoRA at any weight."""
    kl_estimator: KLEstimator = "k3"
    """How that KL is estimated from sampled tokens."""
    aggregation: Aggregation = "token"
    """Average over all tokens of the batch, or over each sample's tokens first."""
    token_budget: int = 8192
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""
    replay_experts: bool = True
    """Use the experts that the sampler recorded (arXiv:2510.11370); rows without a recording choose for themselves."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Importance weights and masks for samples of another policy than the learner's."""

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
        self.reference: Any = _initial_policy(model) if config.kl_coef else None
        betas = (config.adam_beta1, config.adam_beta2)
        self.optimizer = build_optimizer(
            config.optimizer, model.parameters(), lr=config.lr, betas=betas, decay=config.weight_decay
        )

    @property
    def device(self) -> torch.device:
        """Where the model is, and where batches go."""
        return self.model.lm_head.weight.device

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """One optimizer step over all samples. Raises FloatingPointError if the gradient is not finite."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)  # an update that raised must not leave its gradient to this one
        meters = _Meters()
        for micro_batch in pack(samples, config.token_budget, config.aggregation):
            self._backward(micro_batch.to(self.device), meters)
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
        output = self._forward(batch)
        logprobs_N, entropies_N = self._logprobs(self.model, output.hidden_TD, batch)
        terms_N = loss_N = self._policy_loss(logprobs_N, batch, meters)
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
        meters.mismatch.add(logprobs_N.detach(), batch.sampling_logprobs_N, batch.lags_N)
        meters.mismatch.add_experts(output.routing, batch.expert_ids_TLK, len(batch.layout.lengths))
        meters.add_experts(output.routing)

    def _forward(self, batch: MicroBatch) -> ModelOutput:
        replay = {}
        if self.config.replay_experts and batch.expert_ids_TLK is not None:
            replay = dict(zip(self.model.routers(), batch.expert_ids_TLK.unbind(1), strict=True))
        return self.model(batch.ids_T, batch.layout, replay=replay)

    def _policy_loss(self, logprobs_N: Tensor, batch: MicroBatch, meters: "_Meters") -> Tensor:
        """[N] clipped against the sampler or the learner's own old log-probabilities, times the correction's weight."""
        config, sampler_N = self.config, batch.sampling_logprobs_N
        current_N = logprobs_N.detach()
        learner_N = current_N if batch.old_logprobs_N is None else batch.old_logprobs_N
        old_N = sampler_N if config.correction.old_logprobs == "sampler" else learner_N
        loss_N, cut_N = clipped_policy_loss(logprobs_N, old_N, batch.advantages_N, config.clip_low, config.clip_high)
        meters.add("policy/clipped", cut_N.float(), batch.weights_N)
        if config.correction.is_on:
            factors_N = config.correction.weights(current_N, learner_N, sampler_N, batch.advantages_N, batch.samples_N)
            loss_N = loss_N * factors_N
            meters.add("correction/weight", factors_N, batch.weights_N)
            meters.add("correction/dropped", (factors_N == 0).float(), batch.weights_N)
        return loss_N

    @torch.no_grad()
    def with_old_logprobs(self, samples: list[TrainingSample]) -> list[TrainingSample]:
        """The samples with the learner's present log-probabilities, where the loss or a weight needs them: to be called
        before the first of several updates on them. For a single one the update's own forward pass is the same.
        """
        if self.config.correction.kind == "none" and self.config.correction.old_logprobs == "sampler":
            return samples
        old = [torch.zeros(len(sample.token_ids)) for sample in samples]
        for batch in pack(samples, self.config.token_budget, self.config.aggregation):
            on_device = batch.to(self.device)
            logprobs_N, _ = self._logprobs(self.model, self._forward(on_device).hidden_TD, on_device)
            logprobs_N = logprobs_N.cpu()
            for place in batch.samples_N.unique().tolist():
                trained_L = torch.tensor(samples[place].loss_mask)
                old[place][trained_L] = logprobs_N[batch.samples_N == place]
        return [replace(s, old_logprobs=old_L.tolist()) for s, old_L in zip(samples, old, strict=True)]

    def _logprobs(self, model: CausalLM, hidden_TD: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        predictors_ND = hidden_TD.index_select(0, batch.predictors_N)
        return token_logprobs(predictors_ND, model.lm_head.weight, batch.targets_N, batch.temperatures_N)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it; one fewer than tokens per sequence."""
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences], self.device)
        ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        hidden_TD = self.model(ids_T, layout).hidden_TD
        ones_T = torch.ones(len(ids_T) - 1, device=self.device)
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


def _initial_policy(model: CausalLM) -> Any:
    """The policy before training, which stays: a copy, or the frozen weights under the adapters."""
    return WithoutAdapters(model) if has_adapters(model) else copy.deepcopy(model).requires_grad_(False)


class _Meters:
    """Weighted sums over micro-batches; the weights of a batch sum to 1, so sums are means.

    All stays on the device until the report, so that a GPU is never waited for in between.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._expert_counts: dict[int, Tensor] = {}
        self.mismatch = MismatchMeter()

    def add(self, name: str, values_N: Tensor, weights_N: Tensor) -> None:
        added = (values_N.detach() * weights_N).sum().double()
        self._sums[name] = self._sums.get(name, torch.zeros_like(added)) + added

    def add_experts(self, routing: dict[int, Routing]) -> None:
        for layer, routed in routing.items():
            self._expert_counts[layer] = self._expert_counts.get(layer, 0) + count_experts(routed)

    def report(self) -> dict[str, float]:
        sums = {name: total.item() for name, total in self._sums.items()}
        return sums | self.mismatch.report() | load_metrics(self._expert_counts)
