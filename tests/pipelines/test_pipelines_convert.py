"""`grpo convert`. Pinned here:

1. FP8 -> BF16 -> FP8 gives the same bytes where the weights are representable, and what it writes is what a model
   saved that way would be;
2. config.json and the files beside the weights come along; prediction modules stay or go as asked;
3. nothing is overwritten that should not be, and a failure leaves what was there.
"""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import DeepseekV3ForCausalLM
from models.checkpoint import hf_tensors, load_pretrained, save_pretrained
from models.config import ScaleFormat
from models.fp8 import FP8_DTYPE, is_quantized
from pipelines.cli import main
from pipelines.convert import ConvertConfig, run_convert
from tests.models.test_models_checkpoint import assert_same_tensors
from tests.models.test_models_parity import BASE, sharp_model

LARGE = replace(BASE, hidden_size=200, intermediate_size=300, num_hidden_layers=2, kv_lora_rank=144)
"""Several blocks along each side, the last ones ragged."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def representable_model() -> DeepseekV3ForCausalLM:
    """Matrices are FP8 values times a power of two, 448 among them in each block; the rest fits bfloat16."""
    model = sharp_model(LARGE)
    with torch.no_grad():
        for name, tensor in hf_tensors(model):
            if is_quantized(name):
                tensor[::128, ::128] = 448 / 1024
                tensor.copy_(tensor.mul(1024).to(FP8_DTYPE).float().div(1024))
            elif not name.endswith("e_score_correction_bias"):
                tensor.copy_(tensor.bfloat16())
    return model


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("max_shard_gb", [5.0, 1e-4])
def test_fp8_to_bf16_and_back_is_bit_exact(scale_format: ScaleFormat, max_shard_gb: float, tmp_path) -> None:
    fp8, bf16, again = tmp_path / "fp8", tmp_path / "bf16", tmp_path / "again"
    model = representable_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_pretrained(model, fp8, fp8=scale_format, max_shard_bytes=100_000)
    run_convert(ConvertConfig(source=str(fp8), out=str(bf16), max_shard_gb=max_shard_gb))
    assert_same_tensors(load_pretrained(bf16, dtype=torch.bfloat16), model)
    assert (bf16 / "model.safetensors.index.json").is_file() == (max_shard_gb < 1)
    run_convert(ConvertConfig(source=str(bf16), out=str(again), to="fp8", scale_format=scale_format))
    before, after = tensors_of(fp8), tensors_of(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(bytes_of(tensor), bytes_of(after[name])), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (fp8, bf16, again)]
    assert configs[0] == configs[2] and "quantization_config" in configs[0]
    assert configs[1] == {key: value for key, value in configs[0].items() if key != "quantization_config"}


@pytest.mark.parametrize("to", ["bf16", "fp32", "fp8"])
def test_converting_equals_saving(to: Any, tmp_path) -> None:
    """Weights that no format represents: rounding happens once, and equals that of the model's own save."""
    model = sharp_model(LARGE)
    save_pretrained(model, tmp_path / "fp32", max_shard_bytes=100_000)
    run_convert(ConvertConfig(source=str(tmp_path / "fp32"), out=str(tmp_path / "out"), to=to))
    save_pretrained(model, tmp_path / "saved", fp8="float32" if to == "fp8" else None)
    saved, out = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert out.keys() == saved.keys()
    for name, tensor in out.items():
        kept = to == "fp32" or name.endswith(("_scale_inv", "e_score_correction_bias")) or tensor.dtype == FP8_DTYPE
        expected = saved[name] if kept else saved[name].bfloat16()
        assert tensor.dtype == expected.dtype and torch.equal(bytes_of(tensor), bytes_of(expected)), name


def test_fp8_passes_untouched_unless_scales_change(tmp_path) -> None:
    """Requantising would give blocks whose largest value is not 448 other bytes; `--mtp drop` alone must not."""
    model = sharp_model(replace(LARGE, num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path / "fp8", fp8="float32")
    stored = tensors_of(tmp_path / "fp8")
    for name, tensor in stored.items():
        stored[name] = tensor.float().clamp(-100, 100).to(FP8_DTYPE) if tensor.dtype == FP8_DTYPE else tensor.clone()
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    run_convert(ConvertConfig(source=str(tmp_path / "fp8"), out=str(tmp_path / "pruned"), to="fp8", mtp="drop"))
    before, after = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "pruned")
    assert set(before) - set(after) == {name for name in before if name.startswith("model.layers.2.")}
    for name, tensor in after.items():
        if tensor.dtype == FP8_DTYPE or name.endswith("_scale_inv"):
            assert torch.equal(bytes_of(tensor), bytes_of(before[name])), name
    pruned = load_pretrained(tmp_path / "pruned")
    assert pruned.config.num_nextn_predict_layers == 0

    fp8, powers = str(tmp_path / "fp8"), tmp_path / "powers"
    run_convert(ConvertConfig(source=fp8, out=str(powers), to="fp8", scale_format="ue8m0"))
    scales = torch.cat([t.flatten() for name, t in tensors_of(powers).items() if name.endswith("_scale_inv")])
    assert torch.equal(scales.log2(), scales.log2().round())
    assert json.loads((powers / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    assert load_pretrained(powers).config == model.config, "modules are kept unless dropped"


def test_prediction_modules_that_the_config_does_not_know(tmp_path) -> None:
    save_pretrained(sharp_model(replace(LARGE, num_nextn_predict_layers=1)), tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 0}))
    config = ConvertConfig(source=str(tmp_path / "src"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"holds 1 multi-token.*num_nextn_predict_layers=0.*--mtp drop"):
        run_convert(config)
    run_convert(replace(config, mtp="drop"))
    load_pretrained(tmp_path / "out")


def test_files_beside_the_weights_come_along(tmp_path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    save_pretrained(sharp_model(BASE), source)
    raw = json.loads((source / "config.json").read_text())
    raw |= {"auto_map": {"AutoConfig": "x.Y"}, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tiktoken.model", "chat_template.jinja", "pytorch_model.bin", ".hidden"):
        (source / name).write_text(name)
    run_convert(ConvertConfig(source=str(source), out=str(out)))
    kept = {"tokenizer.json", "tiktoken.model", "chat_template.jinja", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == kept
    assert (out / "tiktoken.model").read_text() == "tiktoken.model"
    del raw["torch_dtype"]
    assert json.loads((out / "config.json").read_text()) == raw | {"dtype": "bfloat16"}


@pytest.mark.parametrize("out", ["src", "src/deeper", "", "src/../src"])
def test_the_source_is_never_overwritten(out: str, tmp_path) -> None:
    save_pretrained(sharp_model(BASE), tmp_path / "src")
    before = tensors_of(tmp_path / "src")
    with pytest.raises(ValueError, match="never overwritten"):
        run_convert(ConvertConfig(source=str(tmp_path / "src"), out=str(tmp_path / out)))
    assert tensors_of(tmp_path / "src").keys() == before.keys()


def test_what_is_no_checkpoint_is_not_replaced(tmp_path) -> None:
    save_pretrained(sharp_model(BASE), tmp_path / "src")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no checkpoint"):
        run_convert(ConvertConfig(source=str(tmp_path / "src"), out=str(tmp_path / "thesis")))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_full_disk_leaves_the_earlier_result(tmp_path, monkeypatch) -> None:
    save_pretrained(sharp_model(BASE), tmp_path / "src")
    config = ConvertConfig(source=str(tmp_path / "src"), out=str(tmp_path / "out"))
    run_convert(config)
    before = tensors_of(tmp_path / "out")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        run_convert(replace(config, to="fp8"))
    after = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_command_line(tmp_path, capsys) -> None:
    source, out = str(tmp_path / "src"), str(tmp_path / "out")
    save_pretrained(sharp_model(BASE), source)
    assert main(["convert", source, "--out", out, "--to", "fp8", "--scale-format", "ue8m0", "--mtp", "drop"]) == 0
    num_in, num_out = (sum(t.nbytes for t in tensors_of(Path(folder)).values()) for folder in (source, out))
    assert f"{num_in:,} bytes in, {num_out:,} bytes out" in capsys.readouterr().out
    assert num_out < num_in / 3
    for arguments, message in {
        ("--out", out): "name both folders",
        (source, "--out", source): "never overwritten",
        (str(tmp_path / "nowhere"), "--out", out): "config.json not found",
    }.items():
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_format='ue8m0' has no effect with to='bf16'"):
        ConvertConfig(source="a", out="b", scale_format="ue8m0")
    with pytest.raises(ValueError, match="max_shard_gb must be > 0, got 0"):
        ConvertConfig(source="a", out="b", max_shard_gb=0)
