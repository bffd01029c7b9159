"""Completions one by one, paused and continued.

Pinned: (1) single completions leave an engine as they finish, and waiting ones take their places; (2) paused and
continued under the same weights, a completion is the one it would have been; (3) under new weights each token's
log-probability is that of the version that its span names; (4) draws depend on (seed, place) alone and are uniform;
(5) an inbox that waits is woken.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import DeepseekV3ForCausalLM, SequenceLayout, hf_tensors, save_pretrained
from rollout.decoding import uniforms
from rollout.engine import EngineConfig, build_engine
from rollout.pool import LocalPool
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Inbox, requests_of
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

CONFIG = EngineConfig(kind="native", transport="local", max_model_len=64, max_num_seqs=8)
PARAMS = SamplingParams(num_completions=4, max_tokens=24, stop_token_id=50, seed=6)
PROMPTS = make_prompts(6)
MTP = replace(CORNERS["groups"], num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("streaming") / "model"
    save_pretrained(sharp_model(CORNERS["groups"]), folder)
    return str(folder)


def tokens(groups: Sequence[CompletionGroup]) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [completion.token_ids for completion in group.completions] for group in groups}


def test_completions_leave_as_they_finish_and_others_take_their_places(checkpoint: str) -> None:
    engine = build_engine(CONFIG, checkpoint)
    inbox = Inbox([request for prompt in PROMPTS for request in requests_of(prompt, PARAMS)])
    inbox.close()
    steps_at: dict[tuple[str, int], int] = {}
    lengths: dict[tuple[str, int], int] = {}
    for finished in engine.stream(inbox, PARAMS):
        for sampled in finished:
            assert sampled.key not in steps_at
            steps_at[sampled.key], lengths[sampled.key] = engine.steps, len(sampled.completion.token_ids)
    assert len(steps_at) == 24
    first = [request.key for prompt in PROMPTS for request in requests_of(prompt, PARAMS)][: CONFIG.max_num_seqs]
    # The first token of what is admitted comes with the step behind it.
    assert all(steps_at[key] == max(1, lengths[key] - 1) for key in first), "each leaves when its last token is there"
    in_turn = 3 * PARAMS.max_tokens  # three batches, one after the other
    assert engine.steps < 0.8 * in_turn, f"{engine.steps} steps: a free place must not wait for its neighbours"


class StopAfter(threading.Event):
    """Found to be set after it was looked at so often, twice in each step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.looks = 2 * steps

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def pause_and_continue(pool: LocalPool, steps: int, between: Any = lambda: None) -> tuple[list[Any], list[Any]]:
    """Groups of a run stopped after so many steps, and those of the run that continues it."""
    paused = list(pool.generate(PROMPTS, PARAMS, stop=StopAfter(steps)))
    between()
    return paused, list(pool.generate(paused, PARAMS))


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_continued_under_the_same_weights(checkpoint: str, steps: int) -> None:
    pool = LocalPool(CONFIG, checkpoint)
    expected = list(pool.generate(PROMPTS, PARAMS))
    paused, continued = pause_and_continue(pool, steps)
    assert sorted(group.prompt.id for group in paused) == sorted(prompt.id for prompt in PROMPTS)
    assert not all(group.is_complete for group in paused)
    reasons = {completion.finish_reason for group in paused for completion in group.completions}
    assert FinishReason.PAUSED in reasons and (steps < 20 or FinishReason.STOP in reasons)
    assert any(not c.token_ids for group in paused for c in group.completions), "some had not begun"
    assert all(group.is_complete for group in continued)
    assert tokens(continued) == tokens(expected)
    spans = {c.version_spans for group in continued for c in group.completions}
    assert spans == {((0, n),) for n in {len(c.token_ids) for g in expected for c in g.completions}}


def test_continued_under_new_weights(checkpoint: str) -> None:
    pool, new = LocalPool(CONFIG, checkpoint), sharp_model(CORNERS["groups"], seed=8)
    models = {0: sharp_model(CORNERS["groups"]), 3: new}
    undisturbed = tokens(list(pool.generate(PROMPTS, PARAMS)))
    _, continued = pause_and_continue(pool, 5, lambda: pool.load_weights(hf_tensors(new), 3))
    mixed = 0
    for group in continued:
        for completion, before in zip(group.completions, undisturbed[group.prompt.id], strict=True):
            mixed += len(completion.version_spans) == 2
            assert_logprobs_of_versions(group.prompt, completion, models)
            kept = sum(size for version, size in completion.version_spans if version == 0)
            assert completion.token_ids[:kept] == before[:kept], "tokens from before the pause stay"
            assert len(completion.token_ids) <= PARAMS.max_tokens
            assert [version for version, _ in completion.version_spans] in ([0], [3], [0, 3])
            assert (completion.oldest_version, completion.newest_version) in ((0, 0), (0, 3), (3, 3))
    assert mixed >= 4, "nothing was continued"


def assert_logprobs_of_versions(
    prompt: Prompt, completion: Completion, models: dict[int, DeepseekV3ForCausalLM]
) -> None:
    ids_T = torch.tensor(prompt.token_ids + completion.token_ids)
    place = 0
    for version, size in completion.version_spans:
        model = models[version]
        with torch.no_grad():
            hidden_TD = model(ids_T, SequenceLayout.from_lengths([len(ids_T)])).hidden_TD
            logprobs_TV = model.lm_head(hidden_TD).log_softmax(-1)
        logprobs_L = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)[len(prompt.token_ids) - 1 :]
        recorded_L = torch.tensor(completion.logprobs)
        assert (recorded_L - logprobs_L)[place : place + size].abs().max() < 1e-4, f"version {version}"
        place += size


def test_speculative_requests_join_and_pause(tmp_path: Path) -> None:
    model = sharp_model(MTP)
    save_pretrained(model, tmp_path / "model")
    wide = replace(CONFIG, num_speculative_tokens=1, max_num_seqs=64)
    expected = list(LocalPool(wide, str(tmp_path / "model")).generate(PROMPTS, PARAMS))
    narrow = LocalPool(replace(wide, max_num_seqs=5), str(tmp_path / "model"))
    assert tokens(list(narrow.generate(PROMPTS, PARAMS))) == tokens(expected)
    _, continued = pause_and_continue(narrow, 4)
    for group in continued:
        for completion in group.completions:
            assert_logprobs_of_versions(group.prompt, completion, {0: model})


def test_draws_are_uniform_and_depend_on_seed_and_place_alone() -> None:
    seeds, places = list(range(1000)), [0] * 1000
    all_BX = uniforms(seeds, places, 3)
    assert torch.equal(uniforms([7], [0], 3)[0], all_BX[7]) and torch.equal(uniforms([7], [0], 1)[0], all_BX[7, :1])
    neighbours = {
        "seeds": uniforms(list(range(100_000)), [5] * 100_000, 1).squeeze(1),
        "places": uniforms([2**63 - 1] * 100_000, list(range(100_000)), 1).squeeze(1),
        "lanes": uniforms(list(range(5000)), [3] * 5000, 20).flatten(),
    }
    for name, numbers in neighbours.items():
        assert len(numbers.unique()) == 100_000 and numbers.min() >= 0 and numbers.max() < 1, name
        # five standard deviations of a mean, of a share of tenths, and of a lag-one correlation
        assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5, name
        assert (numbers.histc(10, 0, 1) - 1e4).abs().max() < 5 * (1e4 * 0.9) ** 0.5, name
        assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 5 / 1e5**0.5, name


def test_an_inbox_wakes_its_reader() -> None:
    request = requests_of(PROMPTS[0], PARAMS)[0]
    for wake, expected in ((lambda box: box.put([request]), [request]), (Inbox.close, []), (Inbox.pause, [])):
        inbox, taken = Inbox(), []
        reader = threading.Thread(target=lambda box=inbox, into=taken: into.append(box.take(9, wait=True)))
        reader.start()
        wake(inbox)
        reader.join(10)
        assert not reader.is_alive() and taken == [expected]
    paused = Inbox([request])
    paused.pause()
    assert paused.take(9, wait=False) == [] and paused.drain() == [request] and paused.drain() == []


def test_two_prompts_of_one_id_are_refused(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="prompt id 'p0' occurs twice"):
        list(LocalPool(CONFIG, checkpoint).generate([PROMPTS[0], PROMPTS[0]], PARAMS))
