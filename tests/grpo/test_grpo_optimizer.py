"""Pins the optimizers. Each is run where it can be: 8-bit states need bitsandbytes, which works on CPUs, too.

1. A run whose weights and state went through a file continues bit for bit, with every optimizer.
2. Offloaded AdamW computes bit for bit what AdamW does, clipped gradients and all.
3. Matrices decay, vectors do not; frozen parameters are left alone.
4. What an optimizer cannot do is refused with the remedy.
"""

import importlib.util
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.optimizer import OptimizerName, build_optimizer
from models import hf_tensors, load_hf_tensors
from tests.grpo.test_grpo_gradients import make_samples
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.models.test_models_parity import BASE, sharp_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quantized'"
)
EIGHT_BITS = pytest.param("adamw_8bit", marks=needs_bitsandbytes)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)
BETAS = (0.9, 0.95)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["adamw", "adamw_offload", EIGHT_BITS])
def test_state_continues_bit_for_bit(name: OptimizerName) -> None:
    config = LearnerConfig(optimizer=name, lr=1e-3, weight_decay=0.1)
    learner = Learner(sharp_model(BASE), config, total_steps=9)
    samples = make_samples(learner.model)
    for _ in range(3):
        learner.update(samples)
    resumed = Learner(sharp_model(BASE), config, total_steps=9)
    load_hf_tensors(resumed.model, hf_tensors(learner.model), "the first")
    resumed.load_state_dict(through_a_file(learner.state_dict()))
    for _ in range(2):
        assert learner.update(samples) == resumed.update(samples)
    assert same_bits(snapshot(learner.model), snapshot(resumed.model))

    forgetful = Learner(sharp_model(BASE), config, total_steps=9)
    load_hf_tensors(forgetful.model, hf_tensors(learner.model), "the first")
    learner.update(samples)
    forgetful.update(samples)
    assert not same_bits(snapshot(learner.model), snapshot(forgetful.model))


def clipped_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        rows = torch.randn(8, 6, generator=generator).to(next(model.parameters()).device)
        model(rows).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.RMSNorm(7), nn.Linear(7, 5))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_offloaded_is_adamw(device: str) -> None:
    plain, offloaded = small_model().to(device), small_model().to(device)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=BETAS, weight_decay=0.0, fused=True)
    ours = build_optimizer("adamw_offload", offloaded.parameters(), lr=0.1, betas=BETAS, decay=0.0)
    if device == "cpu":
        assert all(map(torch.equal, clipped_steps(reference, plain), clipped_steps(ours, offloaded)))
    else:  # another processor rounds in another way
        for one, other in zip(clipped_steps(reference, plain), clipped_steps(ours, offloaded), strict=True):
            torch.testing.assert_close(one, other)
    assert all(parameter.device.type == device for parameter in offloaded.parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw_offload", EIGHT_BITS])
def test_only_matrices_decay(name: OptimizerName) -> None:
    model = small_model()
    frozen = model.get_parameter("2.weight").requires_grad_(False)
    before = {n: parameter.detach().clone() for n, parameter in model.named_parameters()}
    optimizer = build_optimizer(name, model.parameters(), lr=0.1, betas=BETAS, decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    wanted = {n: tensor * (0.95 if tensor.dim() > 1 else 1) for n, tensor in before.items()}
    wanted["2.weight"] = before["2.weight"]
    torch.testing.assert_close(dict(model.named_parameters()), wanted)
    assert sum(parameter is frozen for group in optimizer.param_groups for parameter in group["params"]) == 0


@needs_bitsandbytes
def test_8bit_states_take_a_quarter() -> None:
    model = nn.Linear(256, 256, bias=False)

    def state_bytes(name: OptimizerName) -> int:
        optimizer = build_optimizer(name, model.parameters(), lr=0.1, betas=BETAS, decay=0.0)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        [state] = optimizer.state.values()
        return sum(x.nbytes for key, x in state.items() if isinstance(x, Tensor) and "qmap" not in key)

    assert state_bytes("adamw_8bit") < 0.27 * state_bytes("adamw")


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"pip install 'grpo-toolkit\[quantized\]'"):
        build_optimizer("adamw_8bit", small_model().parameters(), lr=0.1, betas=BETAS, decay=0.0)


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.optimizer.DTensor", nn.Parameter)  # a real one needs a process group
    with pytest.raises(ValueError, match="'adamw_offload' does not take sharded parameters; use 'adamw'"):
        build_optimizer("adamw_offload", small_model().parameters(), lr=0.1, betas=BETAS, decay=0.0)
