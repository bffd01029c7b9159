"""DeepseekV3ForCausalLM: embedding, decoder layers, norm, head, over packed sequences. Read this file first.

Module and parameter names are those of the Hugging Face checkpoint; only the routed experts are stacked (see
checkpoint.py). Shapes: T packed tokens, B sequences, S positions, D hidden, K experts per token, V vocabulary.

    model = DeepseekV3ForCausalLM(config)
    hidden_TD = model(ids_T, SequenceLayout.from_lengths([5, 3])).hidden_TD
    logits_TV = model.lm_head(hidden_TD)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.cache import LatentCache
from models.config import DeepseekV3Config
from models.decoder_layer import DecoderLayer, PredictionModule
from models.moe import MixtureOfExperts, RoutedExperts, Router, Routing
from models.packing import SequenceLayout
from models.rope import RotaryTable

Replay = Mapping[int, Tensor]
"""Layer -> [T, K] recorded experts, to be taken instead of chosen; rows of -1 and layers not named choose for
themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """What one pass gives; the head is applied by the caller, who alone knows which tokens need logits."""

    hidden_TD: Tensor
    """[T, D] after the final norm."""
    routing: dict[int, Routing]
    """Layer -> how its tokens were routed; layers without experts are absent."""

    @property
    def expert_ids(self) -> dict[int, Tensor]:
        """Layer -> [T, K] experts that each token used."""
        return {layer: routing.ids_TK for layer, routing in self.routing.items()}


class DeepseekV3Model(nn.Module):
    """Everything below the head. With `checkpoint_layers`, the backward pass recomputes a layer's activations."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.num_layers = config.num_hidden_layers
        layers = [DecoderLayer(config, layer) for layer in range(self.num_layers)]
        # In the checkpoint, depth k of multi-token prediction is layer num_hidden_layers + k - 1.
        depths = [PredictionModule(config, self.num_layers + k) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*layers, *depths])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = RotaryTable(config)
        self.checkpoint_layers = False

    def decoder_layers(self) -> Iterator[tuple[int, DecoderLayer]]:
        """The layers of the main model; prediction modules behind them are not among these."""
        for index in range(self.num_layers):
            layer = self.layers[index]
            assert isinstance(layer, DecoderLayer)
            yield index, layer

    def prediction_modules(self) -> list[PredictionModule]:
        """Depths 1, 2, ... of multi-token prediction; used by mtp.py, never by `forward`."""
        return [layer for layer in self.layers if isinstance(layer, PredictionModule)]

    def forward(self, ids_T: Tensor, layout: SequenceLayout, cache: LatentCache | None, replay: Replay) -> ModelOutput:
        x_TD = self.embed_tokens(ids_T)
        rope = self.rope(layout.positions_T, x_TD.dtype)
        recorded: dict[int, Routing] = {}
        for index, layer in self.decoder_layers():
            if self.checkpoint_layers and torch.is_grad_enabled():
                x_TD, routing = checkpoint(layer, x_TD, rope, layout, cache, replay.get(index), use_reentrant=False)
            else:
                x_TD, routing = layer(x_TD, rope, layout, cache, replay.get(index))
            if routing is not None:
                recorded[index] = routing
        if cache is not None:
            cache.advance(torch.tensor(layout.lengths, device=ids_T.device))
        return ModelOutput(hidden_TD=self.norm(x_TD), routing=recorded)

    def decode(self, ids_BM: Tensor, cache: LatentCache) -> ModelOutput:
        num_sequences, num_new = ids_BM.shape
        x_TD = self.embed_tokens(ids_BM.flatten())
        rope = self.rope(cache.next_positions(num_new).flatten(), x_TD.dtype)
        recorded: dict[int, Routing] = {}
        for index, layer in self.decoder_layers():
            x_TD, routing = layer.decode(x_TD, rope, cache)
            if routing is not None:
                recorded[index] = routing
        cache.advance(num_new)
        return ModelOutput(hidden_TD=self.norm(x_TD), routing=recorded)


class DeepseekV3ForCausalLM(nn.Module):
    shares_beginnings = True
    """As in `CausalLM`."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids_T: Tensor, layout: SequenceLayout, cache: LatentCache | None = None, replay: Replay | None = None
    ) -> ModelOutput:
        """Packed token ids [T] -> final hidden states. `cache` (for a prefill) is filled; `replay` fixes experts."""
        assert ids_T.shape == layout.positions_T.shape, f"{ids_T.shape} ids for {layout.positions_T.shape} positions"
        return self.model(ids_T, layout, cache, replay or {})

    def decode(self, ids: Tensor, cache: LatentCache) -> ModelOutput:
        """One next token per cached sequence [B] -> hidden states [B, D]; the cache grows by one.

        Or M next tokens [B, M] -> [B * M, D], row by row, each token seeing those before it; the cache grows by M.
        """
        return self.model.decode(ids[:, None] if ids.dim() == 1 else ids, cache)

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Equally long sequences [B, S] -> logits [B, S, V], all of them at once: for small inputs and tests."""
        num_sequences, length = tokens_BS.shape
        layout = SequenceLayout.from_lengths([length] * num_sequences, device=tokens_BS.device)
        return self.lm_head(self(tokens_BS.flatten(), layout).hidden_TD).unflatten(0, (num_sequences, length))

    def routers(self) -> dict[int, Router]:
        """Layer -> router, for the layers that have experts."""
        return {
            i: layer.mlp.gate for i, layer in self.model.decoder_layers() if isinstance(layer.mlp, MixtureOfExperts)
        }

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights from `seed`: embeddings N(0, initializer_range), matrices N(0, 1 / fan-in), norms 1, bias 0.

        The paper's one std of 0.006 for all suits a hidden size of 7,168; 1 / sqrt(fan-in) suits every width.
        """
        generator = torch.Generator(device=self.lm_head.weight.device).manual_seed(seed)
        self.model.embed_tokens.weight.normal_(0, self.config.initializer_range, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight is not self.model.embed_tokens.weight:
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Router):
                module.weight.normal_(0, module.weight.shape[-1] ** -0.5, generator=generator)
                if self.config.has_correction_bias:
                    module.e_score_correction_bias.zero_()
            elif isinstance(module, RoutedExperts):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
