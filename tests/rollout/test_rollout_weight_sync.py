"""Injects what goes wrong in a sync, against the native engine: each must be an error that names the tensor.

Pinned: (1) a tensor left out, given twice, unexpected, misshapen; two layers swapped; one element altered by 1e-6; half
a sync; a wrong version; (2) what the engine holds is compared, too, after casts as well; (3) from the first tensor to
the end of the next complete sync an engine neither samples nor scores; (4) a sync after a failed one works.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig, WeightStream
from rollout.manifest import Manifest, SyncError
from rollout.native_engine import NativeEngine
from rollout.sample import SamplingParams
from rollout.weight_source import ByReference, Chunk, Post, WeightSource, call_here, deliver
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

MODEL, OTHER = sharp_model(CORNERS["v3_like"]), sharp_model(CORNERS["v3_like"], seed=3)
LOST = "model.layers.1.mlp.experts.3.down_proj.weight"
GREEDY = SamplingParams(max_tokens=4, temperature=0, stop_token_id=3)


class SmallChunks(ByReference):
    """So that a sync of the tiny model is many chunks; `alter` stands for what happens on the way."""

    chunk_bytes = 20_000

    def __init__(self, alter: Callable[[Chunk], Chunk] = lambda chunk: chunk) -> None:
        self.alter = alter
        self.sent = 0

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        self.sent += 1
        return super().send(self.alter(chunk), post)


@pytest.fixture
def engine(tmp_path: Path) -> NativeEngine:
    save_pretrained(MODEL, tmp_path / "model")
    return NativeEngine(EngineConfig(kind="native", transport="local", max_model_len=64), str(tmp_path / "model"))


def renamed(weights: WeightStream, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield names.get(name, name), tensor


def each(change: Callable[[str, Tensor], Tensor]) -> Callable[[Chunk], Chunk]:
    """Alters the tensors of a chunk after the manifest has seen them."""
    return lambda chunk: Chunk(
        chunk.version, chunk.names, [change(n, t) for n, t in zip(chunk.names, chunk.tensors, strict=True)]
    )


def by_a_millionth(name: str, tensor: Tensor) -> Tensor:
    if name != LOST:
        return tensor
    changed = tensor.clone()
    changed[0, 0] += 1e-6
    assert changed[0, 0] != tensor[0, 0]
    return changed


def swap_layers(chunk: Chunk) -> Chunk:
    """Layers 1 and 2 have the same shapes: only what is in them tells them apart."""
    other = {"layers.1": "layers.2", "layers.2": "layers.1"}
    names = [re.sub(r"layers\.[12]\b", lambda match: other[match[0]], name) for name in chunk.names]
    return Chunk(chunk.version, names, chunk.tensors)


def good() -> WeightStream:
    return hf_tensors(OTHER)


FAULTS: dict[str, tuple[Callable[[], WeightStream], SmallChunks, str]] = {
    "skipped expert": (lambda: [(n, t) for n, t in good() if n != LOST], SmallChunks(), f"missing {LOST}$"),
    "given twice": (lambda: [*good(), ("lm_head.weight", OTHER.lm_head.weight)], SmallChunks(), "twice lm_head.weight"),
    "twice at once": (lambda: [p for p in good() for _ in range(1 + (p[0] == LOST))], SmallChunks(), f"twice {LOST}"),
    "unexpected": (lambda: [*good(), ("model.extra", torch.zeros(1))], SmallChunks(), r"unexpected model\.extra"),
    "misshapen": (
        lambda: [(n, t[:-1] if n == LOST else t) for n, t in good()],
        SmallChunks(),
        rf"{LOST} has shape \[63, 32\], the engine needs \[64, 32\]",
    ),
    "integers": (
        lambda: [(n, t.long() if n == LOST else t) for n, t in good()],
        SmallChunks(),
        rf"{LOST} has dtype torch.int64",
    ),
    "swapped layers": (good, SmallChunks(swap_layers), "has other values than were sent"),
    "one element": (good, SmallChunks(each(by_a_millionth)), f"arrived altered: {LOST} has other values"),
    "cast": (
        good,
        SmallChunks(each(lambda n, t: t.bfloat16() if n == LOST else t)),
        f"{LOST} is torch.bfloat16 .* sent was torch.float32",
    ),
    "wrong version": (
        good,
        SmallChunks(lambda chunk: Chunk(6, chunk.names, chunk.tensors)),
        "tensors of version 6 arrived in the sync of version 7",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_and_stops_sampling_until_a_complete_sync(engine: NativeEngine, fault: str) -> None:
    weights, link, message = FAULTS[fault]
    reference = generate(engine)
    with pytest.raises(SyncError, match=message):
        deliver(weights(), 7, call_here(engine), link)
    refuses(engine, "its weights are half replaced: the sync of version 7 did not complete")
    deliver(hf_tensors(MODEL), 8, call_here(engine), SmallChunks())
    assert generate(engine) == reference, "a complete sync after a failed one leaves nothing of the failed one"
    assert engine.version == 8


def generate(engine: NativeEngine) -> list[list[int]]:
    return [group.completions[0].token_ids for group in engine.generate(make_prompts(4), GREEDY)]


def refuses(engine: NativeEngine, reason: str) -> None:
    for call in (lambda: generate(engine), lambda: engine.score([[1, 2, 3]])):
        with pytest.raises(SyncError, match=f"this engine must not sample: {reason}"):
            call()


def test_half_a_sync(engine: NativeEngine) -> None:
    class BrokenOffError(Exception):
        pass

    def broken() -> Iterator[tuple[str, Tensor]]:
        for i, pair in enumerate(hf_tensors(OTHER)):
            if i == 40:
                raise BrokenOffError
            yield pair

    link = SmallChunks()
    with pytest.raises(BrokenOffError):
        deliver(broken(), 3, call_here(engine), link)
    assert link.sent > 1, "something must have been replaced"
    refuses(engine, "its weights are half replaced: the sync of version 3")
    assert engine.version == 0


def test_a_manifest_that_does_not_fit_what_came(engine: NativeEngine) -> None:
    def finish_with(change: Callable[[Manifest], Manifest]) -> Post:
        def post(method: str, argument: Any) -> Callable[[], object]:
            return call_here(engine)(method, change(argument) if method == "finish_weights" else argument)

        return post

    with pytest.raises(SyncError, match="a manifest of version 4 ends the sync of version 5"):
        deliver(good(), 5, finish_with(lambda m: Manifest(4, m.tensors)))
    with pytest.raises(SyncError, match=f"arrived altered: unexpected {LOST}"):
        deliver(good(), 5, finish_with(lambda m: Manifest(5, {n: t for n, t in m.tensors.items() if n != LOST})))
    refuses(engine, "its weights are half replaced: the sync of version 5")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_engine_holds_is_compared(tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that skips an expert, or writes into a copy, shows although everything arrived."""
    save_pretrained(MODEL, tmp_path / "model")
    engine = NativeEngine(EngineConfig(kind="native", dtype=dtype), str(tmp_path / "model"))
    engine.load_weights(good(), 1)
    load = engine._load
    monkeypatch.setattr(engine, "_load", lambda tensors: load([(n, t) for n, t in tensors if n != LOST]))
    with pytest.raises(SyncError, match=rf"holds other values than were sent: {LOST} in the model$"):
        engine.load_weights(hf_tensors(MODEL), 2)
    refuses(engine, "its weights are half replaced")
    engine.load_weights(good(), 3)  # the skipped tensor is the right one again
    assert engine.version == 3 and generate(engine)


def test_a_sync_is_repeated_only_with_the_same_weights(engine: NativeEngine) -> None:
    """For an engine that took the place of a dead one, while the learner may have moved on."""
    model = sharp_model(CORNERS["v3_like"], seed=4)
    first = deliver(WeightSource(model), 2, call_here(engine))
    assert deliver(WeightSource(model), 2, call_here(engine), same_as=first) == first
    spent = hf_tensors(model)
    list(spent)
    with pytest.raises(SyncError, match=r"no longer has the weights of version 2: missing model\.embed_tokens\.weight"):
        deliver(spent, 2, call_here(engine), same_as=first)
    with torch.no_grad():
        model.lm_head.weight[3, 4] *= 1.0001
    with pytest.raises(SyncError, match=r"no longer has the weights of version 2: lm_head\.weight has other values"):
        deliver(WeightSource(model), 2, call_here(engine), same_as=first)
    refuses(engine, "its weights are half replaced")


def test_rejected_engines_refuse_until_the_next_sync(engine: NativeEngine) -> None:
    engine.reject_weights("it failed the probe")
    refuses(engine, "it failed the probe; a complete sync makes it usable again")
    engine.load_weights(WeightSource(OTHER), 2)
    assert generate(engine)
