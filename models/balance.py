"""Expert load balancing: the bias that steers the router without a loss, the loss beside it, and how to see the load.

Shapes: T tokens, E routed experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.moe import Router, Routing
from models.packing import SequenceLayout


@torch.no_grad()
def update_correction_bias(router: Router, counts_E: Tensor, speed: float) -> None:
    """Auxiliary-loss-free balancing (arXiv:2408.15664): b_e += speed * sign(mean(counts) - counts_e).

    Call once per optimizer step with the slots routed to each expert over the whole global batch. Pretraining of
    DeepSeek-V3 used speed 0.001, and 0 at the end. During RL the bias stays frozen: a bias that moves between rollout
    and update makes the learner another policy than the one that sampled.
    """
    counts_E = counts_E.to(router.e_score_correction_bias)
    router.e_score_correction_bias += speed * torch.sign(counts_E.mean() - counts_E)


def sequence_balance_loss(routing: Routing, layout: SequenceLayout) -> Tensor:
    """Sequence-wise balance loss of DeepSeek-V3 (arXiv:2412.19437 eq. 17 to 20), without its factor alpha.

    Per sequence sum_e f_e P_e, with f_e = E / (K T) * (tokens that chose e) and P_e the mean of the scores normalised
    per token; the mean over sequences. 1 under perfect balance. f carries no gradient.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    top_k = routing.ids_TK.shape[1]
    lengths_B = torch.tensor(layout.lengths, device=routing.ids_TK.device)
    sequence_T = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
    chosen_TE = F.one_hot(routing.ids_TK, num_experts).sum(1).float()
    normalised_TE = routing.scores_TE / (routing.scores_TE.sum(-1, keepdim=True) + 1e-20)

    def mean_per_sequence(x_TE: Tensor) -> Tensor:
        sums_BE = x_TE.new_zeros(len(lengths_B), num_experts).index_add(0, sequence_T, x_TE)
        return sums_BE / lengths_B[:, None]

    fractions_BE = mean_per_sequence(chosen_TE).detach() * num_experts / top_k
    return (fractions_BE * mean_per_sequence(normalised_TE)).sum(-1).mean()


def count_experts(routing: Routing) -> Tensor:
    """[E] how many tokens used each expert; without the wait for the GPU that `bincount` brings."""
    ids = routing.ids_TK.flatten()
    return ids.new_zeros(routing.scores_TE.shape[1]).scatter_add_(0, ids, torch.ones_like(ids))


def load_metrics(counts_LE: dict[int, Tensor]) -> dict[str, float]:
    """How evenly the experts of all layers are used, from the slots routed to each; empty without experts.

    `max_violation` is the largest load over the mean load, minus 1 (arXiv:2408.15664); `experts_used` is the share of
    experts with at least a tenth of the mean load, `dead_experts` the number without a single token; `load_entropy` is
    the entropy of the load over that of an even load, averaged over layers.
    """
    if not counts_LE:
        return {}
    shares_LE = torch.stack([counts_E / counts_E.sum() for counts_E in counts_LE.values()])
    num_experts = shares_LE.shape[1]
    entropy_L = -(shares_LE * shares_LE.clamp(min=1e-30).log()).sum(-1)
    even = torch.log(torch.tensor(float(num_experts))).clamp(min=1e-30)
    return {
        "moe/max_violation": shares_LE.max().item() * num_experts - 1,
        "moe/experts_used": (shares_LE * num_experts > 0.1).float().mean().item(),
        "moe/dead_experts": float((shares_LE == 0).sum()),
        "moe/load_entropy": (entropy_L / even).mean().item(),
    }
