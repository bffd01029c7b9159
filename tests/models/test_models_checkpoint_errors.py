"""Damaged checkpoints: each way to break one gives one error that names the file or tensor and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import load_pretrained, read_tensors, save_pretrained, tensor_shapes
from models.fp8 import dequantize_block
from models.shards import INDEX_NAME
from tests.models.test_models_parity import BASE, sharp_model

NORM, HEAD, BIAS = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
OUT = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """Files of a sharded checkpoint."""
    folder = tmp_path_factory.mktemp("shards")
    save_pretrained(sharp_model(BASE), folder, max_shard_bytes=60_000)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("single")
    save_pretrained(sharp_model(BASE), folder, fp8="float32")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def point_elsewhere(folder: Path) -> None:
    other = next(path.name for path in folder.glob("*.safetensors") if path != shard_of(folder, NORM))
    edit_index(folder, lambda weight_map: weight_map.update({NORM: other}))


def duplicate(folder: Path) -> None:
    norm = load_file(shard_of(folder, NORM))[NORM]
    edit_tensors(folder / "model-00001-of-00019.safetensors", lambda tensors: tensors.update({NORM: norm}))


def repeat_in_header(folder: Path) -> None:
    path = shard_of(folder, NORM)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"{", b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"},', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


BROKEN_SHARDS = {
    "no shard": (lambda f: shard_of(f, NORM).unlink(), FileNotFoundError, r"lacks model-000\d\d-of.*download or copy"),
    "cut data": (
        lambda f: truncate(shard_of(f, HEAD), 9000), ValueError,
        r"model-000\d\d-of-00019.safetensors: has 9000 bytes, its header needs \d+, which cuts \d+ tensors, the first",
    ),
    "cut header": (lambda f: truncate(shard_of(f, HEAD), 40), ValueError, r"model-000\d\d.*a header of \d+ bytes"),
    "empty": (lambda f: truncate(shard_of(f, HEAD), 0), ValueError, "damaged or not a safetensors file"),
    "longer": (
        lambda f: shard_of(f, HEAD).write_bytes(shard_of(f, HEAD).read_bytes() + b"xx"), ValueError, "its header needs",
    ),
    "garbage": (
        lambda f: shard_of(f, HEAD).write_bytes(b"\x09" + bytes(7) + b"\xff{garbage" + bytes(90)), ValueError,
        "damaged or not a safetensors file.*UnicodeDecodeError",
    ),
    "repeated": (repeat_in_header, ValueError, "a is given twice"),
    "index lies": (point_elsewhere, ValueError, rf"{NORM} should be in model-000\d\d.*, but is in model"),
    "index lacks": (lambda f: edit_index(f, lambda m: m.pop(NORM)), ValueError, rf"{NORM} in model-.*not in the index"),
    "index extra": (
        lambda f: edit_index(f, lambda m: m.update(ghost=m[NORM])), ValueError, "ghost should be in .*, which lacks",
    ),
    "index outside": (lambda f: edit_index(f, lambda m: m.update(ghost="../x")), ValueError, "names files outside"),
    "index garbage": (lambda f: (f / INDEX_NAME).write_text("{"), ValueError, "not an index of tensors"),
    "index null": (lambda f: (f / INDEX_NAME).write_text("{}"), ValueError, "not an index.*KeyError.*weight_map"),
    "in two shards": (duplicate, ValueError, rf"stored twice.*{NORM} is in model.* and in model"),
    "two checkpoints": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors"), ValueError, "remove one of them",
    ),
    "config garbage": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: not JSON"),
    "no files": (lambda f: [path.unlink() for path in f.glob("model*")], FileNotFoundError, "holds neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_files(case: str, shards: dict[str, bytes], tmp_path) -> None:
    unpack(shards, tmp_path)
    load_pretrained(tmp_path)
    damage, error, message = BROKEN_SHARDS[case]
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_pretrained(tmp_path)


MISFITS = {
    "missing": (lambda t: t.pop(NORM), rf"1 tensors do not fit the model: missing {NORM}"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(1)), "1 tensors do not fit the model: unexpected extra"),
    "misshapen": (lambda t: t.update({NORM: torch.zeros(3)}), rf"{NORM} has shape \[3\], the config needs \[64\]"),
    "integers": (lambda t: t.update({NORM: t[NORM].long()}), rf"{NORM} has dtype I64, a weight is one of F64, F32"),
    "no scale": (lambda t: t.pop(OUT + "_scale_inv"), rf"{OUT} is an FP8 tensor, but there is no {OUT}_scale_inv"),
    "lone scale": (lambda t: t.pop(OUT), rf"{OUT}_scale_inv scales no FP8 tensor"),
    "scale of a plain weight": (lambda t: t.update({OUT: t[OUT].float()}), rf"{OUT}_scale_inv scales no FP8"),
    "misshapen scale": (
        lambda t: t.update({OUT + "_scale_inv": torch.ones(2, 2)}),
        rf"{OUT}_scale_inv is F32 \[2, 2\], an FP8 weight of \[64, 96\] needs F32 \[1, 1\]",
    ),
    "three": (
        lambda t: [t.pop(NORM), t.pop(HEAD), t.pop(BIAS)],
        rf"3 tensors.*missing {BIAS}; missing {NORM}; missing {HEAD}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit(case: str, single: dict[str, bytes], tmp_path) -> None:
    unpack(single, tmp_path)
    load_pretrained(tmp_path)
    damage, message = MISFITS[case]
    edit_tensors(tmp_path / "model.safetensors", damage)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_misfits_are_found_before_memory_is_taken(single: dict[str, bytes], tmp_path, monkeypatch) -> None:
    unpack(single, tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop(NORM))
    monkeypatch.setattr("models.checkpoint.allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(tmp_path)


def test_readers_of_files_see_values_and_scales(single: dict[str, bytes], tmp_path) -> None:
    unpack(single, tmp_path)
    raw = load_file(tmp_path / "model.safetensors")
    assert tensor_shapes(tmp_path) == {name: list(tensor.shape) for name, tensor in raw.items()}
    read = dict(read_tensors(tmp_path))
    assert set(read) == {name for name in raw if not name.endswith("_scale_inv")}
    assert torch.equal(read[OUT], dequantize_block(raw[OUT], raw[OUT + "_scale_inv"]))
