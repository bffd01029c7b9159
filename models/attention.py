"""Multi-head latent attention (MLA), arXiv:2405.04434 section 2.1: naive for whole sequences, absorbed for decoding.

Both read the same parameters, named as in the checkpoint. Naive expands the latent to keys and values per head;
absorbed moves that expansion onto the query and the output, so that one latent per token is all it needs of the past.

Shapes: T tokens, B sequences, M new tokens of a sequence, S positions, D hidden, H heads, C kv latent, R rotary and
U unrotated part of a query or key head of X = U + R, W value head.
"""

import torch
from torch import Tensor, nn

from models.cache import LatentCache
from models.causal_attention import causal_attention
from models.config import DeepseekV3Config
from models.fused import fused
from models.packing import SequenceLayout
from models.rope import rotate, rotate_last


class MultiHeadLatentAttention(nn.Module):
    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.dims = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.scale = config.softmax_scale
        hidden, query_width = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.latent_norm_eps)
        kv_width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], layout: SequenceLayout, cache: LatentCache | None = None
    ) -> Tensor:
        """Naive form: causal attention inside each packed sequence, [T, D] -> [T, D]; fills `cache` when given."""
        q_THX, kv_c_TC, k_pe_TR = self._project(x_TD, rope)
        if cache is not None:
            cache.fill(self.layer, layout, kv_c_TC, k_pe_TR)
        k_nope_THU, v_THW = self._split_heads(self.kv_b_proj(kv_c_TC)).split([self.dims[0], self.v_head_dim], dim=-1)
        k_THX = append_shared(k_nope_THU, k_pe_TR)
        return self.o_proj(causal_attention(q_THX, k_THX, v_THW, layout, self.scale).flatten(1))

    def decode(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
        """Absorbed form: M new tokens of each sequence attend to the cached latents, themselves and each other.

        [T, D] -> [T, D] with T = B * M, the sequences of the cache one after the other. What it appends becomes part of
        the cache by `advance`, once, after the last layer.
        """
        num_new = len(x_TD) // len(cache.lengths_B)
        q_BMHX, kv_c_BMC, k_pe_BMR = (x.unflatten(0, (-1, num_new)) for x in self._project(x_TD, rope))
        q_nope_BMHU, q_pe_BMHR = q_BMHX.split(self.dims, dim=-1)
        cache.append(self.layer, kv_c_BMC, k_pe_BMR)
        longest = int(cache.lengths_B.max()) + num_new
        kv_c_BSC, k_pe_BSR = cache.kv_c_LBSC[self.layer][:, :longest], cache.k_pe_LBSR[self.layer][:, :longest]
        up_HXC = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        up_k_HUC, up_v_HWC = up_HXC.split([self.dims[0], self.v_head_dim], dim=1)

        q_c_BMHC = torch.einsum("bmhu,huc->bmhc", q_nope_BMHU, up_k_HUC)
        scores_BMHS = torch.einsum("bmhc,bsc->bmhs", q_c_BMHC, kv_c_BSC)
        scores_BMHS = scores_BMHS + torch.einsum("bmhr,bsr->bmhs", q_pe_BMHR, k_pe_BSR)
        future_BMS = torch.arange(longest, device=x_TD.device) > cache.next_positions(num_new)[:, :, None]
        scores_BMHS = (scores_BMHS * self.scale).masked_fill(future_BMS[:, :, None], float("-inf"))
        weights_BMHS = scores_BMHS.softmax(dim=-1, dtype=torch.float32).to(x_TD.dtype)
        out_c_BMHC = torch.einsum("bmhs,bsc->bmhc", weights_BMHS, kv_c_BSC)
        out_BMHW = torch.einsum("bmhc,hwc->bmhw", out_c_BMHC, up_v_HWC)
        return self.o_proj(out_BMHW.reshape(len(x_TD), -1))

    def _project(self, x_TD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries per head, their last part rotated; normalised latent; the rotated key that all heads share."""
        cos_TR, sin_TR = rope
        if hasattr(self, "q_proj"):
            q = self.q_proj(x_TD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        q_THX = rotate_last(self._split_heads(q), cos_TR[:, None], sin_TR[:, None])
        kv_c_TC, k_pe_TR = self.kv_a_proj_with_mqa(x_TD).split([self.kv_lora_rank, self.dims[1]], dim=-1)
        return q_THX, self.kv_a_layernorm(kv_c_TC), rotate(k_pe_TR, cos_TR, sin_TR)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


@fused
def append_shared(k_nope_THU: Tensor, k_pe_TR: Tensor) -> Tensor:
    """Each head's own part of the keys, then the rotated part that all heads share."""
    return torch.cat([k_nope_THU, k_pe_TR[:, None, :].expand(-1, k_nope_THU.shape[1], -1)], dim=-1)
