"""DeepseekV3ForCausalLM: embedding, decoder layers, norm, head, over packed sequences. Read this file first.

Module and parameter names are those of the Hugging Face checkpoint; only the routed experts are stacked (see
checkpoint.py). Shapes: T packed tokens, B sequences, D hidden, K experts per token, V vocabulary.

    model = DeepseekV3ForCausalLM(config)
    hidden_TD = model(ids_T, SequenceLayout.from_lengths([5, 3])).hidden_TD
    logits_TV = model.lm_head(hidden_TD)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention import MultiHeadLatentAttention
from models.cache import LatentCache
from models.config import DeepseekV3Config
from models.moe import FeedForward, MixtureOfExperts, RoutedExperts, Router
from models.packing import SequenceLayout
from models.rope import RotaryTable


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """What one pass gives; the head is applied by the caller, who alone knows which tokens need logits."""

    hidden_TD: Tensor
    """[T, D] after the final norm."""
    expert_ids: dict[int, Tensor]
    """Layer -> [T, K] experts that each token used; layers without experts are absent."""


class DecoderLayer(nn.Module):
    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.mlp = (
            MixtureOfExperts(config)
            if config.is_moe_layer(layer)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def feed_forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The second half with its residual; also the chosen experts, None in a dense layer."""
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MixtureOfExperts):
            out_TD, ids_TK = self.mlp(normed_TD)
            return x_TD + out_TD, ids_TK
        return x_TD + self.mlp(normed_TD), None


class DeepseekV3Model(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = RotaryTable(config)

    def forward(self, ids_T: Tensor, layout: SequenceLayout, cache: LatentCache | None) -> ModelOutput:
        x_TD = self.embed_tokens(ids_T)
        rope = self.rope(layout.positions_T, x_TD.dtype)
        expert_ids: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            x_TD = x_TD + layer.self_attn(layer.input_layernorm(x_TD), rope, layout, cache)
            x_TD, ids_TK = layer.feed_forward(x_TD)
            if ids_TK is not None:
                expert_ids[index] = ids_TK
        if cache is not None:
            cache.advance(torch.tensor(layout.lengths, device=ids_T.device))
        return ModelOutput(hidden_TD=self.norm(x_TD), expert_ids=expert_ids)

    def decode(self, ids_B: Tensor, cache: LatentCache) -> ModelOutput:
        x_BD = self.embed_tokens(ids_B)
        rope = self.rope(cache.lengths_B, x_BD.dtype)
        expert_ids: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            x_BD = x_BD + layer.self_attn.decode(layer.input_layernorm(x_BD), rope, cache)
            x_BD, ids_BK = layer.feed_forward(x_BD)
            if ids_BK is not None:
                expert_ids[index] = ids_BK
        cache.advance(1)
        return ModelOutput(hidden_TD=self.norm(x_BD), expert_ids=expert_ids)


class DeepseekV3ForCausalLM(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_T: Tensor, layout: SequenceLayout, cache: LatentCache | None = None) -> ModelOutput:
        """Packed token ids [T] -> final hidden states; with `cache` (the prompts' prefill), fills it."""
        assert ids_T.shape == layout.positions_T.shape, f"{ids_T.shape} ids for {layout.positions_T.shape} positions"
        return self.model(ids_T, layout, cache)

    def decode(self, ids_B: Tensor, cache: LatentCache) -> ModelOutput:
        """One next token per cached sequence [B] -> hidden states [B, D]; the cache grows by one."""
        return self.model.decode(ids_B, cache)

    def routers(self) -> dict[int, Router]:
        """Layer -> router, for the layers that have experts."""
        return {
            index: layer.mlp.gate
            for index, layer in enumerate(self.model.layers)
            if isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MixtureOfExperts)
        }

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights from `seed`: embeddings N(0, initializer_range); every matrix N(0, 1 / fan-in); norms 1; bias
        0.

        The paper's one std of 0.006 for all suits a hidden size of 7,168; 1 / sqrt(fan-in) suits every width.
        """
        generator = torch.Generator().manual_seed(seed)
        self.model.embed_tokens.weight.normal_(0, self.config.initializer_range, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Router):
                module.weight.normal_(0, module.weight.shape[-1] ** -0.5, generator=generator)
                module.e_score_correction_bias.zero_()
            elif isinstance(module, RoutedExperts):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
