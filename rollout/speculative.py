"""Speculative decoding with the model's own prediction modules: draft N tokens, verify them in one pass, keep the
distribution of the main model exactly.

The modules of multi-token prediction (models/mtp.py) draft tokens d_1 .. d_N from distributions q_1 .. q_N; the main
model gives its own p_1 .. p_{N+1} for the same positions in one pass. d_j is accepted with probability
min(1, p_j(d_j) / q_j(d_j)); the first one refused is replaced by a draw from max(p_j - q_j, 0), normalised; if all are
accepted, one more token comes from p_{N+1}. Every token so chosen has distribution p (arXiv:2211.17192, theorem 1),
whatever the drafts are worth: they only decide how many passes it takes. At temperature 0, p and q are single tokens,
and the rule is to accept what the main model would have chosen.

Shapes: B sequences being decoded, N drafted tokens, M tokens of each sequence that pass a layer at once, S positions,
T packed tokens, D hidden, V vocabulary, L layers with experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import DeepseekV3ForCausalLM, LatentCache, SequenceLayout
from models.cache import join_rows
from rollout.decoding import Running, choose, kept_tokens, log_distribution, next_uniforms, prefill, probabilities
from rollout.router_replay import pack_ids
from rollout.sample import SamplingParams


@dataclass
class DraftCount:
    """How many drafts were made and how many the main model accepted."""

    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted; 0 before the first draft."""
        return self.num_accepted / max(1, self.num_drafted)


def accept(p_BMV: Tensor, q_BNV: Tensor, drafts_BN: Tensor, uniforms_BM: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts of each sequence stand, [B] from 0 to N, and the token behind those, [B]. M is N + 1.

    `p_BMV` is the main model's distribution at the drafted positions and one more, `q_BNV` what the drafts were drawn
    from, both in proportion; `uniforms_BM` numbers from [0, 1): one per draft, and one for the token behind.
    """
    p_BMV, q_BNV = (x / x.sum(-1, keepdim=True) for x in (p_BMV, q_BNV))
    num_drafts = drafts_BN.shape[1]
    p_drafts_BN = p_BMV[:, :num_drafts].gather(2, drafts_BN[..., None]).squeeze(2)
    q_drafts_BN = q_BNV.gather(2, drafts_BN[..., None]).squeeze(2)
    passed_BN = uniforms_BM[:, :num_drafts] * q_drafts_BN < p_drafts_BN
    accepted_B = passed_BN.long().cumprod(1).sum(1)
    rows_B = torch.arange(len(drafts_BN), device=drafts_BN.device)
    p_BV = p_BMV[rows_B, accepted_B]
    q_BV = torch.cat([q_BNV, torch.zeros_like(p_BMV[:, :1])], dim=1)[rows_B, accepted_B]  # nothing behind the last
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # p and q can only be equal, up to rounding, where a draft of probability zero was refused.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    return accepted_B, choose(rest_BV, uniforms_BM[:, num_drafts])


class SpeculativeDecoder:
    """Implements `rollout.decoding.Decoder`: between 1 and N + 1 tokens per step and sample.

    Module k at position i combines h^{k-1}_i with token i + k. With n tokens behind the main model and token n chosen,
    what module k computed for i > n - k rests on drafts, so the drafts' cache keeps n - N + 1 positions and computes
    the rest again in the next step, from the main model's hidden states, which are kept for that.
    """

    def __init__(
        self,
        model: DeepseekV3ForCausalLM,
        contexts: Sequence[Sequence[int]],
        params: SamplingParams,
        room: int,
        num_drafts: int,
        count: DraftCount,
    ) -> None:
        """`room` bounds a sequence's tokens, `num_drafts` is N; `count` is added to."""
        self.model = model
        self.modules = model.model.prediction_modules()[:num_drafts]
        assert len(self.modules) == num_drafts, f"{num_drafts} drafts need as many modules, got {len(self.modules)}"
        self.params = params
        self.count = count
        self.is_first = True
        capacity = room + num_drafts + 1  # drafts may reach beyond the last token that is kept
        start = prefill(model, contexts, capacity)
        self.cache, self.context_experts = start.cache, start.experts
        ids_T, hidden_TD, layout = start.ids_T, start.hidden_TD, start.layout
        self.ids_BS = ids_T.new_zeros(len(contexts), capacity + num_drafts)
        self.ids_BS[:, : max(layout.lengths)] = layout.pad(ids_T)
        self.hidden_BSD = hidden_TD.new_zeros(len(contexts), capacity, hidden_TD.shape[1])
        self.hidden_BSD[:, : max(layout.lengths)] = layout.pad(hidden_TD)
        self.draft_cache = self._prefill_drafts(ids_T, hidden_TD, layout, capacity)

    def _prefill_drafts(self, ids_T: Tensor, hidden_TD: Tensor, layout: SequenceLayout, room: int) -> LatentCache:
        """The modules over the prompts. Module k lacks its token for the last k positions: those get any, and go."""
        cache = LatentCache(
            self.model.config,
            len(layout.lengths),
            room,
            dtype=hidden_TD.dtype,
            device=hidden_TD.device,
            layers=[module.self_attn.layer for module in self.modules],
        )
        rope = self.model.model.rope(layout.positions_T, hidden_TD.dtype)
        for depth, module in enumerate(self.modules, 1):
            ahead_TD = self.model.model.embed_tokens(ids_T.roll(-depth))
            hidden_TD, _ = module.predict(ahead_TD, hidden_TD, rope, layout, cache)
        lengths_B = torch.tensor(layout.lengths, device=hidden_TD.device)
        cache.advance(lengths_B)
        cache.truncate((lengths_B - len(self.modules)).clamp(min=0))
        return cache

    def select(self, rows: Tensor) -> None:
        self.ids_BS, self.hidden_BSD = self.ids_BS[rows], self.hidden_BSD[rows]
        self.cache.select(rows)
        self.draft_cache.select(rows)

    def join(self, other: "SpeculativeDecoder") -> None:
        assert not self.is_first and not other.is_first, "there is no token behind the prompts yet"
        self.ids_BS, self.hidden_BSD = (
            join_rows(self.ids_BS, other.ids_BS),
            join_rows(self.hidden_BSD, other.hidden_BSD),
        )
        self.cache.join(other.cache)
        self.draft_cache.join(other.draft_cache)

    def step(self, active: Sequence[Running]) -> None:
        if self.is_first:
            self._step_behind_prompts(active)
        else:
            self._step_with_drafts(active)
        self.is_first = False

    def _step_behind_prompts(self, active: Sequence[Running]) -> None:
        """Token n of each prompt: there is nothing to draft from yet."""
        rows_B, lengths_B, temperature = torch.arange(len(active)), self.cache.lengths_B, self.params.temperature
        logprobs_BV = log_distribution(self.model.lm_head, self.hidden_BSD[rows_B, lengths_B - 1], self.params)
        ids_B = choose(probabilities(logprobs_BV, temperature), next_uniforms(active, 1)[:, 0])
        self.ids_BS[rows_B, lengths_B] = ids_B
        self._record(active, logprobs_BV[:, None], ids_B[:, None], torch.zeros_like(ids_B), None)

    def _step_with_drafts(self, active: Sequence[Running]) -> None:
        """Drafts behind token n, verifies them and itself in one pass, and keeps what was accepted and one more."""
        num_drafts, temperature = len(self.modules), self.params.temperature
        draws_BX = next_uniforms(active, 2 * num_drafts + 1)
        q_BNV = self._draft(draws_BX[:, :num_drafts])
        rows_B1, lengths_B = torch.arange(len(active))[:, None], self.cache.lengths_B
        positions_BM = self.cache.next_positions(num_drafts + 1)
        given_BM = self.ids_BS[rows_B1, positions_BM]  # token n and the drafts
        output = self.model.decode(given_BM, self.cache)
        hidden_BMD = output.hidden_TD.unflatten(0, positions_BM.shape)
        self.hidden_BSD[rows_B1, positions_BM] = hidden_BMD
        logprobs_BMV = log_distribution(self.model.lm_head, hidden_BMD, self.params)
        p_BMV = probabilities(logprobs_BMV, temperature)
        accepted_B, next_B = accept(p_BMV, q_BNV, given_BM[:, 1:], draws_BX[:, num_drafts:])
        self.ids_BS[rows_B1, (lengths_B + accepted_B + 1)[:, None]] = next_B[:, None]
        self.cache.truncate(lengths_B + accepted_B + 1)
        self.count.num_drafted += given_BM[:, 1:].numel()
        self.count.num_accepted += int(accepted_B.sum())
        experts_TLK = pack_ids(output.expert_ids, self.model.config.n_routed_experts)
        self._record(active, logprobs_BMV, self.ids_BS[rows_B1, positions_BM + 1], accepted_B, experts_TLK)

    def _draft(self, draws_BN: Tensor) -> Tensor:
        """Writes N drafted tokens behind token n into `ids_BS`; the distributions they came from, [B, N, V]."""
        temperature = self.params.temperature
        lengths_B, starts_B = self.cache.lengths_B, self.draft_cache.lengths_B
        positions_BM = self.draft_cache.next_positions(int((lengths_B - starts_B).max()))
        rows_B = torch.arange(len(positions_BM))
        hidden_TD = self.hidden_BSD[rows_B[:, None], positions_BM].flatten(0, 1)
        rope = self.model.model.rope(positions_BM.flatten(), hidden_TD.dtype)
        distributions = []
        for depth, module in enumerate(self.modules, 1):
            ahead_BM = self.ids_BS.gather(1, positions_BM + depth)
            embedded_TD = self.model.model.embed_tokens(ahead_BM.flatten())
            hidden_TD = module.predict_cached(embedded_TD, hidden_TD, rope, self.draft_cache)
            last_BD = hidden_TD.unflatten(0, positions_BM.shape)[rows_B, lengths_B - 1 - starts_B]
            q_BV = probabilities(log_distribution(self.model.lm_head, last_BD, self.params), temperature)
            self.ids_BS[rows_B, lengths_B + depth] = choose(q_BV, draws_BN[:, depth - 1])
            distributions.append(q_BV)
        self.draft_cache.advance(positions_BM.shape[1])
        self.draft_cache.truncate((lengths_B - len(self.modules) + 1).clamp(min=0))
        return torch.stack(distributions, dim=1)

    def _record(
        self,
        active: Sequence[Running],
        logprobs_BMV: Tensor,
        ids_BM: Tensor,
        accepted_B: Tensor,
        experts_TLK: np.ndarray | None,
    ) -> None:
        """Gives each sample its accepted tokens and the one behind them, up to a stop token or its budget.

        `experts_TLK` belong to the tokens given to the model, B times M: each is the one before a new token.
        """
        logprobs_BM = logprobs_BMV.gather(2, ids_BM[..., None]).squeeze(2).tolist()
        kept_BM = kept_tokens(logprobs_BMV.flatten(0, 1)) if self.params.is_restricted else None
        for row, (sample, ids) in enumerate(zip(active, ids_BM.tolist(), strict=True)):
            for j in range(int(accepted_B[row]) + 1):
                sample.append(ids[j], logprobs_BM[row][j], self.params)
                given = row * len(ids) + j
                if kept_BM is not None:
                    sample.kept.append(kept_BM[given])
                if experts_TLK is not None:
                    sample.experts.append(experts_TLK[given : given + 1])
                if sample.finish_reason is not None:
                    break
