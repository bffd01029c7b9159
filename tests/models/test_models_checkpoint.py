"""Checkpoints that are as they should be. Pinned here:

1. ours -> disk -> ours and ours -> transformers -> ours are bit-exact, in one file and in shards, tied or not;
2. saving hands one shard at a time to the disk and forgets it; loading holds one tensor and never a second model;
3. prediction modules come with their copies of embedding and head, or are dropped on request only;
4. a failed save leaves the previous checkpoint and nothing else.
"""

import errno
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from models import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from models.checkpoint import (
    hf_tensors,
    is_disk_full,
    load_hf_tensors,
    load_pretrained,
    read_tensors,
    replace_folder,
    save_pretrained,
    tensor_shapes,
)
from models.shards import write_shards
from tests.models.test_models_parity import BASE, CORNERS, reference_of, sharp_model

FP8_SIZED = replace(
    BASE, vocab_size=60, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=2,
    n_routed_experts=4, q_lora_rank=128, kv_lora_rank=112, qk_nope_head_dim=48, v_head_dim=16, first_k_dense_replace=1,
)  # fmt: skip
"""Every matrix has whole blocks or a single one: transformers divides a ragged matrix into equal parts instead."""
MTP = replace(BASE, num_hidden_layers=2, num_nextn_predict_layers=2)


def assert_same_tensors(ours: DeepseekV3ForCausalLM, theirs: DeepseekV3ForCausalLM) -> None:
    assert ours.config == theirs.config
    expected = dict(hf_tensors(theirs))
    for name, tensor in hf_tensors(ours):
        other = expected.pop(name)
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    assert not expected


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 60_000, 1])
@pytest.mark.parametrize("config", [CORNERS["v3_like"], replace(BASE, tie_word_embeddings=True), MTP])
def test_round_trip_is_bitwise(config: DeepseekV3Config, max_shard_bytes: int, tmp_path) -> None:
    model = sharp_model(config)
    save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_same_tensors(load_pretrained(tmp_path), model)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (max_shard_bytes < 1e9) == (not (tmp_path / "model.safetensors").exists())
    assert (list(tensor_shapes(tmp_path)) and "lm_head.weight" in tensor_shapes(tmp_path)) or config.tie_word_embeddings
    if index.is_file():
        content = json.loads(index.read_text())
        files = {name: load_file(tmp_path / name) for name in set(content["weight_map"].values())}
        assert sorted(files) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert all(set(files[file]) >= {name} for name, file in content["weight_map"].items())
        total = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        assert content["metadata"]["total_size"] == total
        sizes = [(len(tensors), sum(t.nbytes for t in tensors.values())) for tensors in files.values()]
        assert all(num == 1 or size <= max_shard_bytes for num, size in sizes)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_through_transformers_in_shards(tied: bool, tmp_path) -> None:
    model = sharp_model(replace(CORNERS["v3_like"], tie_word_embeddings=tied))
    save_pretrained(model, tmp_path / "shards", max_shard_bytes=60_000)
    reference = reference_of(model, tmp_path / "ours")
    from_shards = type(reference).from_pretrained(tmp_path / "shards", dtype=torch.float32)
    for (name, one), other in zip(from_shards.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other), name
    from_shards.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    assert ("lm_head.weight" in tensor_shapes(tmp_path / "theirs")) == (not tied)
    assert tensor_shapes(tmp_path / "theirs") == tensor_shapes(tmp_path / "ours") == tensor_shapes(tmp_path / "shards")
    assert_same_tensors(load_pretrained(tmp_path / "theirs"), model)


def test_loaded_model_computes_the_same(tmp_path) -> None:
    """What no checkpoint holds (rotary frequencies, ties) is there after the detour over the meta device."""
    model = sharp_model(replace(CORNERS["yarn"], tie_word_embeddings=True))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids_T, layout = torch.arange(40), SequenceLayout.from_lengths([25, 15])
    with torch.no_grad():
        assert torch.equal(loaded(ids_T, layout).hidden_TD, model(ids_T, layout).hidden_TD)


def test_router_bias_stays_float32(tmp_path) -> None:
    model = sharp_model(CORNERS["v3_like"])
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for layer, router in loaded.routers().items():
        bias = model.routers()[layer].e_score_correction_bias
        assert torch.equal(router.e_score_correction_bias, bias) and bias.dtype == torch.float32
        assert not torch.equal(bias, bias.bfloat16().float()), "this bias could not show a cast"


def test_saving_streams(tmp_path, monkeypatch) -> None:
    """An FP8 save makes new tensors: when a shard is written, those of earlier shards are gone."""
    earlier: list[weakref.ref] = []
    sizes: list[int] = []

    def spy(tensors, path, metadata) -> None:
        assert not any(reference() is not None for reference in earlier), f"{path} is written, an earlier shard lives"
        earlier.extend(weakref.ref(t) for name, t in tensors.items() if "_proj" in name and "eh_proj" not in name)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("models.shards.save_file", spy)
    save_pretrained(sharp_model(FP8_SIZED), tmp_path, max_shard_bytes=200_000, fp8="float32")
    assert len(sizes) > 5 and len(earlier) > 20 and max(sizes) <= 400_000


def test_loading_streams(tmp_path, monkeypatch) -> None:
    """No float32 twin of a bfloat16 parameter ever exists, and each tensor read is gone when the next one is."""
    save_pretrained(sharp_model(FP8_SIZED).to(torch.bfloat16), tmp_path)
    float32_sizes: list[int] = []
    alive: list[weakref.ref] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.dtype == torch.float32:
                float32_sizes.append(out.numel())
            return out

    from models.fp8 import read_weight

    def spy(files, name):
        assert sum(reference() is not None for reference in alive) <= 1, name
        tensor = read_weight(files, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr("models.checkpoint.read_weight", spy)
    with Watch():
        load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert max(float32_sizes) <= FP8_SIZED.qk_rope_head_dim, "more than rotary table and router bias in float32"
    assert len(alive) == len(tensor_shapes(tmp_path))


def test_prediction_modules_bring_copies(tmp_path) -> None:
    model = sharp_model(MTP)
    save_pretrained(model, tmp_path, max_shard_bytes=60_000)
    on_disk = dict(read_tensors(tmp_path))
    for layer in (2, 3):
        assert torch.equal(on_disk[f"model.layers.{layer}.embed_tokens.weight"], on_disk["model.embed_tokens.weight"])
        assert torch.equal(on_disk[f"model.layers.{layer}.shared_head.head.weight"], on_disk["lm_head.weight"])
        assert f"model.layers.{layer}.eh_proj.weight" in on_disk
    dropped = load_pretrained(tmp_path, drop_mtp=True)
    assert dropped.config == replace(MTP, num_nextn_predict_layers=0)
    expected = dict(hf_tensors(model))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in hf_tensors(dropped))

    other = {name: t + 1 if name == "model.layers.3.embed_tokens.weight" else t for name, t in on_disk.items()}
    with pytest.raises(ValueError, match=r"1 tensors .*(embed_tokens.weight differs from model.*embed_tokens.weight)"):
        load_hf_tensors(model, other.items(), "here")


def test_unwanted_prediction_modules_are_an_error_with_remedies(tmp_path) -> None:
    save_pretrained(sharp_model(MTP), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"layers \[2, 3\].*set it to 2.*drop_mtp=True.*grpo convert --mtp drop"):
        load_pretrained(tmp_path)
    load_pretrained(tmp_path, drop_mtp=True)


@pytest.mark.parametrize("where", ["second shard", "fsync"])
def test_full_disk_leaves_the_previous_checkpoint(where: str, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "model"
    save_pretrained(sharp_model(BASE), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def full_save(tensors, path, metadata) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata=metadata)

    def full_sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full_sync)
    else:
        monkeypatch.setattr("models.shards.save_file", full_save)
    with pytest.raises(OSError, match=r"disk is full: .*/model was not written.*untouched") as caught:
        save_pretrained(sharp_model(BASE, seed=5), folder, max_shard_bytes=60_000)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "leftovers"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_known_behind_other_errors(number: int) -> None:
    """torch's writer raises RuntimeError while it handles the real one."""
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904  as torch does
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(RuntimeError("unexpected")) and not is_disk_full(OSError(errno.EIO, "bad sector"))


def test_crash_between_the_renames_loses_nothing(tmp_path) -> None:
    folder = tmp_path / "model"
    save_pretrained(sharp_model(BASE), folder)
    folder.rename(tmp_path / ".model.old")
    (tmp_path / ".model.new").mkdir()
    with pytest.raises(KeyError), replace_folder(folder):
        raise KeyError("the next save fails as well")
    assert_same_tensors(load_pretrained(folder), sharp_model(BASE))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_are_as_readable_as_any(tmp_path) -> None:
    write_shards(tmp_path, [("a", torch.zeros(2))])
    Path(tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="tensor a is given twice"):
        write_shards(tmp_path, [("a", torch.zeros(2)), ("a", torch.ones(2))])
