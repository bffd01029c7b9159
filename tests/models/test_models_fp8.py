"""FP8 blocks: against arithmetic done by hand, against transformers' own FP8 code, and through whole checkpoints."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM as Reference
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from models.checkpoint import hf_tensors, load_pretrained, save_pretrained
from models.config import ScaleFormat
from models.fp8 import FP8_DTYPE, FP8_MAX, dequantize_block, is_quantized, quantize_block, quantize_tensors
from tests.models.test_models_checkpoint import FP8_SIZED, assert_same_tensors
from tests.models.test_models_parity import sharp_model

FORMATS: list[ScaleFormat] = ["float32", "ue8m0"]


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of very different magnitude, so that a scale taken from the wrong block shows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    by_block = torch.randn(-(-rows // 128), -(-columns // 128), generator=generator).mul(4).exp()
    return weight * by_block.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def theirs(scale_format: str) -> Any:
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_format))


def all_fp8_values() -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    return values[values.isfinite()]


def test_scales_by_hand() -> None:
    weight = torch.zeros(130, 257)  # blocks of 128 + 2 rows, 128 + 128 + 1 columns
    weight[0, 0], weight[127, 127] = 3.0, -7.0
    weight[5, 128] = 448.0
    weight[129, 256] = 1.0
    values, scales = quantize_block(weight)
    assert scales.tolist() == [[7 / 448, 1.0, 1.0], [1.0, 1.0, torch.tensor(1 / 448).item()]]
    assert values[0, 0].float() == 192.0 and values[127, 127].float() == -448.0  # 3 / 7 * 448 is representable
    assert values[129, 256].float() == 448.0
    _, powers = quantize_block(weight, "ue8m0")
    assert powers.tolist() == [[1 / 64, 1.0, 1.0], [1.0, 1.0, 1 / 256]]  # 7/448 is 2^-6; 1/448 is above 2^-9


@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_weight_goes_to_the_nearest_value(scale_format: ScaleFormat) -> None:
    weight = random_weight(150, 200)
    values, scales = quantize_block(weight, scale_format)
    by_weight = scales.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200].double()
    exact = weight.double() / by_weight
    nearest = (exact[..., None] - all_fp8_values().double()).abs().amin(-1)
    assert exact.abs().max() <= FP8_MAX * (1 + 1e-6)
    assert ((values.double() - exact).abs() <= nearest * (1 + 1e-5) + 1e-12).all()
    assert torch.equal(dequantize_block(values, scales).double().float(), (values.double() * by_weight).float())


@pytest.mark.parametrize("scale_format", FORMATS)
def test_fp8_values_times_powers_of_two_survive_bfloat16(scale_format: ScaleFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    known = all_fp8_values()
    values = known[torch.randint(len(known), (300, 400), generator=generator)]
    values[::128, ::128] = 448.0  # the largest value of a block fixes its scale
    values = values.to(FP8_DTYPE)
    scales = torch.randint(-12, 5, (3, 4), generator=generator).float().exp2()
    weight = dequantize_block(values, scales, torch.bfloat16)
    again, scales_again = quantize_block(weight, scale_format)
    assert torch.equal(scales, scales_again)
    assert torch.equal(values.view(torch.uint8), again.view(torch.uint8)), "negative zero included"


@pytest.mark.parametrize("scale_format", FORMATS)
def test_equal_to_transformers(scale_format: ScaleFormat) -> None:
    weight = random_weight(256, 384)
    values, scales = quantize_block(weight, scale_format)
    op: Any = Fp8Quantize(theirs("float" if scale_format == "float32" else scale_format))
    their = op.convert({"x.weight": weight})
    their_scales = their["x.weight_scale_inv"].float()
    if scale_format == "ue8m0":
        assert torch.equal(scales, their_scales)
        assert torch.equal(values.view(torch.uint8), their["x.weight"].view(torch.uint8))
    else:  # they round 448 / amax first and take the reciprocal: one unit in the last place, a few ties
        assert ((scales - their_scales).abs() <= 1.2e-7 * scales).all()
        assert (values.view(torch.uint8) != their["x.weight"].view(torch.uint8)).float().mean() < 1e-3
    back = Fp8Dequantize(theirs("float"))._dequantize_one(values, scales, torch.float32)
    assert torch.equal(dequantize_block(values, scales), back)


def test_scales_stored_as_exponents() -> None:
    values, scales = quantize_block(random_weight(130, 130), "ue8m0")
    assert torch.equal(dequantize_block(values, scales.to(torch.float8_e8m0fnu)), dequantize_block(values, scales))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_has_no_scale_is_refused_by_name(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj.weight holds inf or nan"):
        list(quantize_tensors([("model.layers.0.self_attn.o_proj.weight", weight)], "float32"))


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 3e38])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_extreme_magnitudes_stay_finite(magnitude: float, scale_format: ScaleFormat) -> None:
    weight = torch.full((3, 3), magnitude)
    back = dequantize_block(*quantize_block(weight, scale_format))
    assert (back - weight).abs().max() <= max(0.04 * magnitude, 2.0**-126 * 2**-9)


def test_names_that_are_quantised() -> None:
    kept = "embed_tokens.weight norm.weight lm_head.weight mlp.gate.weight mlp.gate.e_score_correction_bias "
    kept += "self_attn.kv_a_layernorm.weight eh_proj.weight shared_head.head.weight q_proj.bias"
    quantised = "self_attn.kv_b_proj.weight self_attn.kv_a_proj_with_mqa.weight self_attn.q_a_proj.weight "
    quantised += "mlp.experts.3.gate_proj.weight mlp.shared_experts.down_proj.weight mlp.up_proj.weight o_proj.weight"
    assert not any(is_quantized(f"model.layers.1.{name}") for name in kept.split())
    assert all(is_quantized(f"model.layers.1.{name}") for name in quantised.split())


@pytest.mark.parametrize("scale_format", FORMATS)
def test_transformers_reads_our_fp8_checkpoint(scale_format: ScaleFormat, tmp_path) -> None:
    """transformers dequantises on the CPU: an independent reader of values, scales, names and config."""
    save_pretrained(sharp_model(FP8_SIZED), tmp_path / "fp8", fp8=scale_format)
    ours = load_pretrained(tmp_path / "fp8")
    load: Any = Reference
    reference, report = load.from_pretrained(tmp_path / "fp8", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    their_state = reference.state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, their_state[name].float()), name
    tokens = torch.randint(0, FP8_SIZED.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.logits(tokens)
        assert (logits - reference.float()(tokens, use_cache=False).logits).abs().max() < 5e-5
        original = sharp_model(FP8_SIZED).logits(tokens)
    assert (logits - original).abs().max() > 1e-3, "nothing was quantised"


@pytest.mark.parametrize("scale_format", FORMATS)
def test_checkpoint_of_representable_weights_is_bit_exact(scale_format: ScaleFormat, tmp_path) -> None:
    model = sharp_model(FP8_SIZED)
    with torch.no_grad():
        for name, tensor in hf_tensors(model):
            if is_quantized(name):
                tensor[::128, ::128] = 448 / 1024
                tensor.copy_(tensor.mul(1024).to(FP8_DTYPE).float().div(1024))  # block scale 2^-10 after saturation
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    save_pretrained(model, tmp_path / "fp8", fp8=scale_format, max_shard_bytes=100_000)
    assert_same_tensors(load_pretrained(tmp_path / "fp8", dtype=torch.bfloat16), model)
