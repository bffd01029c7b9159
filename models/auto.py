"""Any causal language model behind one small interface: ours, or a dense one of transformers (Qwen, Llama, Gemma 3).

    model = from_pretrained("checkpoint_dir")
    hidden_TD = model(ids_T, SequenceLayout.from_lengths([5, 3])).hidden_TD
    save_pretrained(model, "out_dir")

Not covered, and refused when such a model is loaded: experts of other architectures, logits that are more than a
product with the head (Gemma 2 caps them), architectures that cannot keep packed sequences apart. Log-probabilities are
the caller's: hidden states times `lm_head.weight`.

Shapes: T packed tokens, B sequences, S positions, D hidden, V vocabulary.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models import checkpoint
from models.causal_attention import DENSE_NAME, dense_attention
from models.causal_lm import CausalLM
from models.config import MODEL_TYPES
from models.fused import fuse_layers
from models.lora import has_adapters, plain_tensors, write_adapter
from models.packing import SequenceLayout
from models.quantized import four_bit_arguments, settle
from models.transformer import DeepseekV3ForCausalLM, ModelOutput, Replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer


ADAPTER = "adapter"
"""Folder of the adapters alone, inside that of the merged checkpoint."""


class TransformersCausalLM(nn.Module):
    """A dense causal language model of transformers, packed without padding. Dropout is off.

    Sequences lie end to end in one row. Plain causal attention is ours (causal_attention.py), which knows where each
    begins. With sliding windows it is transformers' own, which tells them apart by positions that start again at 0
    (only without a cache and a mask, hence the arguments in `forward`) and needs a [T, T] mask.
    """

    def __init__(self, reference: "PreTrainedModel") -> None:
        """Takes over the modules of `reference`, under its own names. Raises ValueError for what is not covered."""
        super().__init__()
        self.config: Any = reference.config
        _refuse_by_config(reference)
        for name, child in reference.named_children():
            self.add_module(name, child)
        self.lm_head: nn.Linear
        self._base_name = reference.base_model_prefix
        # In a tuple, so that its modules are not registered twice; saving is its work.
        self._reference = (reference.eval(),)
        self._refuse_by_trial()
        if self.lm_head.weight.is_cuda and all(p.is_floating_point() for p in self.parameters()):  # not in 4 bits
            self.fuse_layers()

    def fuse_layers(self) -> None:
        """Compiles the decoder layers, at their first use (half a minute); done by itself on CUDA."""
        from transformers import AttentionInterface

        AttentionInterface.register(DENSE_NAME, fuse_layers(self._layers(), dense_attention))

    def checkpoint_layers(self) -> None:
        self._reference[0].gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self._layers():
            layer.training = True  # transformers asks for it; dropout is in the modules below, and stays off

    def _layers(self) -> "list[GradientCheckpointingLayer]":
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def shares_beginnings(self) -> bool:
        return self.config._attn_implementation == DENSE_NAME

    def forward(self, ids_T: Tensor, layout: SequenceLayout, *, replay: Replay | None = None) -> ModelOutput:
        """Packed token ids [T] -> final hidden states; nothing is routed."""
        assert not replay, f"a dense model has no experts to replay, got those of layers {sorted(replay or ())}"
        base = getattr(self, self._base_name)
        assert self.shares_beginnings or layout.in_sequences is None, "transformers' attention sees no shared tokens"
        extra = {"layout": layout} if self.shares_beginnings else {}
        output = base(input_ids=ids_T[None], position_ids=layout.positions_T[None], use_cache=False, **extra)
        return ModelOutput(hidden_TD=output.last_hidden_state[0], routing={})

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Equally long sequences [B, S] -> logits [B, S, V], all of them at once: for small inputs and tests."""
        num_sequences, length = tokens_BS.shape
        layout = SequenceLayout.from_lengths([length] * num_sequences, device=tokens_BS.device)
        return self.lm_head(self(tokens_BS.flatten(), layout).hidden_TD).unflatten(0, (num_sequences, length))

    def routers(self) -> Mapping[int, nn.Module]:
        return {}

    def hf_tensors(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, detached, under its name in transformers; a tied head is not named again.

        For Qwen, Llama, Gemma and most others that is the name in the checkpoint, too.
        """
        for name, tensor in plain_tensors(self, whole):
            if not (name == "lm_head.weight" and self.config.tie_word_embeddings):
                yield name, tensor

    @torch.no_grad()
    def load_hf_tensors(self, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Copies checkpoint tensors into the model. Raises ValueError if one is missing, unexpected or misshapen."""
        targets = dict(self.hf_tensors())
        missing = set(targets)
        for name, tensor in tensors:
            if name not in targets or targets[name].shape != tensor.shape:
                wanted = list(targets[name].shape) if name in targets else "no such tensor"
                raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, the model has {wanted}")
            targets[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"{source}: lacks {len(missing)} tensors of the model: {', '.join(sorted(missing)[:8])}")

    def write(self, folder: Path, whole: Callable[[Tensor], Tensor]) -> None:
        """Writes the checkpoint into an existing folder, as transformers does; all of it in main memory at once."""
        tensors = {name: tensor.cpu() for name, tensor in self.hf_tensors(whole)}
        self._reference[0].save_pretrained(folder, state_dict=tensors)

    @torch.no_grad()
    def _refuse_by_trial(self) -> None:
        """Runs eight tokens: logits must be hidden states times head, and packed sequences must not see each other.

        The first is compared with transformers under its own attention, so ours is compared with it, too.
        """
        config, device = self.config, self.lm_head.weight.device
        layout = SequenceLayout.from_lengths([5, 3], device=device)
        ids_T = torch.arange(8, device=device) % config.vocab_size
        wanted = self._reference[0](input_ids=ids_T[None, :5], use_cache=False).logits
        if _has_plain_attention(config):
            from transformers import AttentionInterface  # takes seconds to import

            AttentionInterface.register(DENSE_NAME, dense_attention)
            self._reference[0].set_attn_implementation(DENSE_NAME)
        hidden_TD = self(ids_T, layout).hidden_TD
        rounding = 1e-5 if hidden_TD.dtype == torch.float32 else 0.05
        difference = self.lm_head(hidden_TD[None, :5]).float() - wanted.float()
        if not difference.norm() <= rounding * wanted.float().norm():
            raise ValueError(
                f"model_type {config.model_type!r}: logits are more than hidden states times head, which is all we do"
            )
        other_T = torch.cat([(ids_T[:5] + 1) % config.vocab_size, ids_T[5:]])
        if not torch.equal(self(other_T, layout).hidden_TD[5:], hidden_TD[5:]):
            raise ValueError(
                f"model_type {config.model_type!r}: a sequence sees the one packed before it (attention "
                f"{config._attn_implementation!r}); this architecture cannot be trained packed"
            )


def _has_plain_attention(config: Any) -> bool:
    """All layers attend to everything before, without windows."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def _refuse_by_config(reference: "PreTrainedModel") -> None:
    config: Any = reference.config
    head = getattr(reference, "lm_head", None)
    if getattr(config, "vocab_size", None) is None or not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"model_type {config.model_type!r}: not a text model with a bias-free lm_head")
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError(
            f"model_type {config.model_type!r} caps its logits (final_logit_softcapping="
            f"{config.final_logit_softcapping}), which training would leave out; use a model without it (Gemma 3)"
        )
    if any(".experts." in name for name, _ in reference.named_parameters()):
        raise ValueError(f"model_type {config.model_type!r} has experts; of those, {MODEL_TYPES} are implemented")


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: bool = False,
) -> DeepseekV3ForCausalLM | TransformersCausalLM:
    """Our own model if `config.json` names its architecture, else that of transformers behind the same interface.

    With `quantize`, the linear layers of a dense model hold 4 bits per weight, and only adapters can be trained. Raises
    FileNotFoundError for a missing file and ValueError for tensors or an architecture that do not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give the folder of a Hugging Face checkpoint")
    if read_model_type(path) in MODEL_TYPES:
        if quantize:
            raise ValueError(
                f"{folder}: 4-bit weights are for dense models only: stacked experts have no such form here"
            )
        return checkpoint.load_pretrained(folder, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM  # takes seconds to import

    load: Any = AutoModelForCausalLM.from_pretrained
    reference, report = load(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False,
        **(four_bit_arguments(dtype, device) if quantize else {}),
    )  # fmt: skip
    # transformers would go on with random weights in place of the missing ones.
    if problems := {key: sorted(map(str, names)) for key, names in report.items() if key.endswith("_keys") and names}:
        raise ValueError(f"{folder}: the tensors do not fit the model: {problems}")
    if quantize:
        settle(reference)
    return TransformersCausalLM(reference.to(device))


def read_model_type(path: Path) -> str | None:
    """The architecture that a `config.json` names. Raises ValueError if the file is not JSON."""
    try:
        return json.loads(path.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def hf_tensors(
    model: CausalLM, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its checkpoint name, detached views of the parameters; `whole` gathers a sharded one.

    Of a model with adapters it is what a model without them would hold, merged a tensor at a time into copies.
    """
    if isinstance(model, TransformersCausalLM):
        return model.hf_tensors(whole)
    return checkpoint.hf_tensors(_ours(model), whole)


def load_hf_tensors(model: CausalLM, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copies checkpoint tensors into the model, in its dtypes; ValueError if they are not exactly the model's."""
    if has_adapters(model):
        raise ValueError(
            f"{source}: the model has adapters, and their frozen weights stay as they are; load them before add_lora"
        )
    if isinstance(model, TransformersCausalLM):
        model.load_hf_tensors(tensors, source)
    else:
        checkpoint.load_hf_tensors(_ours(model), tensors, source)


def write_checkpoint(model: CausalLM, folder: Path, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Writes `config.json` and the weights into an existing folder; of adapters, the merged weights, and themselves in
    its `adapter/`, as peft does. `whole` gathers a sharded tensor."""
    if has_adapters(model):
        (folder / ADAPTER).mkdir()
        write_adapter(model, folder / ADAPTER)
    if isinstance(model, TransformersCausalLM):
        model.write(folder, whole)
    else:
        checkpoint.write_checkpoint(_ours(model), folder, whole=whole)


def save_pretrained(model: CausalLM, folder: str | Path) -> None:
    """Writes a checkpoint that transformers and vLLM load; an existing folder is replaced whole, or not at all."""
    with checkpoint.replace_folder(folder) as fresh:
        write_checkpoint(model, fresh)


def checkpoint_layers(model: CausalLM) -> None:
    """From now on the backward pass computes each layer's activations again: a third more work, for long sequences."""
    if isinstance(model, TransformersCausalLM):
        model.checkpoint_layers()
    else:
        _ours(model).model.checkpoint_layers = True


def _ours(model: CausalLM) -> DeepseekV3ForCausalLM:
    assert isinstance(model, DeepseekV3ForCausalLM), f"no checkpoint form for {type(model).__name__}"
    return model
