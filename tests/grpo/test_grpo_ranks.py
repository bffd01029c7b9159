"""Several ranks over gloo against one process: the gradient does not depend on how many there are, nor does anything
that follows from it.

1. Gradients equal to 1e-6 for 2 and 4 ranks: FSDP, replicas, experts divided, in any order of samples, in micro-batches
   of any size, with ranks that have nothing to do.
2. Five optimizer steps equal to 1e-5: weights, every metric, the router's bias; scores and old log-probabilities, too.
3. A state saved by two ranks continues on one and on four as on two.

In float64, where rounding cannot decide (routing and clipping have thresholds); one case in float32 runs what training
runs.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grpo.batch import TrainingSample
from grpo.corrections import CorrectionConfig
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import DeepseekV3ForCausalLM, TransformersCausalLM
from models.parallel import ALONE, MeshConfig
from tests.grpo.rank_cases import Case, Outcome, plain_grouped_mm, train, train_all
from tests.grpo.test_grpo_gradients import make_samples
from tests.models.test_models_auto import CONFIGS, reference_model
from tests.models.test_models_parity import CORNERS, relative_error, sharp_model
from tests.ranks import run_ranks

OBJECTIVE = ObjectiveConfig(kl_coef=0.1, entropy_coef=0.01, entropy_top_share=0.9, positive_nll_coef=0.1)
CONFIG = LearnerConfig(lr=1e-3, objective=OBJECTIVE, token_budget=60, grad_clip=0.5, weight_decay=0.1)
TWO, EXPERTS_2 = MeshConfig(ranks=2), MeshConfig(ranks=2, expert_ranks=2)
EXPERTS_2X2 = MeshConfig(ranks=4, expert_ranks=2)
REPLICAS_2X2, REPLICAS_EXPERTS_2X2 = MeshConfig(ranks=4, replicas=2), MeshConfig(ranks=4, replicas=2, expert_ranks=2)


def make_case(mesh: MeshConfig, *, num_batches: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> Case:
    model = sharp_model(CORNERS["v3_like"])
    batches = [make_samples(model, seed=seed) for seed in range(num_batches)]
    return Case(**{"model": model.to(dtype), "batches": batches, "config": CONFIG, "mesh": mesh, **changes})


def with_experts(sample: TrainingSample, seed: int) -> TrainingSample:
    """Recorded experts, some rows without: [L - 1, layers with experts, K]."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(2 * (len(sample.token_ids) - 1))])
    ids[rng.random(len(ids)) < 0.2] = 255
    return replace(sample, expert_ids=ids.astype(np.uint8).reshape(-1, 2, 4))


def gradient_cases(mesh: MeshConfig, *names: str) -> dict[str, Case]:
    """One update without clipping: all in few micro-batches, each sample in its own and shuffled, with experts recorded
    by the sampler, with one sample for all ranks."""
    case = make_case(mesh, config=replace(CONFIG, grad_clip=1e9))
    samples = case.batches[0]
    shuffled = random.Random(1).sample(samples, len(samples))
    small = replace(case.config, token_budget=30, objective=replace(OBJECTIVE, aggregation="sequence"))
    cases = {
        "packed": replace(case, config=replace(case.config, token_budget=1000)),
        "apart": replace(case, config=small, batches=[shuffled]),
        "replay": replace(case, batches=[[with_experts(s, i) for i, s in enumerate(shuffled)]]),
        "idle": replace(case, batches=[samples[:1]]),
    }
    return {f"{name} {mesh}": cases[name] for name in names}


def lopsided_case(mesh: MeshConfig) -> Case:
    """In float32, with the product that training uses, and with no token for the second half of the experts."""
    case = make_case(mesh, dtype=torch.float32)
    assert isinstance(case.model, DeepseekV3ForCausalLM)
    for router in case.model.routers().values():
        router.e_score_correction_bias[8:] -= 100
    return case


def dense_case(mesh: MeshConfig, folder: Path) -> Case:
    """A model of transformers, its head tied to the embedding."""
    reference = reference_model(CONFIGS["qwen2_tied"]())
    reference.save_pretrained(folder)
    model: Any = TransformersCausalLM(reference)
    return make_case(mesh, model=folder, batches=[make_samples(model, seed=seed) for seed in range(2)])


def steps_case(mesh: MeshConfig, num_batches: int = 5, **changes: Any) -> Case:
    correction = CorrectionConfig(kind="token_tis", old_logprobs="learner")
    config = replace(CONFIG, correction=correction)
    return make_case(mesh, num_batches=num_batches, config=config, bias_speed=0.05, **changes)


def alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    if case.is_double:
        monkeypatch.setattr(F, "grouped_mm", plain_grouped_mm)
    return train(case, ALONE)


def assert_equal(found: Outcome, wanted: Outcome, *, gradients: float = 1e-6, rest: float = 1e-5) -> None:
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert relative_error(found.gradients[name], gradient) < gradients, name
    for report, expected in zip(found.reports, wanted.reports, strict=True):
        assert report == pytest.approx(expected, rel=rest, abs=1e-8)
    assert list(found.weights) == list(wanted.weights), "names or their order"
    for name, weight in wanted.weights.items():
        assert relative_error(found.weights[name], weight) < rest, name
    for one, other in zip(found.scores + found.old_logprobs, wanted.scores + wanted.old_logprobs, strict=True):
        assert one == pytest.approx(other, abs=rest)


class Ranks:
    """Cases that ran in one job, and what each rank had of them."""

    def __init__(self, cases: dict[str, Case], size: int, folder: Path) -> None:
        folder.mkdir()
        self.cases, self.outcomes = cases, run_ranks(train_all, size, folder, cases)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two(states: Path) -> Ranks:
    saved, later = steps_case(EXPERTS_2), steps_case(EXPERTS_2)
    cases = (
        gradient_cases(TWO, "packed", "apart", "idle")
        | gradient_cases(EXPERTS_2, "replay", "idle")
        | {
            "five steps, FSDP": steps_case(TWO),
            "five steps, experts": steps_case(EXPERTS_2),
            "dense": dense_case(TWO, states / "dense"),
            "float32": lopsided_case(EXPERTS_2),
            "begin": replace(saved, batches=saved.batches[:2], save=states / "two"),
            "continue": replace(later, batches=later.batches[2:], load=states / "two"),
        }
    )
    return Ranks(cases, 2, states / "job of two")


@pytest.fixture(scope="module")
def four(two: Ranks, states: Path) -> Ranks:
    later = replace(two.cases["continue"], mesh=EXPERTS_2X2)
    cases = gradient_cases(REPLICAS_EXPERTS_2X2, "apart", "idle") | {
        "two steps, experts x shards": steps_case(EXPERTS_2X2, 2),
        "two steps, replicas x shards": steps_case(REPLICAS_2X2, 2),
        "continue": later,
    }
    return Ranks(cases, 4, states / "job of four")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["two", "four"])
def test_ranks_equal_one_process(job: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Ranks = request.getfixturevalue(job)
    for name, case in ranks.cases.items():
        if case.load is None:
            wanted, found = alone(case, monkeypatch), [outcomes[name] for outcomes in ranks.outcomes]
            assert_equal(found[0], wanted, **({} if case.is_double else {"gradients": 1e-5, "rest": 1e-3}))
            if name == "float32":
                assert wanted.reports[0]["moe/dead_experts"] >= 16, "the second rank has rows to compute"
            counts = [len(outcome.shares) for outcome in found]
            assert len(set(counts)) == 1, f"{name}: micro-batches of the ranks: {counts}"
            trained = sum(sample.num_trained for sample in case.batches[0])
            assert sum(sum(outcome.shares) for outcome in found) == trained
            idle = sum(sum(outcome.shares) == 0 for outcome in found)
            assert idle == (len(found) - 1 if "idle" in name else 0), f"{name}: {idle} ranks with nothing to do"


@pytest.mark.slow
def test_a_state_goes_on_with_another_number_of_ranks(
    two: Ranks, four: Ranks, states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = alone(steps_case(EXPERTS_2), monkeypatch)
    case = two.cases["continue"]
    for found in (two.outcomes[0]["continue"], four.outcomes[0]["continue"], alone(case, monkeypatch)):
        assert [report["policy/loss"] for report in found.reports] == pytest.approx(
            [report["policy/loss"] for report in straight.reports[2:]], rel=1e-5
        )
        for name, weight in straight.weights.items():
            assert relative_error(found.weights[name], weight) < 1e-5, name
