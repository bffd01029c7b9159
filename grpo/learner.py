"""The learner: holds the policy, turns training samples into optimizer steps, hands out its weights.

learner = Learner(model, LearnerConfig(lr=3e-4), total_steps=100)
report = learner.update(samples)
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from grpo import learner_state
from grpo.batch import MicroBatch, TrainingSample
from grpo.learner_config import LearnerConfig
from grpo.learner_state import module_of
from grpo.logprobs import token_logprobs
from grpo.losses import kl_penalty
from grpo.meters import Meters
from grpo.objective import Terms, entropy_threshold_of, objective_terms
from grpo.optimizer import build_optimizer
from grpo.packing import pack_for_ranks
from grpo.schedule import learning_rate
from grpo.step_guard import StepGuard, TokenTerm
from models import CausalLM, ModelOutput, SequenceLayout
from models.lora import WithoutAdapters, has_adapters
from models.parallel import ALONE, Alone, clip_gradients, gradient_norm, release
from rollout.weight_source import WeightSource

_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)  # groups differ between meshes
_OPTIMIZER = "optimizer.pt"
AddLoss = Callable[[Terms, MicroBatch, Tensor, Tensor], Terms]
"""Terms, micro-batch, hidden states [T, D] and head [V, D] -> the terms with another loss added."""


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
        self.guard = StepGuard(config.skip_norm, config.max_skipped_steps)
        self.add_loss: AddLoss | None = None
        if has_adapters(model) and config.objective.reference_every:
            raise ValueError("reference_every needs a reference of its own, and with LoRA that is the frozen weights")
        self.reference: Any = self._initial_policy(model) if config.objective.kl_coef else None
        self.model = mesh.shard(model)
        self.expert_counts: dict[int, Tensor] = {}
        """Layer -> [E] tokens of the last update for each expert, of all ranks and on all of them."""
        betas = (config.adam_beta1, config.adam_beta2)
        self.optimizer = build_optimizer(
            config.optimizer, self.model.parameters(), lr=config.lr, betas=betas, decay=config.weight_decay
        )

    def _initial_policy(self, model: CausalLM) -> Any:
        """The policy before training, which stays: a copy, or the frozen weights under the adapters."""
        if has_adapters(model):
            return WithoutAdapters(model)
        return self.mesh.shard(copy.deepcopy(model).requires_grad_(False))

    @property
    def device(self) -> torch.device:
        """Where the model is, and where batches go."""
        return self.model.lm_head.weight.device

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """One optimizer step over all samples, or none if the guard refuses the gradient: `policy/skipped_steps` is 1
        then. Raises StepsSkippedError after too many of those in a row.
        """
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)  # an update that raised must not leave its gradient to this one
        meters, tokens = Meters(), []
        micro_batches = self._share(samples)
        threshold = self._entropy_threshold(micro_batches)
        for micro_batch in micro_batches:
            self._backward(micro_batch.to(self.device), meters, tokens, threshold)
        norm = gradient_norm(self.model.parameters(), self.mesh)
        meters = Meters.merged(self.mesh.gather(meters))
        self.expert_counts = self.mesh.broadcast(meters.expert_counts)
        if reason := self.guard.judge(norm.item()):
            everyones = [term for of_rank in self.mesh.gather(tokens) for term in of_rank]
            self.guard.stop_if_exhausted(reason, self.step, self.model, samples, everyones)
            self.optimizer.zero_grad(set_to_none=True)
            return meters.report() | {"policy/grad_norm": norm.item(), "policy/skipped_steps": 1.0}
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
        every = config.objective.reference_every
        if self.reference is not None and every and self.step % every == 0:
            module_of(self.reference).load_state_dict(module_of(self.model).state_dict())
        return meters.report() | {"policy/grad_norm": norm.item(), "policy/lr": lr, "policy/skipped_steps": 0.0}

    def _share(self, samples: Sequence[TrainingSample]) -> list[MicroBatch]:
        """This rank's micro-batches of rank 0's samples, as many as any other rank's."""
        if self.mesh.rank:
            return self.mesh.scatter(None)
        objective = self.config.objective
        # A layer has about 12 D^2 weights, 24 D^2 FLOPs a token; causal attention takes 2 L D.
        parts = pack_for_ranks(
            samples, self.config.token_budget, objective.aggregation, objective.constant_length,
            num_ranks=self.mesh.size, quadratic_at=12 * self.model.lm_head.in_features,
            share_prompts=self.config.share_prompts and self.model.shares_beginnings,
        )  # fmt: skip
        return self.mesh.scatter(parts)

    def _backward(
        self, batch: MicroBatch, meters: Meters, tokens: list[TokenTerm], entropy_threshold: float | None
    ) -> None:
        config = self.config
        output = self._forward(batch)
        logprobs_N, entropies_N = self._logprobs(self.model, output.hidden_TD, batch)
        reference_N = self._reference_logprobs(batch) if config.objective.kl_in == "loss" else None
        if not len(batch.targets_N):
            logprobs_N.sum().backward()  # 0 of no token: only to join the other ranks' collectives
            return
        terms = objective_terms(
            config.objective, config.correction, batch, logprobs_N, entropies_N, reference_N, entropy_threshold
        )
        if self.add_loss:
            terms = self.add_loss(terms, batch, output.hidden_TD, self.model.lm_head.weight)
        terms.loss.backward()
        tokens.append((batch.samples_N, terms.of_tokens_N, logprobs_N.detach()))
        meters.add("policy/loss", terms.loss, 1.0)
        for name, values_N in terms.means.items():
            meters.add(name, values_N, batch.weights_N / batch.weight_sum)
        meters.mismatch.add(logprobs_N.detach(), batch.sampling_logprobs_N, batch.lags_N)
        routing, recorded_TLK, placed = output.routing, batch.expert_ids_TLK, batch.layout.in_sequences
        if placed is not None:  # a prompt counts with each of its completions, however they were divided
            routing = {layer: routed.of_rows(placed.tokens_R) for layer, routed in routing.items()}
            recorded_TLK = None if recorded_TLK is None else recorded_TLK[placed.tokens_R]
        meters.mismatch.add_experts(routing, recorded_TLK, len(batch.layout.lengths))
        meters.add_experts(routing)

    def _forward(self, batch: MicroBatch) -> ModelOutput:
        replay = {}
        if self.config.replay_experts and batch.expert_ids_TLK is not None:
            replay = dict(zip(self.model.routers(), batch.expert_ids_TLK.unbind(1), strict=True))
        return self.model(batch.ids_T, batch.layout, replay=replay)

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self.reference is None:
            return None
        return self._logprobs(self.reference, self.reference(batch.ids_T, batch.layout).hidden_TD, batch)[0]

    @torch.no_grad()
    def _entropy_threshold(self, batches: Sequence[MicroBatch]) -> float | None:
        """Over all tokens of the optimizer step, which have to be seen before the first is trained."""
        share = self.config.objective.entropy_top_share
        if share == 1:
            return None
        on_device = [batch.to(self.device) for batch in batches]
        mine_N = torch.cat([self._logprobs(self.model, self._forward(b).hidden_TD, b)[1] for b in on_device])
        release(self.model)
        everyones = self.mesh.gather(mine_N)
        return self.mesh.broadcast(entropy_threshold_of(torch.cat(everyones), share) if everyones else None)

    def with_old_logprobs(self, samples: list[TrainingSample]) -> list[TrainingSample]:
        """The samples with the learner's present log-probabilities, where the loss or a weight needs them: to be called
        before the first of several updates on them. For a single one the update's own forward pass is the same.
        """
        if self.config.correction.kind == "none" and self.config.correction.old_logprobs == "sampler":
            return samples
        return [replace(s, old_logprobs=old_L) for s, old_L in zip(samples, self.logprobs_of(samples), strict=True)]

    @torch.no_grad()
    def logprobs_of(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        """[L] for each sample: the present log-probabilities of its trained tokens, 0.0 elsewhere; on rank 0."""
        found = self._of_samples(
            samples, lambda batch: self._logprobs(self.model, self._forward(batch).hidden_TD, batch)[0]
        )
        release(self.model)
        logprobs = [torch.zeros(len(sample.token_ids)) for sample in samples]
        for place, logprobs_N in found.items():
            logprobs[place][torch.tensor(samples[place].loss_mask)] = logprobs_N.float()
        return [logprobs_L.tolist() for logprobs_L in logprobs]

    @torch.no_grad()
    def kl_in_reward(self, samples: Sequence[TrainingSample]) -> list[float]:
        """What each sample's reward loses: kl_coef times the sum over its trained tokens of the KL estimate, between
        the probabilities it was sampled with and the reference's. 0.0 for each unless `kl_in` is "reward"."""
        objective = self.config.objective
        penalties = [0.0] * len(samples)
        if objective.kl_in == "loss" or self.reference is None:
            return penalties
        if not self.mesh.broadcast(any(sample.num_trained for sample in samples)):
            return penalties

        def penalties_of(batch: MicroBatch) -> Tensor:
            reference_N = self._reference_logprobs(batch)
            assert reference_N is not None
            return kl_penalty(batch.sampling_logprobs_N, reference_N, objective.kl_estimator)

        found = self._of_samples(samples, penalties_of)
        release(self.reference)
        for place, kl_N in found.items():
            penalties[place] = objective.kl_coef * kl_N.sum().item()
        return penalties

    def _of_samples(
        self, samples: Sequence[TrainingSample], compute: Callable[[MicroBatch], Tensor]
    ) -> dict[int, Tensor]:
        """Place of a sample -> what `compute` says of its trained tokens, on the CPU; on rank 0, of all ranks."""
        mine = [(batch.samples_N, compute(batch.to(self.device)).cpu()) for batch in self._share(samples)]
        return {
            place: values_N[samples_N == place]
            for of_rank in self.mesh.gather(mine)
            for samples_N, values_N in of_rank
            for place in samples_N.unique().tolist()
        }

    def _logprobs(self, model: CausalLM, hidden_TD: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        predictors_ND = hidden_TD.index_select(0, batch.predictors_N)
        return token_logprobs(predictors_ND, model.lm_head.weight, batch.targets_N, batch.temperatures_N, batch.kept)

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
        optimizer = (
            get_optimizer_state_dict(module_of(self.model), self.optimizer, options=_BY_PARAMETER)
            if self._has_common_optimizer
            else self.optimizer.state_dict()
        )
        state = {"step": self.step, "guard": self.guard.state_dict(), "optimizer": optimizer}
        if isinstance(self.reference, torch.nn.Module):
            state["reference"] = self.reference.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.guard.load_state_dict(state["guard"])
        if self._has_common_optimizer:
            set_optimizer_state_dict(module_of(self.model), self.optimizer, state["optimizer"], options=_BY_PARAMETER)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        if "reference" in state:
            self.reference.load_state_dict(state["reference"])

    @property
    def _has_common_optimizer(self) -> bool:
        """Whether its state is a tensor beside each parameter, which any number of ranks can share."""
        return self.config.optimizer == "adamw"

    def save(self, folder: Path) -> None:
        """Writes all that an exact continuation needs into an existing folder, for any number of ranks."""
        state = self.state_dict()
        if not self._has_common_optimizer:
            with (folder / _OPTIMIZER).open("wb") as file:  # torch's own writer would not say that the disk is full
                torch.save(state.pop("optimizer"), file)
        learner_state.save(self.model, state, folder, self.mesh)

    def load(self, folder: Path) -> None:
        """The opposite of `save`."""
        state = self.state_dict()
        if not self._has_common_optimizer:
            del state["optimizer"]
        learner_state.load(self.model, state, folder, self.mesh)
        if not self._has_common_optimizer:
            state["optimizer"] = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        self.load_state_dict(state)

    def write_policy(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint into an existing folder."""
        learner_state.write_policy(self.model, folder, self.mesh)
