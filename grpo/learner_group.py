"""The learners of a job's ranks driven as one: rank 0 is the process of the trainer, the others do as it does.

    learner = Learner(model, config, total_steps, mesh)
    if mesh.rank:
        serve(learner)                      # until rank 0 closes the group
    group = LearnerGroup(learner)           # with the methods of a learner
    report = group.update(samples)

An error on any rank ends the job: the others notice a closed connection, and rank 0 raises with the first cause.
"""

import itertools
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from models import CausalLM
from models.parallel import TIMEOUT, Mesh

IDLE_TIMEOUT = timedelta(days=7)
"""Longest wait of a rank for rank 0's next call; it notices at once when rank 0 is gone."""
_STOP, _WEIGHTS = "stop", "named_weights"


class LearnerGroup:
    """All ranks' learners as one, on rank 0."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._store = _store(learner)
        self._count = 0

    @property
    def model(self) -> CausalLM:
        """Rank 0's shards, for its configuration; a single rank cannot run it."""
        return self.learner.model

    @property
    def config(self) -> LearnerConfig:
        return self.learner.config

    @property
    def device(self) -> torch.device:
        return self.learner.device

    @property
    def step(self) -> int:
        return self.learner.step

    def update(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        return self._all("update", samples)

    def with_old_logprobs(self, samples: list[TrainingSample]) -> list[TrainingSample]:
        return self._all("with_old_logprobs", samples)

    def logprobs_of(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        return self._all("logprobs_of", samples)

    def kl_in_reward(self, samples: Sequence[TrainingSample]) -> list[float]:
        return self._all("kl_in_reward", samples)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._all("score", sequences)

    def save(self, folder: Path) -> None:
        self._all("save", folder)

    def load(self, folder: Path) -> None:
        self._all("load", folder)

    def write_policy(self, folder: Path) -> None:
        self._all("write_policy", folder)

    def named_weights(self) -> "GatheredWeights":
        """May be iterated again and again, as that of a learner."""
        return GatheredWeights(self)

    def gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every rank gathers; if the caller stops early, the rest is gathered all the same, or ranks would hang."""
        self._tell(_WEIGHTS)
        weights = iter(self.learner.named_weights())
        try:
            for weight in weights:  # noqa: UP028, `yield from` would end the gathering with the caller
                yield weight
        finally:
            deque(weights, maxlen=0)

    def close(self) -> None:
        """Lets the other ranks go, and waits until they have heard of it."""
        self._tell(_STOP)
        self._store.wait([_farewell(rank) for rank in range(1, self.learner.mesh.size)], TIMEOUT)

    def _all(self, method: str, argument: Any) -> Any:
        """A method of every rank's learner; rank 0's result. Raises RuntimeError if another rank failed."""
        self._tell(method)
        try:
            return getattr(self.learner, method)(argument)
        except Exception as error:
            for rank in range(1, self.learner.mesh.size):
                if self._store.check([_failure(rank)]):
                    cause = self._store.get(_failure(rank)).decode()
                    raise RuntimeError(f"{method} failed on rank {rank} of the learner:\n{cause}") from error
            raise

    def _tell(self, method: str) -> None:
        self._store.set(_call(self._count), method)
        self._count += 1


class GatheredWeights:
    """(checkpoint name, whole tensor), gathered from all ranks each time it is iterated."""

    def __init__(self, group: LearnerGroup) -> None:
        self._group = group

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._group.gather_weights()

    def snapshot(self) -> list[tuple[str, Tensor]]:
        """The same weights as they are now."""
        return [(name, tensor.clone()) for name, tensor in self]


def serve(learner: Learner) -> None:
    """On every rank but 0: calls what rank 0 calls, until it closes the group. Raises what a method raised."""
    store = _store(learner)
    for count in itertools.count():
        store.wait([_call(count)], IDLE_TIMEOUT)
        method = store.get(_call(count)).decode()
        if method == _STOP:
            store.set(_farewell(learner.mesh.rank), "")
            return
        try:
            if method == _WEIGHTS:
                deque(learner.named_weights(), maxlen=0)
            else:
                getattr(learner, method)(())  # rank 0's argument counts
        except BaseException:
            store.set(_failure(learner.mesh.rank), traceback.format_exc())
            raise


def _store(learner: Learner) -> Any:
    assert isinstance(learner.mesh, Mesh), "a group needs learners on a mesh"
    return learner.mesh.store


def _call(count: int) -> str:
    return f"call/{count}"


def _farewell(rank: int) -> str:
    return f"farewell/{rank}"


def _failure(rank: int) -> str:
    return f"failure/{rank}"
