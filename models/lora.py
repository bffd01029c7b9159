"""LoRA (arXiv:2106.09685) through peft: a frozen model plus trained low-rank products, W + B A alpha / rank.

peft wraps the linear layers, and the stacked experts of our model, whose wrapper is replaced by `FactoredExperts`. To
everything that asks for tensors under their checkpoint names (engines, files) the products are merged, a tensor at a
time, so nobody else knows of them; the model with adapters is for training, its `decode` must not be used. No dropout:
the sampler has none, so the learner's probabilities would not be the sampler's.

    add_lora(model, LoRAConfig(rank=16), seed=0)
    with adapters_off(model): hidden_TD = model(ids_T, layout).hidden_TD
    write_adapter(model, folder)                                       # for peft's PeftModel.from_pretrained

Shapes: E experts, O out, I in, r rank, T tokens, D hidden.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.decoder_layer import PredictionModule
from models.moe import RoutedExperts
from models.quantized import dequantized

_ADAPTER = "default"
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which low-rank adapters are trained, if any."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model. With experts on a GPU, a multiple of 8."""
    alpha: float = 32.0
    """The product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of the modules to adapt, such as `q_proj` or `experts`. If empty: in a dense model all linear layers,
    in one with experts attention and experts. The feed-forward layers beside the experts can be named, too, but peft
    0.21 does not load them back (it takes `gate_proj` for a part of the experts); the merged checkpoint has them. The
    head, the router and prediction modules are never adapted."""
    quantize_base: bool = False
    """QLoRA (arXiv:2305.14314): the frozen linear layers of a dense model in 4 bits (NF4), by bitsandbytes."""

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise ValueError(f"need lora.rank >= 0 and lora.alpha > 0, got {self.rank} and {self.alpha}")
        if not self.rank and (self.targets or self.quantize_base):
            raise ValueError("lora.targets and lora.quantize_base need adapters: set lora.rank, 16 for example")


def add_lora(model: Any, config: LoRAConfig, seed: int) -> None:
    """Freezes the model and puts adapters into it that change nothing yet: A random from `seed`, B zero, float32.

    Raises ValueError for a target that the model does not have, and without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import ParamWrapper
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'grpo-toolkit[lora]'") from error
    adaptable = dict(_adaptable(model))
    kinds = {name.rsplit(".", 1)[-1] for name in adaptable}
    if unknown := sorted(set(config.targets) - kinds):
        raise ValueError(f"lora.targets: the model has no {', '.join(unknown)}; it has {', '.join(sorted(kinds))}")
    beside_experts = {"gate_proj", "up_proj", "down_proj"} if "experts" in kinds else set()
    targets = set(config.targets) or kinds - beside_experts
    wanted = {name: module for name, module in adaptable.items() if name.rsplit(".", 1)[-1] in targets}
    experts = [name for name, module in wanted.items() if isinstance(module, RoutedExperts)]
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides it
        target_modules=[name for name in wanted if name not in experts],
        target_parameters=[f"{name}.{part}" for name in experts for part in ("gate_up_proj", "down_proj")] or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, model, _ADAPTER)
    for module in list(model.modules()):
        if isinstance(module, ParamWrapper):
            module.__class__ = _factored_experts()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # in bfloat16, most updates of A would be rounded away


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and stacked experts by name, without the head and prediction modules."""
    skipped = ["lm_head"]
    for name, module in model.named_modules():
        if isinstance(module, PredictionModule):
            skipped.append(f"{name}.")
        elif isinstance(module, nn.Linear | RoutedExperts) and not name.startswith(tuple(skipped)):
            yield name, module


@functools.cache
def _factored_experts() -> type:
    """peft's wrapper of one stacked parameter, with the forward pass replaced."""
    from peft.tuners.lora import ParamWrapper

    class FactoredExperts(ParamWrapper):
        """Hands the experts A and B as they are. peft would hand them W + B A: a copy of all experts of a layer, which
        stays until the backward pass."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters:
                return self.base_layer(x, *args, **kwargs)
            up_EOr, down_ErI, scale = self.get_delta_factors(_ADAPTER)
            experts: RoutedExperts = self.get_base_layer()  # type: ignore[assignment]
            factors = down_ErI.transpose(1, 2).contiguous(), (up_EOr * scale).transpose(1, 2).contiguous()
            experts.low_rank[self.parameter_name] = factors
            try:
                return self.base_layer(x, *args, **kwargs)
            finally:
                del experts.low_rank[self.parameter_name]

    return FactoredExperts


def has_adapters(model: object) -> bool:
    """Whether `add_lora` was here."""
    return hasattr(model, "peft_config")


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, the model computes what its frozen weights alone compute. Not for gradients."""
    layers = list(_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class WithoutAdapters:
    """The frozen model under a model with adapters, in the same memory: the reference of a KL penalty."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.lm_head = model.lm_head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), adapters_off(self._model):
            return self._model(*args, **kwargs)


def plain_tensors(
    model: nn.Module, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """The state dictionary as it would be without adapters: their products added, 4-bit weights dequantized.

    Without adapters these are the model's own tensors, not copies. `whole` gathers a sharded one.
    """
    if not has_adapters(model):
        yield from ((name, whole(tensor)) for name, tensor in model.state_dict().items())
        return
    layers = _layers(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or ".weight." in name:  # adapters, and what belongs to a 4-bit weight
            continue
        name, tensor = name.replace(".base_layer", ""), whole(dequantized(tensor))
        if name in layers:
            with torch.no_grad():
                tensor = (tensor.float() + whole(layers[name].get_delta_weight(_ADAPTER)).float()).to(tensor.dtype)
        yield name, tensor


def _layers(model: nn.Module) -> dict[str, Any]:
    """Adapted parameter, by its name without adapters -> peft's layer around it."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def adapted_modules(model: Any) -> set[str]:
    """Names of the modules that own adapted parameters: `model.layers.0.self_attn.q_proj`, `...mlp.experts`."""
    return {name.rsplit(".", 1)[0] for name in _layers(model)}


def write_adapter(model: Any, folder: Path) -> None:
    """Writes the adapters alone into an existing folder, as peft does."""
    model.peft_config[_ADAPTER].save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in _adapters(model).items()}, folder / _FILE)


def _adapters(model: Any) -> dict[str, Tensor]:
    """By the names that peft gives them in a file."""
    tensors = model.state_dict().items()
    return {f"base_model.model.{n.replace(f'.{_ADAPTER}.', '.')}": t for n, t in tensors if ".lora_" in n}
