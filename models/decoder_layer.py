"""One decoder layer, and the prediction module that is such a layer with an entrance and an exit of its own.

Shapes: T packed tokens (while decoding: B sequences times M new tokens each), D hidden, K experts per token.
"""

import torch
from torch import Tensor, nn

from models.attention import MultiHeadLatentAttention
from models.cache import LatentCache
from models.config import DeepseekV3Config
from models.moe import FeedForward, MixtureOfExperts, Routing
from models.packing import SequenceLayout


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

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        layout: SequenceLayout,
        cache: LatentCache | None = None,
        replay_TK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Whole sequences, [T, D] -> [T, D] and the routing, None in a dense layer."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, layout, cache)
        return self._feed_forward(x_TD, replay_TK)

    def decode(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], cache: LatentCache) -> tuple[Tensor, Routing | None]:
        """The same number of new tokens behind each cached sequence."""
        x_TD = x_TD + self.self_attn.decode(self.input_layernorm(x_TD), rope, cache)
        return self._feed_forward(x_TD, None)

    def _feed_forward(self, x_TD: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Routing | None]:
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MixtureOfExperts):
            out_TD, routing = self.mlp(normed_TD, replay_TK)
            return x_TD + out_TD, routing
        return x_TD + self.mlp(normed_TD), None


class PredictionModule(DecoderLayer):
    """Depth k of multi-token prediction (arXiv:2412.19437 section 2.2): from token i on, predicts token i + k + 1.

        h^k_i = shared_head.norm(Layer(eh_proj([enorm(Emb(t_{i+k})) ; hnorm(h^{k-1}_i)])))

    h^0 is the main model's hidden state after its final norm; the main model's head turns h^k into logits. The released
    weights expect the embedding first, where the paper writes the hidden state first. Positions are those of i.
    """

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)})

    def predict(
        self,
        embedded_TD: Tensor,
        hidden_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        layout: SequenceLayout,
        cache: LatentCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Embeddings of the tokens k ahead and h^{k-1}, each [T, D] -> h^k [T, D] and the routing."""
        x_TD, routing = self.forward(self._merge(embedded_TD, hidden_TD), rope, layout, cache)
        return self.shared_head["norm"](x_TD), routing

    def predict_cached(
        self, embedded_TD: Tensor, hidden_TD: Tensor, rope: tuple[Tensor, Tensor], cache: LatentCache
    ) -> Tensor:
        """The same for new tokens behind cached ones, [T, D] -> [T, D]."""
        return self.shared_head["norm"](self.decode(self._merge(embedded_TD, hidden_TD), rope, cache)[0])

    def _merge(self, embedded_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(embedded_TD), self.hnorm(hidden_TD)], dim=-1))
