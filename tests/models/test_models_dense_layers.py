"""Pins what may be done to the layers of a dense model, fp32 on CPU: compiled layers give transformers' outputs and
gradients within 1e-5 at every length, without being compiled anew for each; recomputed activations give them, too, and
are not kept.
"""

import copy
import functools

import pytest
import torch
import torch._dynamo
from torch import Tensor

from models import SequenceLayout, TransformersCausalLM
from models.auto import checkpoint_layers
from models.lora import LoRAConfig, add_lora
from tests.models.test_models_auto import CONFIGS, reference_model

COMPILE = torch.nn.Module.compile


def dense_model(kind: str = "qwen3") -> TransformersCausalLM:
    return TransformersCausalLM(reference_model(CONFIGS[kind]()))


def outputs_and_gradients(model: TransformersCausalLM, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    ids_T = torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(len(lengths)))
    model.zero_grad()
    hidden_TD = model(ids_T, SequenceLayout.from_lengths(lengths)).hidden_TD
    hidden_TD.square().sum().backward()
    return hidden_TD.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_compiled_layers_are_exact_at_every_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs, run as they were captured: users compile on CUDA only, and what is generated for a CPU says little
    about that (for AVX2 it even gives NaN, torch 2.13)."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(COMPILE, backend="aot_eager"))
    torch._dynamo.reset()
    plain, compiled = dense_model(kind), dense_model(kind)
    compiled.fuse_layers()
    torch._dynamo.utils.counters.clear()
    for number, lengths in enumerate(([20, 13, 1, 30], [5, 9], [50], [17, 17, 18], [2, 2, 2, 2, 2], [1, 40])):
        assert_same(outputs_and_gradients(plain, lengths), outputs_and_gradients(compiled, lengths))
        if number == 1:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= before <= after <= before + 2, "three layers share their graphs; a length may need one more, not each"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(compiled)  # the reference of a KL penalty is made so
    assert_same(outputs_and_gradients(plain, [5, 9]), outputs_and_gradients(copied, [5, 9]))


@pytest.mark.parametrize("adapters", [False, True])
def test_recomputed_activations(adapters: bool) -> None:
    plain, model = dense_model(), dense_model()
    checkpoint_layers(model)
    if adapters:
        for each in (plain, model):
            add_lora(each, LoRAConfig(rank=4), seed=0)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.model.layers[1].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr, index]
    assert_same(outputs_and_gradients(plain, [20, 13]), outputs_and_gradients(model, [20, 13]))
    assert calls == 2, "once forward, once more in the backward pass"
