"""Teachers of on-policy distillation: how far a student's own tokens are from what a teacher would have said.

SampledTeacher      the teacher, served by engines, gives the log-probability of each token that the student sampled:
                    A_t = reward_weight A - kl_coef (log pi_S - log pi_T), a policy gradient of the reverse KL
WholeTeacher        the teacher, a model beside the learner's, gives its whole distribution at each token: the exact
                    gradient of a divergence at those tokens (divergence.py)

Both have the two faces that `zero.train` asks for: called with the learner they give the loop's `Teach`.
"""

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.batch import MicroBatch, TrainingSample
from grpo.learner import Learner
from grpo.learner_group import LearnerGroup
from grpo.objective import Terms
from grpo.trainer import Teach
from models import CausalLM
from pipelines.divergence import linear_divergence
from rollout.pool import EnginePool


@dataclass(frozen=True, kw_only=True)
class SampledTeacher:
    """Served by engines; sees the sampled tokens alone. Exact in expectation: E[-A_t grad log pi_S] over the student's
    next token is the gradient of KL(pi_S || pi_T) there. What a token does to those after it is left out (discount 0),
    as in Thinking Machines' "On-Policy Distillation" (2025)."""

    pool: EnginePool
    """Of one engine, at temperature 1."""
    kl_coef: float
    reward_weight: float
    tokens_per_call: int
    """Bounds what an engine scores at once; a longer sequence goes alone."""

    def __call__(self, learner: Learner | LearnerGroup) -> Teach:
        return self.teach

    def teach(self, samples: list[TrainingSample], step: int) -> tuple[list[TrainingSample], dict[str, float]]:
        """The samples with an advantage for each token, from the probabilities with which they were sampled."""
        started = time.perf_counter()
        calls = in_calls(samples, self.tokens_per_call)
        teacher = [logprobs for call in calls for logprobs in self.pool.score(call)[0]]
        seconds = time.perf_counter() - started
        taught, gaps = [], []
        for sample, logprobs in zip(samples, teacher, strict=True):
            gaps_L = [a - b for a, b in zip(sample.sampling_logprobs, [0.0, *logprobs], strict=True)]
            rewarded_L = sample.token_advantages or [sample.advantage] * len(gaps_L)
            advantages_L = [
                self.reward_weight * advantage - self.kl_coef * gap if is_trained else 0.0
                for advantage, gap, is_trained in zip(rewarded_L, gaps_L, sample.loss_mask, strict=True)
            ]
            taught.append(replace(sample, token_advantages=advantages_L))
            gaps += [gap for gap, is_trained in zip(gaps_L, sample.loss_mask, strict=True) if is_trained]
        metrics = {"seconds/teacher": seconds}
        if gaps:
            metrics["distill/divergence"] = math.fsum(gaps) / len(gaps)
        return taught, metrics


@dataclass(frozen=True, kw_only=True)
class WholeTeacher:
    """A model in the learner's process; adds kl_coef times a divergence to the loss."""

    model: CausalLM
    beta: float
    """1 for KL(student || teacher), 0 for KL(teacher || student), between them a mixture, see divergence.py."""
    kl_coef: float
    reward_weight: float
    vocab_size: int
    """Tokens of the common tokenizer; rows of the heads behind them are padding, of which each model may have its own
    number."""
    traces: Sequence[TrainingSample] = ()
    """The teacher's own completions, with advantage 0."""
    traces_per_step: int = 0
    """How many of them go with a step's own samples."""
    seed: int = 0
    """Of the traces' order."""

    def __call__(self, learner: Learner | LearnerGroup) -> Teach:
        """Raises ValueError where the learner lays out samples in a form that the teacher does not take."""
        assert isinstance(learner, Learner), "each rank would need the teacher; OnPolicyConfig refuses more than one"
        if learner.config.share_prompts and learner.model.shares_beginnings and not self.model.shares_beginnings:
            raise ValueError("the teacher's attention takes no shared prompts: set learner.share_prompts to false")
        learner.add_loss = self.add_loss
        return lambda samples, step: (self.scaled(samples) + self.traces_of(step, learner), {})

    def traces_of(self, step: int, learner: Learner) -> list[TrainingSample]:
        """The traces of a step, every one once before any comes again. Their "sampling" log-probabilities are the
        learner's, so that they add nothing to the mismatch of engine and learner."""
        chosen = []
        for place in range(step * self.traces_per_step, (step + 1) * self.traces_per_step):
            epoch, index = divmod(place, len(self.traces))
            order = random.Random(f"traces {self.seed} {epoch}").sample(range(len(self.traces)), len(self.traces))
            chosen.append(self.traces[order[index]])
        calls = in_calls(chosen, learner.config.token_budget)
        scores = (logprobs for call in calls for logprobs in learner.score(call))
        return [
            replace(sample, sampling_logprobs=[0.0, *logprobs]) for sample, logprobs in zip(chosen, scores, strict=True)
        ]

    def scaled(self, samples: list[TrainingSample]) -> list[TrainingSample]:
        """The samples with their rewards' advantages times `reward_weight`."""
        weight = self.reward_weight
        return [
            replace(
                sample,
                advantage=weight * sample.advantage,
                token_advantages=sample.token_advantages and [weight * a for a in sample.token_advantages],
            )
            for sample in samples
        ]

    def add_loss(self, terms: Terms, batch: MicroBatch, hidden_TD: Tensor, head_VD: Tensor) -> Terms:
        """As `grpo.learner.AddLoss`; weighted over tokens as the policy's loss, at the temperature of sampling."""
        with torch.no_grad():
            teacher_TC = self.model(batch.ids_T, batch.layout).hidden_TD
        divergence = linear_divergence(
            hidden_TD.index_select(0, batch.predictors_N),
            head_VD[: self.vocab_size],
            teacher_TC.index_select(0, batch.predictors_N),
            self.model.lm_head.weight.detach()[: self.vocab_size],
            batch.weights_N,
            batch.temperatures_N,
            beta=self.beta,
        )
        means = {"distill/divergence": divergence.of_tokens_N, "distill/agreement": divergence.agreement_N}
        return replace(
            terms,
            loss=terms.loss + self.kl_coef * divergence.loss,
            of_tokens_N=terms.of_tokens_N + self.kl_coef * divergence.of_tokens_N,
            means=terms.means | means,
        )


def in_calls(samples: Sequence[TrainingSample], max_tokens: int) -> Iterator[list[list[int]]]:
    """The samples' tokens, in order, in parts of at most `max_tokens`; a longer sample is a part alone."""
    call: list[list[int]] = []
    for sample in samples:
        if call and sum(map(len, call)) + len(sample.token_ids) > max_tokens:
            yield call
            call = []
        call.append(list(sample.token_ids))
    if call:
        yield call


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError with the first difference, where the same text might become other tokens or the other way."""
    difference = _first_difference(student, teacher)
    if difference:
        raise ValueError(
            f"student and teacher have different tokenizers, and their tokens cannot be compared: {difference}; take a "
            "teacher of the student's family, or distill by `grpo distill traces`, which goes by text"
        )


def _first_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = ({id: token for token, id in of.get_vocab().items()} for of in (student, teacher))
    for id in sorted(ours.keys() | theirs.keys()):
        if ours.get(id) != theirs.get(id):
            return f"token {id} is {ours.get(id)!r} to the student and {theirs.get(id)!r} to the teacher"
    if student.eos_token_id != teacher.eos_token_id:
        return f"text ends with {student.eos_token!r} to the student and {teacher.eos_token!r} to the teacher"
    parts = [_parts(tokenizer) for tokenizer in (student, teacher)]
    for name in parts[0]:
        ours, theirs = (of.get(name) for of in parts)
        if ours != theirs:
            if isinstance(ours, list) and isinstance(theirs, list):
                place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
                place = min(len(ours), len(theirs)) if place is None else place
                ours, theirs = ours[place : place + 1], theirs[place : place + 1]
                name = f"{name} {place}"
            return f"{name} of the student's tokenizer.json is {ours!s:.200}, of the teacher's {theirs!s:.200}"
    return None


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes tokens of text and text of tokens, beside the vocabulary."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    whole = json.loads(backend.to_str())
    return {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")} | {
        "merges": whole["model"].get("merges")
    }
