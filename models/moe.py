"""Mixture of experts as in DeepSeek-V3 (arXiv:2412.19437 section 2.1.2): sigmoid router with a correction bias, shared
expert.

Shapes: T tokens, D hidden, E routed experts, K experts per token, F expert width, R = T * K rows sorted by expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DeepseekV3Config
from models.expert_parallel import ExpertExchange
from models.fused import fused
from models.moves import collect_rows, spread_rows, take_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What one layer's router decided."""

    ids_TK: Tensor
    """[T, K] experts that were used."""
    chosen_TK: Tensor
    """[T, K] what the router itself chose: the same, except where recorded experts were replayed."""
    scores_TE: Tensor
    """[T, E] affinities of all experts, float32, with gradient."""

    def of_rows(self, rows: Tensor) -> "Routing":
        """What was decided for these tokens, some of them several times; without their scores, [0, E]."""
        return Routing(ids_TK=self.ids_TK[rows], chosen_TK=self.chosen_TK[rows], scores_TE=self.scores_TE.detach()[:0])


class FeedForward(nn.Module):
    """SwiGLU block: the dense layers and the shared expert."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Router(nn.Module):
    """Picks K experts per token, in float32 whatever the model's dtype."""

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.has_correction_bias:
            # Steers the selection only, never the weights: a buffer, not a trained parameter.
            bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None = None) -> tuple[Routing, Tensor]:
        """[T, D] -> which experts, and their mixing weights [T, K], float32.

        With `replay_TK`, experts recorded elsewhere are taken instead of chosen, except in rows that begin with -1;
        their weights still come from the current scores, so gradients reach the gate (rollout routing replay,
        arXiv:2510.11370).
        """
        config = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid() if config.scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)
        ids_TK = chosen_TK = self._select(scores_TE.detach())
        if replay_TK is not None:
            ids_TK = torch.where(replay_TK[:, :1] < 0, chosen_TK, replay_TK.long())
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        routing = Routing(ids_TK=ids_TK, chosen_TK=chosen_TK, scores_TE=scores_TE)
        return routing, weights_TK * config.routed_scaling_factor

    def _select(self, choice_TE: Tensor) -> Tensor:
        """Group-limited top-k. A group's score is the sum of its two best experts (V3) or its best (V2)."""
        config = self.config
        if config.has_correction_bias:
            choice_TE = choice_TE + self.e_score_correction_bias
        if config.topk_group < config.n_group and config.topk_method != "greedy":
            grouped_TGX = choice_TE.unflatten(1, (config.n_group, -1))
            best = 2 if config.has_correction_bias else 1
            group_scores_TG = grouped_TGX.topk(best, dim=-1).values.sum(-1)
            kept = group_scores_TG.topk(config.topk_group, dim=-1).indices
            dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, kept, False)
            choice_TE = grouped_TGX.masked_fill(dropped_TG[..., None], float("-inf")).flatten(1)
        return choice_TE.topk(config.num_experts_per_tok, dim=-1).indices


@fused
def weighted_swiglu(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """silu(gate) * up * weight, [R, 2F] and [R] -> [R, F], computed in float32."""
    gate_RF, up_RF = gate_up_RF.float().chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF * weights_R[:, None]).to(gate_up_RF.dtype)


class RoutedExperts(nn.Module):
    """All routed experts of a layer, stacked; on disk each has its own three tensors."""

    exchange: ExpertExchange | None = None
    """Set where other ranks hold experts, too (parallel.py); the stacked weights are then those of this rank."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.low_rank: dict[str, tuple[Tensor, Tensor]] = {}
        """Parameter -> A [E, in, r] and B [E, r, out], whose product is added to it (lora.py)."""

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over each token's K experts of weight * expert(x), [T, D].

        Each token becomes K rows, sorted by expert. The weights enter between the two products, where rows are
        narrowest; the second product is linear, so the sum is the same.
        """
        experts_R, order_R = ids_TK.flatten().sort(stable=True)
        rows_TK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        rows_TK = rows_TK.view_as(ids_TK)  # where each token's K rows stand
        tokens_R = order_R // ids_TK.shape[1]
        experts_E = torch.arange(self.num_experts, device=order_R.device)
        ends_E = torch.searchsorted(experts_R, experts_E, right=True, out_int32=True)

        x_RD, weights_R = spread_rows(x_TD, tokens_R, rows_TK), take_rows(weights_TK.flatten(), order_R)
        if self.exchange is None:
            out_RD = self._compute(x_RD, weights_R, ends_E)
        else:
            out_RD = self.exchange(x_RD, weights_R, ends_E, self._compute)
        return collect_rows(out_RD, tokens_R, rows_TK)

    def _compute(self, x_RD: Tensor, weights_R: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert through the experts of this rank, [R, D] -> [R, D]."""
        inner_RF = weighted_swiglu(self._product(x_RD, "gate_up_proj", ends_E), weights_R)
        return self._product(inner_RF, "down_proj", ends_E)

    def _product(self, x_RI: Tensor, name: str, ends_E: Tensor) -> Tensor:
        """Each row times its expert's matrix, [R, in] -> [R, out]; expert e's rows end at ends_E[e]."""
        weight_EOI = getattr(self, name)
        if self.exchange is not None:
            weight_EOI = self.exchange.local(weight_EOI)
        out_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
        if name in self.low_rank:
            down_EIr, up_ErO = self.low_rank[name]
            out_RO = out_RO + F.grouped_mm(F.grouped_mm(x_RI, down_EIr, offs=ends_E), up_ErO, offs=ends_E)
        return out_RO

    def loop(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The plain twin of `forward`: one expert after the other."""
        out_TD = torch.zeros_like(x_TD)
        for expert in range(len(self.down_proj)):
            tokens, slots = torch.where(ids_TK == expert)
            gate, up = F.linear(x_TD[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert]) * weights_TK[tokens, slots, None].to(x_TD.dtype)
            out_TD = out_TD.index_add(0, tokens, y)
        return out_TD


class MixtureOfExperts(nn.Module):
    """Routed experts plus the always-on shared expert."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            shared_width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = FeedForward(config.hidden_size, shared_width)

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[T, D] -> output [T, D] and how it was routed; `replay_TK` as in `Router.forward`."""
        routing, weights_TK = self.gate(x_TD, replay_TK)
        out_TD = self.experts(x_TD, routing.ids_TK, weights_TK)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, routing
