"""Pins LoRA, for our model with stacked experts and a dense one of transformers, fp32 on CPU.

1. Fresh adapters change no output, and they alone are trained; no experts of prediction modules, head or router.
2. Outputs and gradients are those of W + B A alpha / rank written out, by peft's own wrapper where there are experts.
3. Merged tensors give the same outputs, in a folder that loads without peft; `adapter/` in it loads by peft.
4. With the adapters off, the frozen model is there bit for bit.
5. 4-bit frozen weights: the merged tensors are what the model computes with.
6. Wrong settings are refused with the remedy.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import models
from models import SequenceLayout, TransformersCausalLM, hf_tensors
from models.auto import load_hf_tensors
from models.lora import LoRAConfig, adapters_off, add_lora
from tests.models.test_models_auto import CONFIGS, reference_model
from tests.models.test_models_parity import BASE, sharp_model

CONFIG = LoRAConfig(rank=4, alpha=8)
WITH_MTP = replace(BASE, num_nextn_predict_layers=1, q_lora_rank=24)
KINDS = ["experts", "experts_mtp", "llama", "qwen3", "qwen2_tied"]
IDS_T, LAYOUT = torch.arange(20) * 7 % 97, SequenceLayout.from_lengths([12, 8])


def frozen_model(kind: str) -> Any:
    if kind.startswith("experts"):
        return sharp_model(WITH_MTP if kind == "experts_mtp" else BASE)
    return TransformersCausalLM(reference_model(CONFIGS[kind]()))


def adapted(kind: str, config: LoRAConfig = CONFIG) -> Any:
    """With adapters far from zero."""
    model = frozen_model(kind)
    add_lora(model, config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model: Any) -> Tensor:
    return model.lm_head(model(IDS_T, LAYOUT).hidden_TD)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(kind: str) -> None:
    plain, model = frozen_model(kind), frozen_model(kind)
    add_lora(model, CONFIG, seed=0)
    assert torch.equal(logits(plain), logits(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any(part in name for name in trained for part in ("lm_head", "mlp.gate.", "layers.3."))
    logits(model).square().sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == trained
    again = frozen_model(kind)
    add_lora(again, CONFIG, seed=0)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values())), "the seed fixes A"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_product_written_out(kind: str) -> None:
    """The gradient of a merged weight G gives those of the factors: dA = s B^T G, dB = s G A^T."""
    model = adapted(kind)
    merged = frozen_model(kind)
    load_hf_tensors(merged, hf_tensors(model), "merged")
    weights_TV = torch.randn(len(IDS_T), 97, generator=torch.Generator().manual_seed(2))
    for each in (model, merged):
        (logits(each) * weights_TV).sum().backward()
    torch.testing.assert_close(logits(model), logits(merged), atol=2e-5, rtol=1e-5)
    scale, compared = CONFIG.alpha / CONFIG.rank, 0
    modules: Any = dict(model.named_modules())
    for name, parameter in merged.named_parameters():
        owner = modules.get(name.removesuffix(".weight"))
        if hasattr(owner, "lora_A"):
            a, b = owner.lora_A["default"].weight, owner.lora_B["default"].weight
            torch.testing.assert_close(a.grad, scale * b.T @ parameter.grad, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(b.grad, scale * parameter.grad @ a.T, atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared >= 12


def test_experts_have_the_gradients_of_pefts_own_wrapper() -> None:
    ours, pefts = adapted("experts"), adapted("experts")
    for module in pefts.modules():
        if isinstance(module, ParamWrapper):
            module.__class__ = ParamWrapper
    weights_TV = torch.randn(len(IDS_T), 97, generator=torch.Generator().manual_seed(2))
    for model in (ours, pefts):
        (logits(model) * weights_TV).sum().backward()
    theirs = dict(pefts.named_parameters())
    expert_grads = {n: p.grad for n, p in ours.named_parameters() if "experts" in n and p.grad is not None}
    assert len(expert_grads) == 3 * 4, "A and B of two parameters in each of three layers"
    for name, grad in expert_grads.items():
        assert grad.norm() > 1e-3
        torch.testing.assert_close(grad, theirs[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["experts", "llama", "qwen2_tied"])
def test_folders_load_without_peft_and_adapters_by_peft(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    models.save_pretrained(frozen_model(kind), tmp_path / "base")
    models.save_pretrained(model, tmp_path / "tuned")
    wanted = logits(model)
    torch.testing.assert_close(logits(models.from_pretrained(tmp_path / "tuned")), wanted, atol=2e-5, rtol=1e-5)
    load: Any = AutoModelForCausalLM.from_pretrained
    reference = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "tuned" / "adapter")).eval()
    theirs = reference(input_ids=IDS_T[None, :12]).logits[0]
    torch.testing.assert_close(theirs, wanted[:12], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["experts", "qwen3"])
def test_adapters_off(kind: str) -> None:
    model, plain = adapted(kind), frozen_model(kind)
    with_adapters = logits(model)
    with torch.no_grad(), adapters_off(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), with_adapters) and not torch.equal(with_adapters, logits(plain))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quantized'")
def test_four_bit_weights_are_merged_as_they_are_computed_with(tmp_path: Path) -> None:
    # 4-bit blocks have 64 weights; 97 tokens and 48 hidden do not matter, the head stays whole
    models.save_pretrained(frozen_model("llama"), tmp_path / "base")
    model = models.from_pretrained(tmp_path / "base", quantize=True)
    add_lora(model, CONFIG, seed=0)
    packed = [p for n, p in model.named_parameters() if "base_layer" in n]
    assert len(packed) == 21 and all(p.dtype == torch.uint8 for p in packed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    models.save_pretrained(model, tmp_path / "tuned")
    merged = models.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=1e-5)
    assert (logits(merged) - logits(frozen_model("llama"))).abs().max() > 0.1, "4 bits, and adapters, show"
    logits(model).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_" in n)


def test_experts_are_not_quantized(tmp_path: Path) -> None:
    models.save_pretrained(frozen_model("experts"), tmp_path / "base")
    with pytest.raises(ValueError, match="4-bit weights are for dense models only"):
        models.from_pretrained(tmp_path / "base", quantize=True)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.rank >= 0 and lora.alpha > 0, got -1"):
        LoRAConfig(rank=-1)
    with pytest.raises(ValueError, match=r"need adapters: set lora.rank"):
        LoRAConfig(quantize_base=True)
    with pytest.raises(ValueError, match=r"the model has no c_attn; it has down_proj, experts, gate_proj"):
        add_lora(frozen_model("experts"), LoRAConfig(rank=2, targets=("c_attn",)), seed=0)
    with pytest.raises(ValueError, match="the model has adapters, and their frozen weights stay"):
        load_hf_tensors(adapted("experts"), [], "somewhere")


def test_targets_choose(tmp_path: Path) -> None:
    model: nn.Module = adapted("experts", LoRAConfig(rank=2, targets=("o_proj", "gate_proj")))
    owners = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert owners == {"o_proj", "gate_proj"}
