"""One real vLLM session with real MLA: what it records is what our model chooses, through training and preemption.

Pinned: (1) recorded experts equal our model's own routing as sets, also where vLLM preempted a request and ran its
tokens again; (2) the probe's and finished requests' recordings are not kept; (3) over 20 optimizer steps with 20 syncs
log-probabilities agree within 1e-4 and experts as sets, and replay makes the learner use the recorded ones; (4) vLLM's
own recording, as it comes on CUDA, loses its dense layers, and its rows of zeros count as not recorded; (5) with top-k
and top-p the learner's log-probabilities equal the recorded ones within 1e-4.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grpo.advantages import AdvantageConfig
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.samples import build_samples
from models import DeepseekV3Config, SequenceLayout, find_config, hf_tensors, load_pretrained, save_pretrained
from rewards import Score
from rollout.decoding import restricted
from rollout.engine import EngineConfig, build_engine
from rollout.sample import CompletionGroup, SamplingParams
from rollout.stream import requests_of
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_routing import ExpertRecorder, recording_options
from rollout.weight_sync import largest_difference, probe_sequences
from tests.models.test_models_parity import sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# A dense layer first, so that layer numbers and places among recorded layers differ.
CONFIG = replace(find_config("tiny-mla512"), num_hidden_layers=3, first_k_dense_replace=1)
LIMIT = 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Calls a function with an engine and its checkpoint, in a process of their own: vLLM changes the one it is in."""
    folder = tmp_path_factory.mktemp("routing") / "model"
    save_pretrained(sharp_model(CONFIG), folder)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_engine, (str(folder),)) as process:
        yield lambda body: process.submit(call_with_engine, body, str(folder)).result()
        process.submit(call_with_engine, close, str(folder)).result()


ENGINES: list[VLLMEngine] = []


def start_engine(folder: str) -> None:
    import vllm

    torch.set_num_threads(1)
    vllm.LLM = partial(vllm.LLM, num_gpu_blocks_override=8)  # type: ignore[misc]
    engine = build_engine(EngineConfig(kind="vllm", transport="local", max_model_len=64, max_num_seqs=64), folder)
    assert isinstance(engine, VLLMEngine)
    ENGINES.append(engine)


def call_with_engine(body: Callable[[VLLMEngine, str], None], folder: str) -> None:
    body(ENGINES[0], folder)


def close(engine: VLLMEngine, folder: str) -> None:
    engine.close()


def share_of_other_experts(model: Any, groups: list[CompletionGroup]) -> float:
    """Of all tokens and layers: how often the recorded set is not the one our model chooses on the same tokens."""
    other = total = 0
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor(group.prompt.token_ids + completion.token_ids)
            chosen = model(ids, SequenceLayout.from_lengths([len(ids)])).expert_ids
            own = torch.stack([chosen[layer] for layer in (1, 2)], dim=1)[:-1].sort(-1).values
            assert completion.expert_ids is not None and completion.expert_ids.dtype == np.uint8
            recorded = torch.from_numpy(completion.expert_ids.astype(np.int64)).sort(-1).values
            assert recorded.shape == own.shape == (len(ids) - 1, 2, 2)
            other += int((recorded != own).any(-1).sum())
            total += own[..., 0].numel()
    return other / total


def check_recording(engine: VLLMEngine, folder: str) -> None:
    model = load_pretrained(folder)
    recorder = engine.recorder
    assert recorder is not None
    rows_run = 0
    hand_out = recorder._hand_out

    def counting(batch: Any, num_tokens: dict[str, int]) -> None:
        nonlocal rows_run
        rows_run += sum(num_tokens.values())
        hand_out(batch, num_tokens)

    recorder._hand_out = counting
    params = SamplingParams(num_completions=3, max_tokens=24, stop_token_id=3, seed=1)
    groups = engine.generate(make_prompts(4, CONFIG.vocab_size), params)
    rows_kept = sum(len(c.expert_ids) for g in groups for c in g.completions if c.expert_ids is not None)
    # An engine without preemption runs every row once, or one more per request if it schedules ahead.
    assert rows_run > rows_kept + 12, (rows_run, rows_kept, "the cache was meant to be too small for all")
    assert share_of_other_experts(model, groups) == 0
    assert not recorder._passes
    engine.score([[1, 2, 3], [4, 5]])
    assert not recorder._passes, "what the probe ran is nobody's"
    recorder._hand_out = hand_out


def check_training(engine: VLLMEngine, folder: str) -> None:
    """Samples, updates and syncs 20 times; at every step both sides agree, and the weights have moved at the end."""
    model = load_pretrained(folder)
    learner = Learner(model, LearnerConfig(lr=1e-3), total_steps=20)
    prompts = make_prompts(2, CONFIG.vocab_size)
    probe = probe_sequences(prompts, CONFIG.vocab_size)
    first = learner.score(probe)
    for step in range(21):
        engine.load_weights(hf_tensors(model), version=step)
        assert largest_difference(learner.score(probe), engine.score(probe)) < LIMIT, step
        params = SamplingParams(num_completions=4, max_tokens=6, stop_token_id=3, seed=step)
        groups = engine.generate(prompts, params)
        assert share_of_other_experts(model, groups) == 0, step
        scores = [[Score(value=float(i % 2)) for i in range(4)] for _ in groups]
        samples, _ = build_samples(groups, scores, AdvantageConfig(), temperature=1.0, version=step)
        if step == 20:
            break
        report = learner.update(samples)
        assert report["mismatch/abs_max"] < LIMIT and report["mismatch/rows_without_experts"] == 0, report
        assert report["mismatch/other_experts"] == 0, report
    assert largest_difference(first, learner.score(probe)) > 0.5, "the weights were meant to move"
    # A learner of other weights would choose otherwise; with replay it runs what vLLM recorded.
    stranger = Learner(sharp_model(CONFIG, seed=9), LearnerConfig(lr=0.0), total_steps=1)
    used: dict[int, torch.Tensor] = {}
    for layer, router in stranger.model.routers().items():

        def keep(module: object, inputs: object, output: Any, layer: int = layer) -> None:
            used[layer] = output[0].ids_TK

        router.register_forward_hook(keep)
    assert stranger.update(samples[:1])["mismatch/other_experts"] > 0.3
    recorded = samples[0].expert_ids
    assert recorded is not None
    for place, layer in enumerate((1, 2)):
        assert np.array_equal(used[layer][:-1].numpy(), recorded[:, place])


def check_kept_tokens(engine: VLLMEngine, folder: str) -> None:
    """Also where requests are preempted and drawn again: the cache is too small for all."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits_NV = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * 2
    limits = torch.full((40,), 20), torch.full((40,), 0.8)
    theirs_NV = apply_top_k_top_p(logits_NV.clone(), *limits)
    assert torch.equal(restricted(logits_NV.log_softmax(-1), 20, 0.8) > -torch.inf, theirs_NV > -torch.inf)
    params = SamplingParams(num_completions=3, max_tokens=24, top_k=20, top_p=0.8, stop_token_id=3, seed=1)
    groups = engine.generate(make_prompts(4, CONFIG.vocab_size), params)
    assert not engine.kept, "what was recorded has been handed out"
    sizes = {len(ids) for group in groups for c in group.completions for ids in c.kept_ids or ()}
    assert len(sizes) > 1 and max(sizes) <= 20, sizes
    scores = [[Score(value=float(i)) for i in range(3)] for _ in groups]
    samples, _ = build_samples(groups, scores, AdvantageConfig(), temperature=1.0, version=0)
    learner = Learner(load_pretrained(folder), LearnerConfig(lr=0.0), total_steps=1)
    assert learner.update(samples)["mismatch/abs_max"] < LIMIT
    assert learner.update([replace(s, kept_ids=None) for s in samples])["mismatch/abs_max"] > 0.05
    batch = engine.start_batch(params)
    batch.admit(requests_of(make_prompts(1, CONFIG.vocab_size)[0], params)[:1])
    batch.step()
    batch.step()
    (paused,) = batch.pause()
    assert paused.completion.kept_ids is not None and len(paused.completion.kept_ids) == 2


class TestWithVLLM:
    pytestmark = needs_vllm

    def test_recorded_experts_are_the_models_own(self, run: Callable[..., None]) -> None:
        run(check_recording)

    def test_top_k_and_top_p(self, run: Callable[..., None]) -> None:
        run(check_kept_tokens)

    def test_twenty_steps_and_syncs(self, run: Callable[..., None]) -> None:
        run(check_training)


def test_what_vllm_records_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: [tokens - 1, all layers, K]; here 3 of 4 rows arrived, the second empty in its last layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config: DeepseekV3Config = CONFIG
    for version, prefix_caching in (("0.25.1", None), ("0.30.2", None), ("0.31.0", True), ("0.33.1.dev5", True)):
        options = recording_options(config, version)
        assert options["enable_return_routed_experts"] and options.get("enable_prefix_caching") is prefix_caching
    dense = replace(config, first_k_dense_replace=3)
    assert recording_options(dense, "0.31.0") == {}
    recorder = ExpertRecorder(None, config)
    rows = np.array([[[0, 0], [1, 2], [0, 3]], [[0, 0], [3, 0], [0, 0]], [[0, 0], [7, 1], [5, 4]]], dtype=np.uint8)

    def output(routed_experts: np.ndarray | None) -> Any:
        completion = SimpleNamespace(token_ids=[8, 9], routed_experts=routed_experts)
        return SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=[completion], request_id="0")

    missing = [255, 255]
    expected = [[[1, 2], [0, 3]], [[3, 0], missing], [[7, 1], [5, 4]], [missing, missing]]
    taken = recorder.take(output(rows))
    assert taken is not None and taken.dtype == np.uint8 and taken.tolist() == expected
    lost = recorder.take(output(None))
    assert lost is not None and lost.tolist() == [[missing, missing]] * 4
    assert ExpertRecorder(None, dense).take(output(None)) is None
