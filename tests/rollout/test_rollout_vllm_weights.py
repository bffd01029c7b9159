"""Injects what goes wrong in a sync into a real vLLM engine with MLA, in this process.

Pinned: (1) a skipped expert, an absorbed copy that stayed behind, two layers swapped on the way, each an error;
(2) a sync after a failed one, wherever that one broke off, leaves exactly the weights it was given; (3) which tensors
can be read back, on CPU: those that vLLM does not repack, and MLA's absorbed copies.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.manifest import SyncError
from rollout.native_engine import NativeEngine
from rollout.pool import LocalPool
from rollout.probe import probe_engine
from rollout.vllm_held import places
from rollout.weight_source import ByReference, Chunk, Post, call_here, deliver
from rollout.weight_sync import probe_sequences, push_weights
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
# The one size that vLLM's MLA kernel for CPU knows; two MoE layers of one shape, so that they can be swapped.
MLA_CONFIG = replace(
    CORNERS["v3_like"], num_hidden_layers=3, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64
)
FIRST, OTHER = sharp_model(MLA_CONFIG), sharp_model(MLA_CONFIG, seed=11)
LOST = "model.layers.1.mlp.experts.3.down_proj.weight"
PROBE = probe_sequences(make_prompts(4), MLA_CONFIG.vocab_size)
LIMIT = 1e-4


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LocalPool, NativeEngine]]:
    """(vLLM engine, its pool, a learner that holds OTHER)"""
    folder = tmp_path_factory.mktemp("vllm_weights")
    save_pretrained(FIRST, folder / "first")
    save_pretrained(OTHER, folder / "other")
    environment = dict(os.environ)
    pool = LocalPool(EngineConfig(kind="vllm", transport="local", max_model_len=64), str(folder / "first"))
    yield pool._engine, pool, NativeEngine(EngineConfig(kind="native", transport="local"), str(folder / "other"))
    pool.close()
    os.environ.clear()
    os.environ.update(environment)


class SmallChunks(ByReference):
    """Many chunks, each altered on its way, after the manifest has seen it."""

    chunk_bytes = 100_000

    def __init__(self, alter: Callable[[Chunk], Chunk]) -> None:
        self.alter = alter

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        return super().send(self.alter(chunk), post)


def sync_is_good(session: tuple[Any, LocalPool, NativeEngine], version: int) -> None:
    _, pool, learner = session
    drift = push_weights(pool, hf_tensors(OTHER), version, PROBE, learner.score, LIMIT)
    assert drift is not None and drift < LIMIT


def refuses(engine: Any) -> None:
    for call in (lambda: engine.score(PROBE), lambda: probe_engine(engine, PROBE)):
        with pytest.raises(SyncError, match="this engine must not sample"):
            call()


def test_faults_on_the_way_and_a_good_sync_after_each(session: tuple[Any, LocalPool, NativeEngine]) -> None:
    engine, _, _ = session
    swapped = {"layers.1": "layers.2", "layers.2": "layers.1"}

    def swap(chunk: Chunk) -> Chunk:
        names = [re.sub(r"layers\.[12]\b", lambda match: swapped[match[0]], name) for name in chunk.names]
        return Chunk(chunk.version, names, chunk.tensors)

    def break_off(chunk: Chunk) -> Chunk:
        if LOST in chunk.names:
            raise KeyboardInterrupt
        return chunk

    whole = [*hf_tensors(FIRST)]
    lacking = [(name, tensor) for name, tensor in whole if name != LOST]
    faults = [
        (lacking, lambda chunk: chunk, SyncError, f"missing {LOST}$"),
        (whole, swap, SyncError, r"layers\.\d\..* has other values than were sent"),
        (whole, break_off, KeyboardInterrupt, None),
    ]
    for version, (weights, alter, error, message) in enumerate(faults, 1):
        with pytest.raises(error, match=message):
            deliver(weights, 10 * version, call_here(engine), SmallChunks(alter))
        refuses(engine)
        sync_is_good(session, 10 * version + 1)
        assert engine.version == 10 * version + 1


def test_a_load_that_fails_inside_vllm(
    session: tuple[Any, LocalPool, NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps counting a layer's tensors from where a failed update stopped, unless that update is ended first."""
    engine, _, _ = session
    [model] = engine.llm.apply_model(lambda module: module)
    load = model.load_weights

    def fails_among_the_experts(weights: Any) -> Any:
        if LOST in dict(weights):
            raise ZeroDivisionError
        return load(weights)

    monkeypatch.setattr(model, "load_weights", fails_among_the_experts)
    link = SmallChunks(lambda chunk: chunk)
    link.chunk_bytes = 10_000  # one or two matrices of an expert
    with pytest.raises(ZeroDivisionError):
        deliver(hf_tensors(FIRST), 50, call_here(engine), link)
    monkeypatch.undo()
    refuses(engine)
    sync_is_good(session, 51)


@pytest.mark.parametrize("copy", ["W_UK_T", "W_UV"])
def test_an_absorbed_copy_that_stayed_behind(
    session: tuple[Any, LocalPool, NativeEngine], copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU all attention computes with these copies; on CUDA decoding alone, which is why the probe decodes."""
    engine, pool, learner = session
    sync_is_good(session, 60)
    [model] = engine.llm.apply_model(lambda module: module)
    absorbed = [module for module in model.modules() if hasattr(module, copy)]
    stale = [getattr(module, copy).detach().clone() * 0.9 for module in absorbed]
    end_load = engine._end_load

    def leave_stale() -> None:
        end_load()
        for module, tensor in zip(absorbed, stale, strict=True):
            getattr(module, copy).data.copy_(tensor)

    monkeypatch.setattr(engine, "_end_load", leave_stale)
    with pytest.raises(SyncError, match=r"kv_b_proj\.weight in .*W_UK_T and W_UV"):
        pool.load_weights(hf_tensors(OTHER), 61)
    refuses(engine)
    monkeypatch.setattr(engine, "_held", lambda: [])
    with pytest.raises(SyncError, match="after the push of version 62, engine 0 scores the probe differently"):
        push_weights(pool, hf_tensors(OTHER), 62, PROBE, learner.score, LIMIT)
    refuses(engine)
    monkeypatch.undo()
    sync_is_good(session, 63)


def test_a_tensor_that_stays_behind_and_can_be_read_back(
    session: tuple[Any, LocalPool, NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By far less than the probe would see, as after a step with a tiny learning rate."""
    engine, pool, _ = session
    norm = "model.layers.1.input_layernorm.weight"
    load = engine._load

    def keep_norm(tensors: list[tuple[str, Tensor]]) -> None:
        load([(name, tensor * (1 + 2e-7) if name == norm else tensor) for name, tensor in tensors])

    monkeypatch.setattr(engine, "_load", keep_norm)
    with pytest.raises(SyncError, match=rf"holds other values than were sent: {re.escape(norm)} in {re.escape(norm)}$"):
        pool.load_weights(hf_tensors(OTHER), 70)
    monkeypatch.undo()
    sync_is_good(session, 71)


def test_what_can_be_read_back(session: tuple[Any, LocalPool, NativeEngine]) -> None:
    engine, _, _ = session
    readable = {(name, place.rsplit(".", 1)[-1]) for name, place, _ in engine._places}
    assert ("model.layers.1.self_attn.kv_b_proj.weight", "W_UK_T and W_UV") in readable
    assert ("model.embed_tokens.weight", "weight") in readable, "without the rows that pad the vocabulary"
    names = {name for name, _ in readable}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert not any("experts" in name for name in names), "on CPU they are packed, in the same shape"
    assert not any("o_proj" in name for name in names), "on CPU they are packed, and the parameter is empty"


def test_fused_tensors_are_found_where_vllm_keeps_them_unpacked() -> None:
    """As on CUDA, where nothing is packed: a module with vLLM's names and fusions, made from the checkpoint."""

    class Node(torch.nn.Module):
        pass

    checkpoint = dict(hf_tensors(FIRST))
    layer, fused = "model.layers.1", {}
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    fused[f"{attention}.fused_qkv_a_proj.weight"] = torch.cat(
        [checkpoint[f"{attention}.q_a_proj.weight"], checkpoint[f"{attention}.kv_a_proj_with_mqa.weight"]]
    )
    gates, ups, downs = (
        torch.stack([checkpoint[f"{mlp}.experts.{e}.{part}_proj.weight"] for e in range(MLA_CONFIG.n_routed_experts)])
        for part in ("gate", "up", "down")
    )
    fused[f"{mlp}.experts.w13_weight"] = torch.cat([gates, ups], dim=1)
    fused[f"{mlp}.experts.w2_weight"] = downs
    shared = f"{mlp}.shared_experts"
    fused[f"{shared}.gate_up_proj.weight"] = torch.cat(
        [checkpoint[f"{shared}.gate_proj.weight"], checkpoint[f"{shared}.up_proj.weight"]]
    )
    fused[f"{shared}.down_proj.weight"] = checkpoint[f"{shared}.down_proj.weight"]
    root = Node()
    for name, tensor in fused.items():
        *path, last = name.split(".")
        node: torch.nn.Module = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node.get_submodule(part)
        node.register_parameter(last, torch.nn.Parameter(tensor))
    found = {name: read() for name, _, read in places(root, {name: t.shape for name, t in checkpoint.items()})}
    assert {re.sub(r"\.\d+\.", ".N.", name.removeprefix(f"{layer}.")) for name in found} == {
        "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight",
        "mlp.experts.N.gate_proj.weight", "mlp.experts.N.up_proj.weight", "mlp.experts.N.down_proj.weight",
        "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    }  # fmt: skip
    for name, tensor in found.items():
        assert tensor is not None and torch.equal(tensor, checkpoint[name]), name
