"""Multi-token prediction (MTP), arXiv:2412.19437 section 2.2: the loss that trains the prediction modules, and the
copies that their checkpoint holds.

The modules themselves are `PredictionModule`s (decoder_layer.py), layers behind the main model's last; embedding and
head are the main model's. Drafting with the modules is rollout/speculative.py.

Shapes: T packed tokens, N tokens with a target, D hidden, V vocabulary.

    output = model(ids_T, layout)
    loss, routing = mtp_loss(model, output, ids_T, layout, weight=0.3)
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.decoder_layer import PredictionModule
from models.head import linear_cross_entropy
from models.moe import MixtureOfExperts, Router, Routing
from models.moves import take_rows
from models.packing import SequenceLayout
from models.transformer import DeepseekV3ForCausalLM, ModelOutput


def mtp_loss(
    model: DeepseekV3ForCausalLM,
    output: ModelOutput,
    ids_T: Tensor,
    layout: SequenceLayout,
    *,
    weight: float,
    target_weights_T: Tensor | None = None,
) -> tuple[Tensor, dict[int, Routing]]:
    """weight / depths * sum_k CE_k, to be added to the main loss, and how each module's layer routed its tokens.

        CE_k = -sum_i w_{i+k+1} log softmax(head h^k_i)[t_{i+k+1}]

    over the tokens i that have k + 1 more behind them in their own sequence; the others do not pass module k at all.
    `target_weights_T` [T] is each token's weight as a target, as in the main loss; without it CE_k is a mean. The
    gradient reaches the main model through its hidden states, embedding and head.
    """
    modules = model.model.prediction_modules()
    assert modules, "the model has no prediction modules: num_nextn_predict_layers is 0"
    lengths_T = torch.tensor(layout.lengths, device=ids_T.device).repeat_interleave(
        torch.tensor(layout.lengths, device=ids_T.device)
    )
    room_T = lengths_T - layout.positions_T - 1  # tokens behind each
    hidden_ND, rows_N = output.hidden_TD, torch.arange(len(ids_T), device=ids_T.device)
    loss, recorded = hidden_ND.new_zeros((), dtype=torch.float32), {}
    for depth, module in enumerate(modules, 1):
        lengths = [length - depth - 1 for length in layout.lengths if length - depth - 1 > 0]
        if not lengths:
            break
        kept_N = (room_T[rows_N] > depth).nonzero().squeeze(1)
        hidden_ND, rows_N = take_rows(hidden_ND, kept_N), rows_N[kept_N]
        shorter = SequenceLayout.from_lengths(lengths, device=ids_T.device)
        hidden_ND, routing = _predict(model, module, ids_T[rows_N + depth], hidden_ND, shorter)
        if routing is not None:
            recorded[module.self_attn.layer] = routing
        targets_N = rows_N + depth + 1
        weights_N = torch.full_like(hidden_ND[:, 0], 1 / len(rows_N), dtype=torch.float32)
        if target_weights_T is not None:
            weights_N = target_weights_T[targets_N]
        loss = loss + linear_cross_entropy(hidden_ND, model.lm_head.weight, ids_T[targets_N], weights_N)
    return loss * (weight / len(modules)), recorded


def _predict(
    model: DeepseekV3ForCausalLM, module: PredictionModule, ids_N: Tensor, hidden_ND: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Routing | None]:
    """One depth over whole sequences: the tokens ahead and h^{k-1} -> h^k and the routing."""
    embedded_ND = model.model.embed_tokens(ids_N)
    rope = model.model.rope(layout.positions_T, embedded_ND.dtype)
    if model.model.checkpoint_layers and torch.is_grad_enabled():
        return checkpoint(module.predict, embedded_ND, hidden_ND, rope, layout, use_reentrant=False)  # type: ignore
    return module.predict(embedded_ND, hidden_ND, rope, layout)


def prediction_routers(model: DeepseekV3ForCausalLM) -> dict[int, Router]:
    """Layer -> router of each prediction module, beside `DeepseekV3ForCausalLM.routers` of the main model."""
    modules = model.model.prediction_modules()
    return {m.self_attn.layer: m.mlp.gate for m in modules if isinstance(m.mlp, MixtureOfExperts)}


def shared_copies(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name and tensor of the embedding and head that each prediction module repeats on disk.

    vLLM reads them from there. In memory there is one of each, the main model's, which is what this yields, detached.
    """
    for module in model.model.prediction_modules():
        prefix = f"model.layers.{module.self_attn.layer}"
        yield f"{prefix}.embed_tokens.weight", model.model.embed_tokens.weight.detach()
        yield f"{prefix}.shared_head.head.weight", model.lm_head.weight.detach()
