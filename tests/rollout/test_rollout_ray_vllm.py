"""One real vLLM session in a Ray actor: parity with transformers before and after weight updates, and what a bad sync
does.

Pinned: (1) sampled log-probabilities equal transformers' within 1e-4 at temperature 1 and 0.7; (2) greedy tokens equal;
(3) after updates A -> B -> A the engine scores as the model it was given, within 1e-4; (4) a tensor that is missing,
unexpected or misshapen is an error that names it; (5) wrong values in one expert are caught by the probe; (6) seeds fix
the samples, as in the native engine, also when they are paused and continued, prompts run in pieces or with others;
(7) recorded experts are the model's own; (8) and the same when an environment answers between turns.
"""

import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import DeepseekV3Config, DeepseekV3ForCausalLM, RopeParameters, SequenceLayout, hf_tensors, save_pretrained
from rollout.engine import EngineConfig, build_engine
from rollout.pool import LocalPool, StreamingPool, build_pool
from rollout.sample import ENVIRONMENT, CompletionGroup, SamplingParams
from rollout.weight_sync import Score, SyncError, largest_difference, probe_sequences, push_weights
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_environment import STOP, Counting, by_prompt, wrap
from tests.rollout.test_rollout_native_engine import make_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# The sizes of the quickstart's model: plain rotary embedding, small latent, no groups.
CONFIG = replace(CORNERS["plain"], num_hidden_layers=2, v_head_dim=32, rope_parameters=RopeParameters(rope_theta=100.0))
# The one size that vLLM's MLA kernel for CPU knows: latent 512 with 64 rotary dimensions; YaRN, groups, q_lora.
MLA_CONFIG = replace(
    CORNERS["v3_like"], num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64
)
LIMIT = 1e-4


def start(config: DeepseekV3Config, folder: Path) -> tuple[StreamingPool, DeepseekV3ForCausalLM]:
    model = sharp_model(config)
    save_pretrained(model, folder / "model")
    engines = EngineConfig(kind="vllm", transport="ray", max_model_len=64, max_num_seqs=64)
    return build_pool(engines, str(folder / "model")), model


@pytest.fixture(scope="module", params=[CONFIG, MLA_CONFIG], ids=["mha", "mla"])
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StreamingPool, DeepseekV3ForCausalLM]]:
    pool, model = start(request.param, tmp_path_factory.mktemp("vllm"))
    yield pool, model
    pool.close()


def native_score(model: DeepseekV3ForCausalLM, folder: Path) -> Score:
    """The project's own model, which test_models_parity.py holds equal to transformers."""
    save_pretrained(model, folder)
    return build_engine(EngineConfig(kind="native", transport="local"), str(folder)).score


def generate(pool: StreamingPool, params: SamplingParams) -> list[CompletionGroup]:
    by_id = {group.prompt.id: group for group in pool.generate(make_prompts(6), params)}
    return [by_id[prompt.id] for prompt in make_prompts(6)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampling_equals_the_model(
    session: tuple[StreamingPool, DeepseekV3ForCausalLM], tmp_path: Path, temperature: float
) -> None:
    pool, model = session
    save_pretrained(model, tmp_path / "model")
    native = build_engine(EngineConfig(kind="native", transport="local"), str(tmp_path / "model"))
    params = SamplingParams(
        num_completions=1 if temperature == 0 else 4, max_tokens=12, temperature=temperature, stop_token_id=3, seed=1
    )
    groups = generate(pool, params)
    assert generate(pool, params) == groups, "the same seeds must give the same completions"
    if temperature == 0:
        expected = native.generate(make_prompts(6), params)
        assert [g.completions[0].token_ids for g in groups] == [g.completions[0].token_ids for g in expected]
        return
    expected_scores = score_at_temperature(model, groups, temperature)
    recorded = [completion.logprobs for group in groups for completion in group.completions]
    assert largest_difference(expected_scores, recorded) < LIMIT


def score_at_temperature(
    model: DeepseekV3ForCausalLM, groups: list[CompletionGroup], temperature: float
) -> list[list[float]]:
    scores = []
    for group in groups:
        for completion in group.completions:
            ids_T = torch.tensor(group.prompt.token_ids + completion.token_ids)
            with torch.no_grad():
                logits_TV = model.lm_head(model(ids_T, SequenceLayout.from_lengths([len(ids_T)])).hidden_TD)
            logprobs_TV = (logits_TV / temperature).log_softmax(-1)
            logprobs_T = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1).tolist()
            scores.append(logprobs_T[-len(completion.token_ids) :])
    return scores


def test_seeds_fix_the_samples(session: tuple[StreamingPool, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    pool, model = session
    save_pretrained(model, tmp_path / "model")
    native = build_engine(EngineConfig(kind="native", transport="local"), str(tmp_path / "model"))
    params = SamplingParams(num_completions=3, max_tokens=40, stop_token_id=96, seed=2)
    expected = tokens(native.generate(make_prompts(6), params))
    assert tokens(generate(pool, params)) == expected
    stop, paused = threading.Event(), []
    stop.set()  # before the first step, or in one of the first, whenever the engine hears of it
    for _ in range(2):
        paused = list(pool.generate(paused or make_prompts(6), params, stop=stop))
    assert not all(group.is_complete for group in paused)
    assert tokens(list(pool.generate(paused, params))) == expected


def test_an_environment_between_turns(session: tuple[StreamingPool, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    pool, model = session
    save_pretrained(model, tmp_path / "model")
    native = LocalPool(EngineConfig(kind="native", transport="local", max_model_len=64), str(tmp_path / "model"))
    params = SamplingParams(num_completions=4, max_tokens=40, stop_token_id=STOP, seed=2)
    multi_turn, expected = wrap(pool, Counting(rounds=3)), wrap(native, Counting(rounds=3))
    groups = list(multi_turn.generate(make_prompts(6), params))
    assert by_prompt(groups) == by_prompt(list(expected.generate(make_prompts(6), params)))
    mask = [[v != ENVIRONMENT for v in c.versions] for group in groups for c in group.completions]
    recorded = [completion.logprobs for group in groups for completion in group.completions]
    scores = [
        [score * is_ours for score, is_ours in zip(of_one, ours, strict=True)]
        for of_one, ours in zip(score_at_temperature(model, groups, 1.0), mask, strict=True)
    ]
    assert sum(not is_ours for ours in mask for is_ours in ours) > 100
    assert largest_difference(scores, recorded) < LIMIT


def tokens(groups: list[CompletionGroup]) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [completion.token_ids for completion in group.completions] for group in groups}


def test_weight_updates_a_b_a(session: tuple[StreamingPool, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    pool, model_a = session
    model_b = sharp_model(model_a.config, seed=11)
    probe = probe_sequences(make_prompts(4), model_a.config.vocab_size)
    score = {name: native_score(m, tmp_path / name) for name, m in (("a", model_a), ("b", model_b))}
    assert largest_difference(score["a"](probe), score["b"](probe)) > 1, "the two models must differ"
    for version, (name, model) in enumerate([("b", model_b), ("a", model_a), ("b", model_b), ("a", model_a)], 1):
        drift = push_weights(pool, hf_tensors(model), version, probe, score[name], LIMIT)
        assert drift is not None and drift < LIMIT
        params = SamplingParams(num_completions=2, max_tokens=8, stop_token_id=3, seed=version)
        groups = generate(pool, params)
        assert {c.oldest_version for g in groups for c in g.completions} == {version}
        recorded = [completion.logprobs for group in groups for completion in group.completions]
        assert largest_difference(score_at_temperature(model, groups, 1.0), recorded) < LIMIT, "decoding is stale"


def test_a_bad_sync_is_an_error(session: tuple[StreamingPool, DeepseekV3ForCausalLM], tmp_path: Path) -> None:
    pool, model = session
    probe = probe_sequences(make_prompts(4), model.config.vocab_size)
    score = native_score(model, tmp_path / "model")
    lost = "model.layers.1.mlp.experts.3.down_proj.weight"
    with pytest.raises(SyncError, match=rf"missing {lost}"):
        pool.load_weights(((n, t) for n, t in hf_tensors(model) if n != lost), version=9)
    with pytest.raises(SyncError, match="this engine must not sample"):
        generate(pool, SamplingParams(max_tokens=1, stop_token_id=3))
    with pytest.raises(SyncError, match=r"unexpected model\.extra"):
        pool.load_weights([*hf_tensors(model), ("model.extra", torch.zeros(1))], version=9)
    wrong = ((n, torch.zeros(2) if n == "lm_head.weight" else t) for n, t in hf_tensors(model))
    with pytest.raises(SyncError, match=r"lm_head\.weight has shape \[2\], the engine needs \[97, 64\]"):
        pool.load_weights(wrong, version=9)
    stale = ((n, t * 0.5 if n == lost else t) for n, t in hf_tensors(model))
    with pytest.raises(SyncError, match="after the push of version 9, engine 0"):
        push_weights(pool, stale, 9, probe, score, LIMIT)
    with pytest.raises(SyncError, match=r"this engine must not sample: after the push of version 9"):
        generate(pool, SamplingParams(max_tokens=1, stop_token_id=3))
    drift = push_weights(pool, hf_tensors(model), 10, probe, score, LIMIT)
    assert drift is not None and drift < LIMIT, "a good sync after a bad one"


def test_recorded_experts_are_the_models_own(session: tuple[StreamingPool, DeepseekV3ForCausalLM]) -> None:
    """Both ways of attention; the arrays cross process borders. The tests above leave the engine with `model`."""
    pool, model = session
    for group in generate(pool, SamplingParams(num_completions=3, max_tokens=9, stop_token_id=3, seed=8)):
        for completion in group.completions:
            ids_T = torch.tensor(group.prompt.token_ids + completion.token_ids)
            chosen = model(ids_T, SequenceLayout.from_lengths([len(ids_T)])).expert_ids
            own = torch.stack([chosen[layer] for layer in sorted(chosen)], dim=1)[:-1].sort(-1).values
            assert completion.expert_ids is not None
            assert torch.equal(torch.from_numpy(completion.expert_ids.astype("int64")).sort(-1).values, own)
