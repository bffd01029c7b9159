"""The learner: holds the policy, turns training samples into optimizer steps, hands out its weights.

learner = Learner(model, LearnerConfig(lr=3e-4), total_steps=100)
report = learner.update(samples)
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from grpo import learner_state
from grpo.batch import Aggregation, MicroBatch, TrainingSample, pack_for_ranks
from grpo.corrections import CorrectionConfig
from grpo.learner_state import module_of
from grpo.logprobs import token_logprobs
from grpo.losses import KLEstimator, clipped_policy_loss, kl_penalty
from grpo.mismatch import MismatchMeter
from grpo.schedule import Decay, learning_rate
from models import CausalLM, ModelOutput, SequenceLayout
from models.balance import count_experts, load_metrics
from models.moe import Routing
from models.parallel import ALONE, Alone, by_mesh, clip_gradients, gradient_norm, release
from rollout.weight_source import WeightSource

_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)  # groups differ between meshes


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
    """One copy of the policy in training, in this process or, with a mesh, sharded over the ranks of a job.

    Each rank of a job has a learner. Their methods are collective: every rank calls the same one, rank 0's arguments
    count, and rank 0 gets the result.
    """

    def __init__(self, model: CausalLM, config: LearnerConfig, total_steps: int, mesh: Alone = ALONE) -> None:
        """`total_steps` counts optimizer steps and only shapes the learning rate's decay. With a mesh the whole model
        may be on the CPU; its parts go to the mesh's device."""
        self.config, self.total_steps, self.mesh = config, total_steps, mesh
        self.step = 0
        self.reference = mesh.shard(copy.deepcopy(model).requires_grad_(False)) if config.kl_coef else None
        self.model = mesh.shard(model)
        self.expert_counts: dict[int, Tensor] = {}
        """Layer -> [E] tokens of the last update for each expert, of all ranks and on all of them."""
        self.optimizer = torch.optim.AdamW(
            by_mesh(self.model.parameters()),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
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
        for micro_batch in self._share(samples):
            self._backward(micro_batch.to(self.device), meters)
        norm = gradient_norm(self.model.parameters(), self.mesh)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} at optimizer step {self.step}; lower the learning rate, "
                "or look for rewards or log-probabilities that are not finite"
            )
        clip_gradients(self.model.parameters(), config.grad_clip, norm)
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
        meters = _Meters.merged(self.mesh.gather(meters))
        self.expert_counts = self.mesh.broadcast(meters.expert_counts)
        return meters.report() | {"policy/grad_norm": norm.item(), "policy/lr": lr}

    def _share(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """This rank's micro-batches of rank 0's samples, as many as any other rank's."""
        if self.mesh.rank:
            return self.mesh.scatter(None)
        # A layer has about 12 D^2 weights, 24 D^2 FLOPs a token; causal attention takes 2 L D.
        parts = pack_for_ranks(
            samples, self.config.token_budget, self.config.aggregation, num_ranks=self.mesh.size,
            quadratic_at=12 * self.model.lm_head.in_features,
        )  # fmt: skip
        return self.mesh.scatter(parts)

    def _backward(self, batch: MicroBatch, meters: "_Meters") -> None:
        config = self.config
        output = self._forward(batch)
        logprobs_N, entropies_N = self._logprobs(self.model, output.hidden_TD, batch)
        reference_N = logprobs_N
        if self.reference is not None:
            with torch.no_grad():
                hidden_TD = self.reference(batch.ids_T, batch.layout).hidden_TD
                reference_N, _ = self._logprobs(self.reference, hidden_TD, batch)
        if not len(batch.targets_N):
            logprobs_N.sum().backward()  # 0 of no token: only to join the other ranks' collectives
            return
        terms_N = loss_N = self._policy_loss(logprobs_N, batch, meters)
        if self.reference is not None:
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
        mine: list[tuple[Tensor, Tensor]] = []
        for batch in self._share(samples):
            on_device = batch.to(self.device)
            logprobs_N, _ = self._logprobs(self.model, self._forward(on_device).hidden_TD, on_device)
            mine.append((batch.samples_N, logprobs_N.cpu()))
        release(self.model)
        old = [torch.zeros(len(sample.token_ids)) for sample in samples]
        for samples_N, logprobs_N in (pair for of_rank in self.mesh.gather(mine) for pair in of_rank):
            for place in samples_N.unique().tolist():
                trained_L = torch.tensor(samples[place].loss_mask)
                old[place][trained_L] = logprobs_N[samples_N == place]
        return [replace(s, old_logprobs=old_L.tolist()) for s, old_L in zip(samples, old, strict=True)]

    def _logprobs(self, model: CausalLM, hidden_TD: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        predictors_ND = hidden_TD.index_select(0, batch.predictors_N)
        return token_logprobs(predictors_ND, model.lm_head.weight, batch.targets_N, batch.temperatures_N)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it; one fewer than tokens per sequence."""
        sequences = self.mesh.broadcast(sequences)
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences], self.device)
        ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        hidden_TD = self.model(ids_T, layout).hidden_TD
        ones_T = torch.ones(len(ids_T) - 1, device=self.device)
        logprobs_T, _ = token_logprobs(hidden_TD[:-1], self.model.lm_head.weight, ids_T[1:], ones_T)
        release(self.model)
        logprobs = logprobs_T.tolist()
        return [logprobs[s : e - 1] for s, e in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]

    def named_weights(self) -> WeightSource:
        """Every weight under its Hugging Face name, as views that the next update changes, or gathered one by one."""
        return WeightSource(self.model, self.mesh.compute_dtype)

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs beside the model's weights; sharded as they are."""
        optimizer = get_optimizer_state_dict(module_of(self.model), self.optimizer, options=_BY_PARAMETER)
        return {"step": self.step, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        set_optimizer_state_dict(module_of(self.model), self.optimizer, state["optimizer"], options=_BY_PARAMETER)

    def save(self, folder: Path) -> None:
        """Writes all that an exact continuation needs into an existing folder, for any number of ranks."""
        learner_state.save(self.model, self.state_dict(), folder, self.mesh)

    def load(self, folder: Path) -> None:
        """The opposite of `save`."""
        state = self.state_dict()
        learner_state.load(self.model, state, folder, self.mesh)
        self.load_state_dict(state)

    def write_policy(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint into an existing folder."""
        learner_state.write_policy(self.model, folder, self.mesh)


class _Meters:
    """Weighted sums over micro-batches; the weights of a batch sum to 1, so sums are means.

    All stays on the device until the report, so that a GPU is never waited for in between.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.expert_counts: dict[int, Tensor] = {}
        """Layer -> [E] tokens that used each expert."""
        self.mismatch = MismatchMeter()

    def add(self, name: str, values_N: Tensor, weights_N: Tensor) -> None:
        _add(self._sums, {name: (values_N.detach() * weights_N).sum().double()})

    def add_experts(self, routing: dict[int, Routing]) -> None:
        _add(self.expert_counts, {layer: count_experts(routed) for layer, routed in routing.items()})

    @staticmethod
    def merged(meters: Sequence["_Meters"]) -> "_Meters":
        """What several ranks have seen together."""
        total = _Meters()
        for one in meters:
            _add(total._sums, one._sums)
            _add(total.expert_counts, one.expert_counts)
            total.mismatch.merge(one.mismatch)
        return total

    def report(self) -> dict[str, float]:
        sums = {name: total.item() for name, total in self._sums.items()}
        return sums | self.mismatch.report() | load_metrics(self.expert_counts)


def _add(totals: dict[Any, Tensor], more: Mapping[Any, Tensor]) -> None:
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value
