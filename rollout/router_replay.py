"""The experts that each token used in rollout, as they travel to the learner, which replays them (arXiv:2510.11370).

A completion carries [prompt + completion - 1, layers with experts, K] ids: the last sampled token never passes the
model. A row and layer that was not recorded (a request that was preempted, say) is filled with the largest number of
its type and is left to the learner's own router; a token that passed the model twice counts with the last time.

Shapes: T packed tokens, L layers with experts in their order, K experts per token.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor


def id_dtype(num_experts: int, top_k: int) -> np.dtype:
    """uint8 or uint16, whichever still leaves unrecorded rows recognisable.

    With 256 experts 255 is one of them, but no token uses it K times, so for K > 1 a byte is enough.
    """
    return np.dtype(np.uint8 if num_experts <= (256 if top_k > 1 else 255) else np.uint16)


def pack_ids(ids_by_layer: Mapping[int, Tensor], num_experts: int) -> np.ndarray | None:
    """Layer -> [T, K] ids of one pass as [T, L, K] in the small type; None for a model without experts."""
    if not ids_by_layer:
        return None
    layers = [ids_by_layer[layer].cpu().numpy() for layer in sorted(ids_by_layer)]
    return np.stack(layers, axis=1).astype(id_dtype(num_experts, layers[0].shape[-1]))


def unrecorded(num_rows: int, num_layers: int, top_k: int, num_experts: int) -> np.ndarray:
    """[T, L, K] of rows without a recording."""
    dtype = id_dtype(num_experts, top_k)
    return np.full((num_rows, num_layers, top_k), np.iinfo(dtype).max, dtype)


def is_recorded(expert_ids: np.ndarray) -> np.ndarray:
    """[T, L, K] -> [T, L] bool."""
    return (expert_ids != np.iinfo(expert_ids.dtype).max).any(axis=-1)
