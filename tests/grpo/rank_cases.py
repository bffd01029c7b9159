"""What the ranks of the tests in test_grpo_ranks.py do. Apart from them, so that a rank imports little."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from models import from_pretrained
from models.balance import update_correction_bias
from models.parallel import Alone, Mesh, MeshConfig, join, whole

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training run: one update per batch, on any number of ranks."""

    model: nn.Module | Path
    """Or the folder of one, in float64."""
    batches: Sequence[list[TrainingSample]]
    config: LearnerConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    bias_speed: float = 0.0
    load: Path | None = None
    save: Path | None = None

    @property
    def is_double(self) -> bool:
        return isinstance(self.model, Path) or next(self.model.parameters()).dtype == torch.float64


@dataclass(frozen=True, kw_only=True)
class Outcome:
    gradients: dict[str, Tensor]
    """As the optimizer got them in the first update."""
    reports: list[dict[str, float]]
    weights: dict[str, Tensor]
    """Whole, at the end, by checkpoint name."""
    scores: list[list[float]]
    old_logprobs: list[Any]
    shares: list[int]
    """Trained tokens in each of this rank's micro-batches of the first update."""


def plain_grouped_mm(x_RD: Tensor, weights_EDF: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm` for float64, which leaves rounding nothing to hide in."""
    starts = [0, *offs.tolist()]
    return torch.cat([x_RD[starts[e] : starts[e + 1]] @ weight for e, weight in enumerate(weights_EDF)])


def train(case: Case, mesh: Alone) -> Outcome:
    model: Any = copy.deepcopy(case.model)
    if isinstance(model, Path):
        model = from_pretrained(model, dtype=torch.float64)
    learner = Learner(model, case.config, total_steps=9, mesh=mesh)
    mine: Any = (lambda batch: batch) if mesh.rank == 0 else (lambda batch: ())  # rank 0's arguments count
    if case.load is not None:
        learner.load(case.load if mesh.rank == 0 else Path())
    scores = learner.score(mine([sample.token_ids for sample in case.batches[0]]))
    old_logprobs = [sample.old_logprobs for sample in learner.with_old_logprobs(mine(case.batches[0]))]
    shares = [len(micro_batch.targets_N) for micro_batch in learner._share(mine(case.batches[0]))]
    gradients: dict[str, Tensor] = {}

    def capture(*_: object) -> None:
        for name, parameter in learner.model.named_parameters():
            if name not in gradients:
                assert parameter.grad is not None, name
                gradients[name] = whole(parameter.grad).clone()

    handle = learner.optimizer.register_step_pre_hook(capture)
    reports = []
    for batch in case.batches:
        reports.append(learner.update(mine(batch)))
        handle.remove()
        for layer, router in learner.model.routers().items():
            update_correction_bias(router, learner.expert_counts[layer], case.bias_speed)  # type: ignore[arg-type]
    if case.save is not None:
        learner.save(case.save if mesh.rank == 0 else Path())
    weights = {name: tensor.clone() for name, tensor in learner.named_weights()}
    return Outcome(
        gradients=gradients, reports=reports, weights=weights, scores=scores, old_logprobs=old_logprobs, shares=shares
    )


def train_all(cases: dict[str, Case]) -> dict[str, Outcome]:
    """On every rank of a job."""
    grouped_mm = F.grouped_mm
    mesh: Alone | None = None
    outcomes = {}
    for name, case in cases.items():
        F.grouped_mm = plain_grouped_mm if case.is_double else grouped_mm
        if mesh is None:
            mesh = join(case.mesh, CPU)
        else:
            assert isinstance(mesh, Mesh)
            mesh = Mesh(case.mesh, CPU, mesh.store)
        outcomes[name] = train(case, mesh)
    return outcomes
