"""Our model against transformers' DeepseekV3 and V2, fp32 on CPU: logits within 5e-5, gradients within 1e-5 relative.

Weights are random but sharp (logits of about 10): the default initialisation gives near-uniform logits that hide
errors.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LatentCache,
    RopeParameters,
    SequenceLayout,
    hf_tensors,
    load_pretrained,
    save_pretrained,
)
from models.moe import MixtureOfExperts
from models.transformer import DecoderLayer

BASE = DeepseekV3Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    max_position_embeddings=128,
)
YARN = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
V2 = replace(
    BASE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2,
    first_k_dense_replace=1,
)  # fmt: skip
CORNERS = {
    "plain": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "tied_q_lora": replace(BASE, tie_word_embeddings=True, q_lora_rank=24, first_k_dense_replace=1),
    "q_lora": replace(BASE, q_lora_rank=24),
    "groups": replace(BASE, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "one_group": replace(BASE, n_group=4, topk_group=1),
    "all_groups": replace(BASE, n_group=4, topk_group=4, num_experts_per_tok=3),
    "no_shared": replace(BASE, n_shared_experts=0),
    "dense_first": replace(BASE, first_k_dense_replace=1, n_shared_experts=2),
    "all_dense": replace(BASE, first_k_dense_replace=3),
    "unnormalised": replace(BASE, norm_topk_prob=False),
    "scaled": replace(BASE, norm_topk_prob=False, routed_scaling_factor=2.446, num_experts_per_tok=4),
    "yarn": replace(BASE, rope_parameters=YARN, q_lora_rank=24),
    "yarn_uneven": replace(BASE, rope_parameters=replace(YARN, mscale_all_dim=0.0)),
    "yarn_far": replace(BASE, rope_parameters=replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.707)),
    "v2_lite": V2,
    "v2_groups": replace(
        V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, q_lora_rank=24
    ),
    "v3_like": replace(
        BASE, q_lora_rank=24, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
        routed_scaling_factor=2.5, first_k_dense_replace=1, rope_parameters=YARN,
    ),
}  # fmt: skip


def sharp_model(config: DeepseekV3Config, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Random weights with which routing, attention and logits all depend visibly on the input."""
    model = DeepseekV3ForCausalLM(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in hf_tensors(model):
            if "norm" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            if "e_score_correction_bias" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        if config.tie_word_embeddings:  # one matrix for both ends
            model.model.embed_tokens.weight.mul_(20)
        else:
            model.model.embed_tokens.weight.mul_(50)
            model.lm_head.weight.mul_(3)
    return model


def reference_of(model: DeepseekV3ForCausalLM, folder: Path) -> Any:
    save_pretrained(model, folder)
    load: Any = AutoModelForCausalLM
    reference, report = load.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # Without shared experts, transformers still has their matrices, of width 0.
    missing = [name for name in report["missing_keys"] if reference.get_parameter(name).numel()]
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return reference


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("corner", CORNERS)
def test_logits_and_gradients_equal_transformers(corner: str, tmp_path) -> None:
    model = sharp_model(CORNERS[corner])
    reference = reference_of(model, tmp_path / "checkpoint")
    lengths = [50, 33, 41]
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    weights = [torch.randn(n, 97, generator=generator) for n in lengths]

    logits_TV = model.lm_head(model(torch.cat(sequences), SequenceLayout.from_lengths(lengths)).hidden_TD)
    (logits_TV * torch.cat(weights)).sum().backward()
    theirs = [reference(ids[None], use_cache=False).logits[0] for ids in sequences]
    torch.stack([(x * w).sum() for x, w in zip(theirs, weights, strict=True)]).sum().backward()

    assert torch.cat(theirs).abs().max() > 5, "logits too flat to show an error"
    assert (logits_TV - torch.cat(theirs)).abs().max() < 5e-5
    expected = {name: p.grad for name, p in reference.named_parameters() if p.numel()}
    compared = 0
    for name, parameter in model.named_parameters():
        theirs_grad = expected[name]
        assert parameter.grad is not None and theirs_grad is not None
        assert relative_error(parameter.grad, theirs_grad) < 1e-5, name
        compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("corner", ["q_lora", "v3_like", "yarn_uneven"])
def test_absorbed_decoding_equals_whole_sequences(corner: str) -> None:
    model = sharp_model(CORNERS[corner])
    prompts, continuation = [7, 3, 5], 6
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 97, (n + continuation,), generator=generator) for n in prompts]
    with torch.no_grad():
        whole = model(torch.cat(ids), SequenceLayout.from_lengths([len(x) for x in ids])).hidden_TD
        whole = whole.split([len(x) for x in ids])
        cache = LatentCache(
            model.config, len(prompts), max(prompts) + continuation, dtype=torch.float32, device=torch.device("cpu")
        )
        layout = SequenceLayout.from_lengths(prompts)
        prefill = model(torch.cat([x[:n] for x, n in zip(ids, prompts, strict=True)]), layout, cache)
        assert (prefill.hidden_TD - torch.cat([w[:n] for w, n in zip(whole, prompts, strict=True)])).abs().max() < 2e-5
        for step in range(continuation):
            hidden_BD = model.decode(
                torch.stack([x[n + step] for x, n in zip(ids, prompts, strict=True)]), cache
            ).hidden_TD
            expected = torch.stack([w[n + step] for w, n in zip(whole, prompts, strict=True)])
            assert (hidden_BD - expected).abs().max() < 2e-5, f"decoding step {step}"


def test_experts_equal_their_plain_twin() -> None:
    layer = sharp_model(CORNERS["groups"]).model.layers[1]
    assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MixtureOfExperts)
    experts = layer.mlp.experts
    torch.manual_seed(0)
    x_TD = torch.randn(40, 64, requires_grad=True)
    ids_TK = torch.randint(0, 5, (40, 1)) + torch.tensor([[0, 3]])  # some experts stay empty
    weights_TK = torch.rand(40, 2, requires_grad=True)
    inputs = (x_TD, weights_TK, *experts.parameters())
    fast, plain = experts(x_TD, ids_TK, weights_TK), experts.loop(x_TD, ids_TK, weights_TK)
    assert (fast - plain).abs().max() < 1e-6
    for ours, theirs in zip(
        torch.autograd.grad(fast.square().sum(), inputs), torch.autograd.grad(plain.square().sum(), inputs), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-6


def test_round_trip_through_transformers_is_bitwise(tmp_path) -> None:
    model = sharp_model(CORNERS["v3_like"])
    reference_of(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    for (name, ours), (other_name, theirs) in zip(hf_tensors(model), hf_tensors(back), strict=True):
        assert name == other_name and torch.equal(ours, theirs), name
