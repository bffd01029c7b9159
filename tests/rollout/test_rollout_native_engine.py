"""The native engine against transformers and against itself.

Pinned: (1) greedy decoding equals transformers' generate; (2) recorded log-probabilities are those of the whole-
sequence model at the sampling temperature; (3) sampled frequencies follow the model's distribution; (4) a completion
depends on its seed, not on its neighbours; (5) stop and length; (6) strict weight loading.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM as Reference

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig, build_engine
from rollout.manifest import SyncError
from rollout.sample import FinishReason, Prompt, SamplingParams
from tests.models.test_models_parity import CORNERS, sharp_model

STOP = 3
CONFIG = EngineConfig(kind="native", transport="local", max_model_len=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    save_pretrained(sharp_model(CORNERS["v3_like"]), folder)
    return folder


def make_prompts(count: int, vocab: int = 97) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    lengths = [3 + (7 * i) % 11 for i in range(count)]
    return [
        Prompt(id=f"p{i}", text="", token_ids=torch.randint(4, vocab, (n,), generator=generator).tolist())
        for i, n in enumerate(lengths)
    ]


def test_greedy_equals_transformers(checkpoint: Path) -> None:
    engine = build_engine(CONFIG, str(checkpoint))
    reference: Any = Reference.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = make_prompts(6)
    groups = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0, stop_token_id=STOP))
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=STOP, pad_token_id=0)
        assert group.prompt is prompt
        assert group.completions[0].token_ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_the_model(checkpoint: Path, temperature: float) -> None:
    engine = build_engine(CONFIG, str(checkpoint))
    reference: Any = Reference.from_pretrained(checkpoint, dtype=torch.float32)
    params = SamplingParams(num_completions=4, max_tokens=10, temperature=temperature, stop_token_id=STOP, seed=1)
    for group in engine.generate(make_prompts(5), params):
        for completion in group.completions:
            ids = torch.tensor(group.prompt.token_ids + completion.token_ids)
            with torch.no_grad():
                logits_TV = reference(ids[None], use_cache=False).logits[0] / temperature
            expected = logits_TV.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
            recorded = torch.tensor(completion.logprobs)
            assert (recorded - expected[-len(recorded) :]).abs().max() < 1e-4


def test_sampled_frequencies_follow_the_distribution(checkpoint: Path) -> None:
    engine = build_engine(replace(CONFIG, max_num_seqs=4000), str(checkpoint))
    prompt, draws = make_prompts(1)[0], 4000
    params = SamplingParams(num_completions=draws, max_tokens=1, stop_token_id=STOP, seed=9)
    counts = Counter(c.token_ids[0] for c in engine.generate([prompt], params)[0].completions)
    reference: Any = Reference.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        probabilities = reference(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    for token, probability in enumerate(probabilities.tolist()):
        # five standard deviations of a binomial count, and one for counts that are rare
        assert abs(counts[token] - draws * probability) < 5 * math.sqrt(draws * probability) + 1, token
    assert len(counts) > 5, "the distribution is too sharp to test anything"


def test_a_completion_does_not_depend_on_its_neighbours(checkpoint: Path) -> None:
    engine = build_engine(CONFIG, str(checkpoint))
    prompts = make_prompts(6)
    params = SamplingParams(num_completions=3, max_tokens=8, stop_token_id=STOP, seed=4)
    together = {g.prompt.id: [c.token_ids for c in g.completions] for g in engine.generate(prompts, params)}
    alone = {p.id: [c.token_ids for c in engine.generate([p], params)[0].completions] for p in prompts}
    assert together == alone
    in_small_batches = build_engine(replace(CONFIG, max_num_seqs=4), str(checkpoint)).generate(prompts, params)
    assert together == {g.prompt.id: [c.token_ids for c in g.completions] for g in in_small_batches}
    other = engine.generate(prompts, replace(params, seed=5))
    assert together != {g.prompt.id: [c.token_ids for c in g.completions] for g in other}
    assert len({tuple(ids) for ids in together["p0"]}) > 1, "completions of one prompt must differ"


def test_stop_and_length(checkpoint: Path) -> None:
    engine = build_engine(CONFIG, str(checkpoint))
    prompts = make_prompts(8)
    groups = engine.generate(prompts, SamplingParams(num_completions=8, max_tokens=9, stop_token_id=50, seed=2))
    completions = [completion for group in groups for completion in group.completions]
    assert {c.finish_reason for c in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        stopped = completion.finish_reason is FinishReason.STOP
        assert (completion.token_ids[-1] == 50) == stopped, "the stop token is part of the completion"
        assert 50 not in completion.token_ids[:-1]
        assert stopped or len(completion.token_ids) == 9


def test_the_longest_sequence_bounds_a_completion(checkpoint: Path) -> None:
    engine = build_engine(replace(CONFIG, max_model_len=16), str(checkpoint))
    params = SamplingParams(max_tokens=50, stop_token_id=96, seed=0)
    prompt = Prompt(id="long", text="", token_ids=list(range(4, 18)))
    completion = engine.generate([prompt], params)[0].completions[0]
    assert len(completion.token_ids) == 2 and completion.finish_reason is FinishReason.LENGTH
    too_long = Prompt(id="too-long", text="", token_ids=list(range(4, 20)))
    with pytest.raises(ValueError, match=r"prompt too-long has 16 tokens.*max_model_len=16"):
        engine.generate([too_long], params)


def test_new_weights_are_strict_and_versioned(checkpoint: Path) -> None:
    engine = build_engine(CONFIG, str(checkpoint))
    other = sharp_model(CORNERS["v3_like"], seed=3)
    sequences = [prompt.token_ids for prompt in make_prompts(3)]
    before = engine.score(sequences)
    engine.load_weights(hf_tensors(other), version=7)
    assert engine.score(sequences) != before
    params = SamplingParams(max_tokens=2, stop_token_id=STOP)
    assert engine.generate(make_prompts(1), params)[0].completions[0].version_spans == ((7, 2),)
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(SyncError, match=f"missing {lost}"):
        engine.load_weights(((n, t) for n, t in hf_tensors(other) if n != lost), version=8)
    with pytest.raises(SyncError, match=r"unexpected model\.extra"):
        engine.load_weights([*hf_tensors(other), ("model.extra", torch.zeros(1))], version=8)
    with pytest.raises(SyncError, match="given twice lm_head"):
        engine.load_weights([*hf_tensors(other), ("lm_head.weight", other.lm_head.weight)], version=8)
    with pytest.raises(SyncError, match=r"lm_head\.weight has shape \[2\], the engine needs \[97, 64\]"):
        wrong = ((n, torch.zeros(2) if n == "lm_head.weight" else t) for n, t in hf_tensors(other))
        engine.load_weights(wrong, version=8)
