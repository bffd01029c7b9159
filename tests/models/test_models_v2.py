"""DeepSeek-V2 against transformers' DeepseekV2, fp32 on CPU: logits within 5e-5, gradients within 1e-5 relative."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM as Reference

from models import SequenceLayout, save_pretrained
from models.checkpoint import hf_tensors, load_pretrained
from tests.models.test_models_checkpoint import assert_same_tensors
from tests.models.test_models_parity import BASE, YARN, relative_error, sharp_model

GREEDY = replace(
    BASE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2,
    first_k_dense_replace=1, num_experts_per_tok=3,
)  # fmt: skip
GROUPS = replace(
    GREEDY, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, q_lora_rank=24,
    rope_parameters=replace(YARN, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
CORNERS = {
    "greedy": GREEDY,
    "greedy_ignores_groups": replace(GREEDY, n_group=4, topk_group=2),
    "group_limited": GROUPS,
    "group_of_one": replace(GROUPS, n_group=8, topk_group=4),
    "one_group": replace(GROUPS, topk_group=1, num_experts_per_tok=2),
}


def reference_of(model: Any, folder: Any) -> Any:
    save_pretrained(model, folder)
    load: Any = Reference
    reference, report = load.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return reference


@pytest.mark.parametrize("corner", CORNERS)
def test_logits_and_gradients_equal_transformers(corner: str, tmp_path) -> None:
    model = sharp_model(CORNERS[corner])
    reference = reference_of(model, tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(0, 97, (n,), generator=generator) for n in (50, 33)]
    weights = torch.randn(83, 97, generator=generator)

    logits_TV = model.lm_head(model(torch.cat(sequences), SequenceLayout.from_lengths([50, 33])).hidden_TD)
    (logits_TV * weights).sum().backward()
    theirs_TV = torch.cat([reference(ids[None], use_cache=False).logits[0] for ids in sequences])
    (theirs_TV * weights).sum().backward()

    assert theirs_TV.abs().max() > 5, "logits too flat to show an error"
    assert (logits_TV - theirs_TV).abs().max() < 5e-5
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        theirs = expected.pop(name)
        assert parameter.grad is not None and theirs is not None
        assert relative_error(parameter.grad, theirs) < 1e-5, name
    assert not expected


def test_routing_methods_differ() -> None:
    """The corners above would not tell the methods apart if groups never cut anything off."""
    model, other = sharp_model(GROUPS), sharp_model(replace(GROUPS, topk_method="greedy"))
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert (model.logits(tokens) - other.logits(tokens)).abs().max() > 0.1


def test_round_trip_through_transformers_is_bitwise(tmp_path) -> None:
    model = sharp_model(GROUPS)
    assert not any("correction_bias" in name for name, _ in hf_tensors(model))
    reference_of(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_tensors(load_pretrained(tmp_path / "theirs"), model)
