"""The interface between training and a model, whoever wrote the model.

Shapes: T packed tokens, B sequences, S positions, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, Self

from torch import Tensor, nn

from models.packing import SequenceLayout
from models.transformer import ModelOutput, Replay


class HasVocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


class CausalLM(Protocol):
    """What training and scoring need of a model."""

    @property
    def config(self) -> HasVocabulary: ...

    @property
    def lm_head(self) -> nn.Linear:
        """Its weight [V, D], tied or not, turns hidden states into logits; no bias."""
        ...

    @property
    def shares_beginnings(self) -> bool:
        """Whether it takes layouts in which sequences share their first tokens."""
        ...

    def __call__(self, ids_T: Tensor, layout: SequenceLayout, *, replay: Replay | None = None) -> ModelOutput:
        """Packed token ids -> hidden states after the final norm, and the routing, empty without experts."""
        ...

    def routers(self) -> Mapping[int, nn.Module]:
        """Layer -> router, for the layers that have experts, in order."""
        ...

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Equally long sequences [B, S] -> logits [B, S, V]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
