"""Pins the model on a GPU against the same model on a CPU: the fused steps, cuDNN's attention, grouped products.

1. float32: logits and every gradient agree, in packed sequences of different lengths and through both heads.
2. bfloat16: the loss agrees with float32's to rounding, and no gradient is far off.
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.logprobs import token_logprobs
from models import DeepseekV3ForCausalLM, SequenceLayout, find_config, load_pretrained, save_pretrained
from models.head import linear_cross_entropy
from tests.models.test_models_parity import relative_error, sharp_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, this machine has none"),
]

LENGTHS = [300, 17, 150, 129, 64, 1]
CONFIG = replace(find_config("tiny-mla512").with_vocabulary(640, bos=None, eos=1, pad=0), num_hidden_layers=3)


def gradients(model: DeepseekV3ForCausalLM, head: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of next-token prediction over the packed sequences, on the CPU in float32."""
    device = model.lm_head.weight.device
    layout = SequenceLayout.from_lengths(LENGTHS, device=device)
    ids_T = torch.randint(2, 640, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).to(device)
    targets_T = ids_T.roll(-1)
    weights_T = torch.full((len(ids_T),), 1 / len(ids_T), device=device)
    hidden_TD = model(ids_T, layout).hidden_TD
    if head == "loss":
        loss = linear_cross_entropy(hidden_TD, model.lm_head.weight, targets_T, weights_T, chunk_size=256)
    else:
        logprobs_T, _ = token_logprobs(
            hidden_TD, model.lm_head.weight, targets_T, torch.ones_like(weights_T), chunk_size=256
        )
        loss = -(logprobs_T * weights_T).sum()
    loss.backward()
    return loss.item(), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["loss", "logprobs"])
def test_float32_equals_the_cpu(head: str) -> None:
    model = sharp_model(CONFIG)
    loss, expected = gradients(copy.deepcopy(model), head)
    on_gpu, found = gradients(copy.deepcopy(model).cuda(), head)
    assert on_gpu == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    worst = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(worst.values()) < 1e-4, sorted(worst.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("head", ["loss", "logprobs"])
def test_bfloat16_is_near(head: str, tmp_path: Path) -> None:
    model = sharp_model(CONFIG)
    save_pretrained(model, tmp_path / "model")
    loss, expected = gradients(model, head)
    low, found = gradients(load_pretrained(tmp_path / "model", dtype=torch.bfloat16, device="cuda"), head)
    assert low == pytest.approx(loss, rel=0.02)
    # Routing flips at near ties, so an expert's own gradient may differ; embedding and head see all tokens.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert relative_error(found[name], expected[name]) < 0.2
