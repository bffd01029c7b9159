"""Pins router replay from the engine's recording to the learner's gradient.

1. Packing lays recordings beside their tokens; rows and samples without one, and last tokens, get -1.
2. The native engine records what the learner's router chooses with the same weights: plain, speculative, dense layers
   left out, at any type; a model without experts records nothing.
3. With other weights the learner uses exactly the recorded experts, and its gates still get a gradient; rows of -1
   choose for themselves.
4. The counts of rows without experts and of other choices are reported, with replay and without.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.advantages import AdvantageConfig
from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.packing import pack
from grpo.samples import build_samples
from models import DeepseekV3ForCausalLM, SequenceLayout, save_pretrained
from rewards import Score
from rollout.engine import EngineConfig
from rollout.native_engine import NativeEngine
from rollout.router_replay import id_dtype, is_recorded, pack_ids, unrecorded
from rollout.sample import Completion, CompletionGroup, SamplingParams
from tests.grpo.test_grpo_gradients import update_and_capture
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

CONFIG = CORNERS["v3_like"]  # one dense layer, two with 16 experts, 4 per token
PARAMS = SamplingParams(num_completions=3, max_tokens=9, stop_token_id=50, seed=2)


def start(model: DeepseekV3ForCausalLM, folder: Path, **engine: int) -> NativeEngine:
    save_pretrained(model, folder)
    config = EngineConfig(kind="native", transport="local", max_model_len=64, **engine)  # type: ignore[arg-type]
    return NativeEngine(config, str(folder))


def sample_groups(model: DeepseekV3ForCausalLM, folder: Path, **engine: int) -> list[CompletionGroup]:
    return start(model, folder, **engine).generate(make_prompts(4), PARAMS)


def to_samples(groups: list[CompletionGroup]) -> list[TrainingSample]:
    scores = [[Score(value=float(i)) for i in range(len(group.completions))] for group in groups]
    return build_samples(groups, scores, AdvantageConfig(scale="none"), temperature=1.0, version=0)[0]


def own_choice(model: DeepseekV3ForCausalLM, group: CompletionGroup, completion: Completion) -> Tensor:
    """[L - 1, layers, K] sorted ids that the whole-sequence model chooses for all tokens but the last."""
    ids = torch.tensor(group.prompt.token_ids + completion.token_ids)
    chosen = model(ids, SequenceLayout.from_lengths([len(ids)])).expert_ids
    return torch.stack([chosen[layer] for layer in sorted(chosen)], dim=1)[:-1].sort(-1).values


@pytest.mark.parametrize("num_speculative_tokens", [0, 2])
def test_the_native_engine_records_what_the_learner_chooses(num_speculative_tokens: int, tmp_path: Path) -> None:
    model = sharp_model(replace(CONFIG, num_nextn_predict_layers=num_speculative_tokens))
    engine = start(model, tmp_path / "policy", num_speculative_tokens=num_speculative_tokens)
    # Hot, so that many drafts are accepted; with a frequent token as stop, so that it comes at any place in a draft.
    params = replace(PARAMS, temperature=3.0, num_completions=8)
    tokens = [t for group in engine.generate(make_prompts(4), params) for c in group.completions for t in c.token_ids]
    groups = engine.generate(make_prompts(4), replace(params, stop_token_id=Counter(tokens).most_common(1)[0][0]))
    assert num_speculative_tokens == 0 or engine.draft_acceptance > 0.3
    lengths = set()
    for group in groups:
        for completion in group.completions:
            assert completion.expert_ids is not None and completion.expert_ids.dtype == np.uint8
            recorded = torch.from_numpy(completion.expert_ids.astype(np.int64)).sort(-1).values
            assert torch.equal(recorded, own_choice(model, group, completion))
            lengths.add(len(completion.token_ids))
    assert len(lengths) >= 4, "completions of many lengths"


def test_recording_can_be_off_and_dense_models_have_none(tmp_path: Path) -> None:
    for config, record in ((CONFIG, False), (CORNERS["all_dense"], True)):
        groups = sample_groups(sharp_model(config), tmp_path / f"policy-{record}", record_experts=record)
        assert all(completion.expert_ids is None for group in groups for completion in group.completions)


def test_types_leave_unrecorded_rows_recognisable() -> None:
    assert id_dtype(256, 8) == np.uint8 and id_dtype(257, 8) == np.uint16
    assert id_dtype(255, 1) == np.uint8 and id_dtype(256, 1) == np.uint16
    assert not is_recorded(unrecorded(3, 2, 8, 256)).any()
    ids = pack_ids({4: torch.tensor([[255, 254], [0, 255]]), 1: torch.tensor([[7, 255], [1, 2]])}, 256)
    assert ids is not None and ids.tolist() == [[[7, 255], [255, 254]], [[1, 2], [0, 255]]] and is_recorded(ids).all()


def test_packing_by_hand() -> None:
    def sample(length: int, expert_ids: np.ndarray | None) -> TrainingSample:
        return TrainingSample(
            token_ids=list(range(length)), loss_mask=[False, *[True] * (length - 1)],
            sampling_logprobs=[0.0] * length, policy_lags=[10 * length + n for n in range(length)],
            expert_ids=expert_ids,
        )  # fmt: skip

    ids = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    ids[1, 0] = 255  # lost in layer 0
    (batch,) = pack([sample(2, None), sample(4, ids), sample(3, unrecorded(2, 2, 2, 8))], 100, "token")
    assert batch.layout.lengths == (4, 3, 2) and batch.expert_ids_TLK is not None
    missing = [[-1, -1], [-1, -1]]
    assert batch.expert_ids_TLK.tolist() == [
        [[0, 1], [2, 3]], [[-1, -1], [6, 7]], [[8, 9], [10, 11]], missing, *[missing] * 5,
    ]  # fmt: skip
    assert batch.samples_N.tolist() == [1, 1, 1, 2, 2, 0] and batch.lags_N.tolist() == [41, 42, 43, 31, 32, 21]
    (without,) = pack([sample(2, None)], 100, "token")
    assert without.expert_ids_TLK is None and without.old_logprobs_N is None
    with pytest.raises(AssertionError, match="experts of 3 tokens for 3"):
        sample(3, ids)
    with pytest.raises(AssertionError, match=r"different models.*\(1, 2\), \(2, 2\)"):
        pack([sample(4, ids), sample(4, ids[:, :1])], 100, "token")


def chosen_during(learner: Learner, samples: list[TrainingSample]) -> tuple[dict[int, Tensor], dict[str, float]]:
    """Layer -> [T, K] experts that an update really used, and its report."""
    used: dict[int, Tensor] = {}

    def watch(layer: int):
        def hook(module: object, arguments: object, output: tuple) -> None:
            used[layer] = output[0].ids_TK

        return hook

    handles = [router.register_forward_hook(watch(layer)) for layer, router in learner.model.routers().items()]
    report = learner.update(samples)
    for handle in handles:
        handle.remove()
    return used, report


def test_replay_with_other_weights_uses_the_recorded_experts(tmp_path: Path) -> None:
    groups = sample_groups(sharp_model(CONFIG), tmp_path / "policy")
    samples = [sample for sample in to_samples(groups) if sample.advantage]
    assert samples[1].expert_ids is not None
    samples[0] = replace(samples[0], expert_ids=None)
    samples[1].expert_ids[2] = 255  # a preempted row
    other = sharp_model(CONFIG, seed=5)
    (batch,) = pack(samples, 8192, "token")
    assert batch.expert_ids_TLK is not None
    used, report = chosen_during(Learner(other, LearnerConfig(lr=0.0, share_prompts=False), total_steps=1), samples)
    free, unreplayed = chosen_during(
        Learner(other, LearnerConfig(lr=0.0, share_prompts=False, replay_experts=False), total_steps=1), samples
    )
    for i, layer in enumerate(sorted(used)):
        recorded = batch.expert_ids_TLK[:, i].long()
        is_recorded_T = recorded[:, 0] >= 0
        assert torch.equal(used[layer][is_recorded_T], recorded[is_recorded_T])
        assert not torch.equal(free[layer][is_recorded_T].sort(-1).values, recorded[is_recorded_T].sort(-1).values)
        assert (used[layer] >= 0).all()
    first = min(used)
    missing_T = batch.expert_ids_TLK[:, 0, 0] < 0
    assert torch.equal(used[first][missing_T], free[first][missing_T]), "what is not recorded chooses for itself"
    rows = sum(len(sample.token_ids) - 1 for sample in samples)
    missing = (len(samples[0].token_ids) - 1 + 1) / rows
    for each in (report, unreplayed):
        assert each["mismatch/rows_without_experts"] == pytest.approx(missing)
        assert each["mismatch/other_experts"] > 0.3, "the learner's own choice, also where it was overruled"


def test_gradients_reach_the_gates_through_replayed_experts(tmp_path: Path) -> None:
    """Only the recorded experts' gates and matrices learn."""
    samples = to_samples(sample_groups(sharp_model(CONFIG), tmp_path / "policy"))
    one_row = np.tile(np.arange(4, dtype=np.uint8), (1, 2, 1))
    dictated = [replace(s, expert_ids=one_row.repeat(len(s.token_ids) - 1, axis=0)) for s in samples]
    model = sharp_model(replace(CONFIG, norm_topk_prob=True), seed=5)
    gradients, _ = update_and_capture(Learner(model, LearnerConfig(lr=0.0), total_steps=1), dictated)
    for layer in (1, 2):
        gate = gradients[f"model.layers.{layer}.mlp.gate.weight"].norm(dim=1)
        experts = gradients[f"model.layers.{layer}.mlp.experts.down_proj"].flatten(1).norm(dim=1)
        assert gate[:4].min() > 1e-6 and experts[:4].min() > 1e-6
        assert not gate[4:].any() and not experts[4:].any()


def test_recording_and_learner_agree_in_the_report(tmp_path: Path) -> None:
    model = sharp_model(CONFIG)
    samples = to_samples(sample_groups(model, tmp_path / "policy"))
    learner = Learner(model, LearnerConfig(lr=0.0, token_budget=40), total_steps=1)
    report = learner.update(samples)
    assert report["mismatch/rows_without_experts"] == 0
    assert report["mismatch/other_experts"] == report["mismatch/tokens_with_other_experts"] == 0
    none = [replace(sample, expert_ids=None) for sample in samples]
    assert learner.update(none)["mismatch/rows_without_experts"] == 1
