"""Speculative decoding: it may change how many passes a completion takes, and nothing else.

Pinned: (1) the acceptance rule gives the main model's distribution; (2) so does the engine, for the first three tokens
and their pairs; (3) greedy decoding equals the plain decoder's; (4) recorded log-probabilities are the main model's;
(5) each draft is what whole-sequence modules would draft there; (6) with trained modules drafts are accepted and all
of this still holds; (7) stop, length and seeds; (8) refusals; (9) vLLM drafts with our checkpoint: same greedy tokens,
log-probabilities within 1e-4, as many drafts accepted.
"""

import importlib.util
import math
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import DeepseekV3ForCausalLM, SequenceLayout, load_pretrained, save_pretrained
from models.mtp import mtp_loss
from rollout.decoding import choose
from rollout.engine import EngineConfig, build_engine
from rollout.native_engine import NativeEngine
from rollout.sample import CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.speculative import SpeculativeDecoder, accept
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_setup import engine_arguments, read_architecture, set_environment
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

STOP = 3
CONFIG = EngineConfig(kind="native", transport="local", max_model_len=64)
PERIOD = 11
# Latent 512 with 64 rotary dimensions: the one size that vLLM's MLA kernel for CPU knows.
TRAINED = replace(
    CORNERS["v3_like"], vocab_size=16, num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64,
    qk_nope_head_dim=32, v_head_dim=32, num_nextn_predict_layers=2, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules that know nothing: nearly every draft is refused."""
    folder = tmp_path_factory.mktemp("random") / "model"
    save_pretrained(sharp_model(replace(CORNERS["v3_like"], num_nextn_predict_layers=2)), folder)
    return folder


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on numbers that count up, and skip one in a quarter of the steps; so are its modules."""
    model = DeepseekV3ForCausalLM(TRAINED)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)
    layout = SequenceLayout.from_lengths([24] * 16)
    for step in range(90):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 90)
        steps = 1 + (torch.rand(16, 24, generator=generator) < 0.25).long()
        ids_T = ((torch.randint(0, PERIOD, (16, 1), generator=generator) + steps.cumsum(1)) % PERIOD + 4).flatten()
        output = model(ids_T, layout)
        logits = model.lm_head(output.hidden_TD).unflatten(0, (16, 24))[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids_T.view(16, 24)[:, 1:].flatten())
        (loss + mtp_loss(model, output, ids_T, layout, weight=1.0)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_pretrained(model, folder)
    return folder


def start(checkpoint: Path, num_speculative_tokens: int, **changes: Any) -> NativeEngine:
    engine = build_engine(replace(CONFIG, num_speculative_tokens=num_speculative_tokens, **changes), str(checkpoint))
    assert isinstance(engine, NativeEngine)
    return engine


def counting_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(id=f"c{i}", text="", token_ids=[(i + j) % PERIOD + 4 for j in range(1 + i % 5)]) for i in range(count)
    ]


def tokens_of(groups: list[CompletionGroup]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group.completions]


def assert_frequencies(counts: Counter[Any], probabilities: dict[Any, float], draws: int) -> None:
    """Five standard deviations of a binomial count, and one for counts that are rare."""
    for outcome, probability in probabilities.items():
        bound = 5 * math.sqrt(draws * probability * (1 - probability)) + 1
        assert abs(counts[outcome] - draws * probability) < bound, (outcome, counts[outcome], draws * probability)


def test_the_rule_gives_the_main_distribution() -> None:
    draws, generator = 100_000, torch.Generator().manual_seed(0)
    p_MV = torch.softmax(torch.randn(3, 5, generator=generator, dtype=torch.float64), -1)
    q_NV = torch.softmax(torch.randn(2, 5, generator=generator, dtype=torch.float64), -1)
    q_NV[1] = torch.tensor([0.0, 0.9, 0.0, 0.1, 0.0])  # proposes little of what the main model may want
    numbers_BX = torch.rand(draws, 5, generator=generator, dtype=torch.float64)
    q_BNV, p_BMV = q_NV.expand(draws, -1, -1), p_MV.expand(draws, -1, -1)
    drafts_BN = torch.stack([choose(q_BNV[:, j].contiguous(), numbers_BX[:, j]) for j in range(2)], dim=1)
    accepted_B, next_B = accept(p_BMV, q_BNV, drafts_BN, numbers_BX[:, 2:])
    tokens_BM = torch.cat([drafts_BN, next_B[:, None]], 1).scatter(1, accepted_B[:, None], next_B[:, None])
    for place in range(3):
        reached = accepted_B >= place
        counts = Counter(tokens_BM[reached, place].tolist())
        assert_frequencies(counts, dict(enumerate(p_MV[place].tolist())), int(reached.sum()))
    rate = torch.minimum(p_MV[:2], q_NV).sum(-1)  # arXiv:2211.17192, corollary 3.6
    for place, expected in enumerate([rate[0], rate[0] * rate[1]], 1):
        assert abs((accepted_B >= place).double().mean() - expected) < 0.01
    assert 0.1 < rate[0] < 0.9 and 0.1 < rate[1] < 0.9


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_frequencies_follow_the_main_model(trained_checkpoint: Path, num_drafts: int) -> None:
    draws, temperature = 10_000, 1.5
    engine = start(trained_checkpoint, num_drafts, max_num_seqs=draws)
    prompt = Prompt(id="p", text="", token_ids=[5, 6])
    params = SamplingParams(num_completions=draws, max_tokens=4, temperature=temperature, stop_token_id=15, seed=9)
    sampled = tokens_of(engine.generate([prompt], params))
    assert 0.2 < engine.draft_acceptance < 0.97, "all or nothing would not test the rule"
    # Exact probability of every beginning of three tokens; nothing follows the stop token.
    beginnings: dict[tuple[int, ...], float] = {(): 1.0}
    model = load_pretrained(trained_checkpoint)
    for length in range(1, 4):
        grown = {}
        open_ones = [b for b in beginnings if 15 not in b and len(b) == length - 1]
        ids_BS = torch.tensor([[*prompt.token_ids, *b] for b in open_ones])
        with torch.no_grad():
            probabilities_BV = (model.logits(ids_BS)[:, -1] / temperature).softmax(-1).tolist()
        for beginning, row in zip(open_ones, probabilities_BV, strict=True):
            grown |= {(*beginning, token): beginnings[beginning] * p for token, p in enumerate(row)}
        beginnings |= grown
    for start_place, end_place in ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3)):
        expected: Counter[tuple[int, ...]] = Counter()
        for beginning, probability in beginnings.items():
            if len(beginning) == end_place:
                expected[beginning[start_place:]] += probability  # type: ignore[assignment]  (a float)
        counts = Counter(tuple(ids[start_place:end_place]) for ids in sampled)
        assert_frequencies(counts, dict(expected), draws)


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_greedy_equals_the_plain_decoder(random_checkpoint: Path, trained_checkpoint: Path, num_drafts: int) -> None:
    for checkpoint, prompts in ((random_checkpoint, make_prompts(40)), (trained_checkpoint, counting_prompts(40))):
        params = SamplingParams(max_tokens=30, temperature=0, stop_token_id=STOP)
        plain = start(checkpoint, 0).generate(prompts, params)
        engine = start(checkpoint, num_drafts)
        groups = engine.generate(prompts, params)
        assert tokens_of(groups) == tokens_of(plain)
        recorded, expected = (
            torch.tensor([x for g in some for x in g.completions[0].logprobs]) for some in (groups, plain)
        )
        assert (recorded - expected).abs().max() < 2e-5
        assert engine.draft_acceptance > (0.9 if checkpoint == trained_checkpoint else 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_the_main_models(
    random_checkpoint: Path, trained_checkpoint: Path, temperature: float
) -> None:
    params = SamplingParams(num_completions=4, max_tokens=20, temperature=temperature, stop_token_id=STOP, seed=1)
    for checkpoint, prompts in ((random_checkpoint, make_prompts(5)), (trained_checkpoint, counting_prompts(5))):
        model = load_pretrained(checkpoint)
        for group in start(checkpoint, 2).generate(prompts, params):
            for completion in group.completions:
                ids_T = torch.tensor(group.prompt.token_ids + completion.token_ids)
                with torch.no_grad():
                    logprobs_TV = (model.logits(ids_T[None])[0] / temperature).log_softmax(-1)
                expected = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)
                recorded = torch.tensor(completion.logprobs)
                assert (recorded - expected[-len(recorded) :]).abs().max() < 1e-4


def test_drafts_are_those_of_whole_sequences(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was accepted, refused or selected before: no stale position in the drafts' cache."""
    original, compared = SpeculativeDecoder._draft, []

    def checked(self: SpeculativeDecoder, draws_BN: torch.Tensor) -> torch.Tensor:
        q_BNV = original(self, draws_BN)
        model, inner = self.model, self.model.model
        for row, length in enumerate(self.cache.lengths_B.tolist()):
            layout = SequenceLayout.from_lengths([length])
            hidden_TD = model(self.ids_BS[row, :length], layout).hidden_TD
            for depth, module in enumerate(self.modules, 1):
                ahead_TD = inner.embed_tokens(self.ids_BS[row, depth : length + depth])
                hidden_TD, _ = module.predict(
                    ahead_TD, hidden_TD, inner.rope(layout.positions_T, hidden_TD.dtype), layout
                )
                expected_V = (model.lm_head(hidden_TD[-1]) / 2).softmax(-1)
                compared.append((q_BNV[row, depth - 1] - expected_V).abs().max().item())
        return q_BNV

    monkeypatch.setattr(SpeculativeDecoder, "_draft", checked)
    params = SamplingParams(num_completions=2, max_tokens=16, temperature=2.0, stop_token_id=50, seed=1)
    prompts = [*make_prompts(4), Prompt(id="one", text="", token_ids=[7])]
    engine = start(random_checkpoint, 2)
    engine.generate(prompts, params)
    assert len(compared) > 100 and max(compared) < 1e-5
    assert engine.draft_acceptance > 0.01, "some drafts must be accepted for this to test anything"


def test_drafts_save_passes(trained_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = DeepseekV3ForCausalLM.decode
    monkeypatch.setattr(DeepseekV3ForCausalLM, "decode", lambda *args: (passes.append(1), original(*args))[1])
    params = SamplingParams(max_tokens=31, temperature=1.0, stop_token_id=STOP, seed=2)
    for num_drafts, most in ((0, 30), (1, 20), (2, 15)):
        passes.clear()
        engine = start(trained_checkpoint, num_drafts)
        groups = engine.generate(counting_prompts(1), params)
        assert len(tokens_of(groups)[0]) == 31
        assert len(passes) <= most, f"{num_drafts} drafts, acceptance {engine.draft_acceptance}"


def test_stop_and_length_inside_a_draft(trained_checkpoint: Path) -> None:
    params = SamplingParams(num_completions=8, max_tokens=9, stop_token_id=8, seed=2)
    engine = start(trained_checkpoint, 2)
    completions = [c for group in engine.generate(counting_prompts(16), params) for c in group.completions]
    assert engine.draft_acceptance > 0.5
    assert {c.finish_reason for c in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    assert {len(c.token_ids) % 3 for c in completions if c.finish_reason is FinishReason.STOP} == {0, 1, 2}
    for completion in completions:
        stopped = completion.finish_reason is FinishReason.STOP
        assert (completion.token_ids[-1] == 8) == stopped and 8 not in completion.token_ids[:-1]
        assert stopped or len(completion.token_ids) == 9
    tight = start(trained_checkpoint, 2, max_model_len=16)
    for length in (1, 7, 13, 14, 15):
        prompt = Prompt(id="long", text="", token_ids=[j % PERIOD + 4 for j in range(length)])
        completion = tight.generate([prompt], SamplingParams(max_tokens=50, stop_token_id=STOP))[0].completions[0]
        assert len(completion.token_ids) == 16 - length and completion.finish_reason is FinishReason.LENGTH


def test_a_completion_does_not_depend_on_its_neighbours(trained_checkpoint: Path) -> None:
    engine = start(trained_checkpoint, 2)
    prompts = counting_prompts(6)
    params = SamplingParams(num_completions=3, max_tokens=12, temperature=1.3, stop_token_id=8, seed=4)
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    assert tokens_of(together) == tokens_of(alone)
    assert tokens_of(together) != tokens_of(engine.generate(prompts, replace(params, seed=5)))
    assert len(set(map(tuple, tokens_of(together)[:3]))) > 1, "completions of one prompt must differ"


def test_refusals(random_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"num_speculative_tokens=3 .* has 2 \(num_nextn_predict_layers\)"):
        start(random_checkpoint, 3)
    with pytest.raises(ValueError, match=r"num_speculative_tokens must be >= 0, got -1"):
        replace(CONFIG, num_speculative_tokens=-1)
    with pytest.raises(ValueError, match=r"num_speculative_tokens=1; set it to 0, or use the engine 'native'"):
        VLLMEngine(replace(CONFIG, kind="vllm", num_speculative_tokens=1), str(random_checkpoint))


def vllm_greedy(folder: str, prompts: list[Prompt], num_drafts: int) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens, their log-probabilities, and how many drafts were accepted; runs in a process of its own."""
    config = EngineConfig(
        kind="vllm", transport="local", max_model_len=64, max_num_seqs=len(prompts), record_experts=False
    )
    architecture = read_architecture(folder)
    set_environment(config, architecture)
    import vllm

    arguments: Any = engine_arguments(config, folder, architecture) | {"disable_log_stats": False}
    # Without its own setting the drafter takes AMX_MLA on CPUs that have AMX, and that knows no float32.
    backend = arguments["attention_backend"]
    drafts = {"method": "mtp", "num_speculative_tokens": num_drafts, "attention_backend": backend}
    llm = vllm.LLM(speculative_config=drafts, **arguments)
    params = vllm.SamplingParams(
        temperature=0, max_tokens=30, stop_token_ids=[STOP], ignore_eos=True, logprobs=0, detokenize=False
    )
    requests: list[Any] = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
    outputs: list[Any] = [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]
    logprobs = [[step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    accepted: Any = next(m for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    return [list(o.token_ids) for o in outputs], logprobs, accepted.value


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_drafts_with_our_checkpoint(trained_checkpoint: Path) -> None:
    prompts = counting_prompts(8)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        tokens, logprobs, accepted = process.submit(vllm_greedy, str(trained_checkpoint), prompts, 1).result()
    params = SamplingParams(max_tokens=30, temperature=0, stop_token_id=STOP)
    plain = start(trained_checkpoint, 0).generate(prompts, params)
    assert tokens == tokens_of(plain)
    for ours, theirs in zip((c.logprobs for g in plain for c in g.completions), logprobs, strict=True):
        assert (torch.tensor(ours) - torch.tensor(theirs)).abs().max() < 1e-4
    engine = start(trained_checkpoint, 1)
    engine.generate(prompts, params)
    assert engine.draft_acceptance > 0.8
    assert abs(accepted / engine._drafts.num_accepted - 1) < 0.1, "vLLM zeroes the first embedding: not quite equal"
