"""Token sequences in flat arrays, and micro-batches cut from them: what supervised training reads its data from.

A list of Python integers takes 36 bytes a token and a millisecond per thousand to pack; these arrays take 5 bytes, and
a micro-batch of 65,536 tokens is ready in a few milliseconds.

Shapes: W tokens of all sequences end to end, T tokens of a micro-batch, N trained ones among them.

    store = TokenStore.of([([5, 6, 7], [False, True, True])])
    for places in store.micro_batches(range(len(store)), token_budget=8192):
        batch = store.batch(places, weight=1 / store.num_trained)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models import SequenceLayout
from models.moves import moved


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Packed tensors of several sequences: what one forward and backward pass takes."""

    ids_T: Tensor
    """[T] token ids, sequences end to end."""
    layout: SequenceLayout
    """Where each sequence stands."""
    predictors_N: Tensor
    """[N] index into T of the token that predicts each trained one, which stands behind it."""
    targets_N: Tensor
    """[N] the trained tokens."""
    weights_N: Tensor
    """[N] float32, the weight of each in the loss."""

    def to(self, device: torch.device) -> "TokenBatch":
        return moved(self, device)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStore:
    """Sequences of tokens with a mark on those to be trained."""

    ids_W: np.ndarray
    """[W] int32 token ids, sequences end to end."""
    trained_W: np.ndarray
    """[W] bool, True on tokens to train; never on the first of a sequence, which nothing predicts."""
    starts: np.ndarray
    """[sequences + 1] int64, index of each sequence's first token, and W."""

    @classmethod
    def of(cls, sequences: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]]) -> "TokenStore":
        """From the ids and the marks of each sequence."""
        pairs = [(np.asarray(ids, np.int32), np.asarray(mask, np.bool_)) for ids, mask in sequences]
        ids, marks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
        assert [len(part) for part in ids] == [len(part) for part in marks], "ids and marks differ in length"
        return cls._end_to_end(ids, marks)

    @classmethod
    def of_texts(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> "TokenStore":
        """All tokens of each sequence but its first are trained."""
        ids = [np.asarray(sequence, np.int32) for sequence in sequences]
        return cls._end_to_end(ids, [np.arange(len(part)) > 0 for part in ids])

    @classmethod
    def _end_to_end(cls, ids: list[np.ndarray], marks: list[np.ndarray]) -> "TokenStore":
        assert all(len(part) for part in ids), "a sequence has no token"
        assert not any(part[0] for part in marks), "the first token has nothing before it to be predicted from"
        nothing = np.zeros(0, np.int32)
        return cls(
            ids_W=np.concatenate([*ids, nothing]),
            trained_W=np.concatenate([*marks, nothing.astype(np.bool_)]),
            starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        )

    def part(self, places: Sequence[int]) -> "TokenStore":
        """These sequences alone."""
        spans = [self._span(place) for place in places]
        return self._end_to_end([self.ids_W[span] for span in spans], [self.trained_W[span] for span in spans])

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] tokens of each."""
        return np.diff(self.starts)

    @property
    def num_trained(self) -> int:
        return int(self.trained_W.sum())

    def tokens_in(self, places: Sequence[int]) -> int:
        """Tokens of these sequences."""
        return int((self.starts[np.add(places, 1)] - self.starts[places]).sum())

    def trained_in(self, places: Iterable[int]) -> int:
        """Trained tokens of these sequences."""
        return sum(int(np.count_nonzero(self.trained_W[self._span(place)])) for place in places)

    def _span(self, place: int) -> slice:
        return slice(self.starts[place], self.starts[place + 1])

    def micro_batches(self, places: Iterable[int], token_budget: int) -> list[list[int]]:
        """The sequences divided into parts of at most `token_budget` tokens: longest first, each into the first part
        where it fits. Raises ValueError if one alone exceeds the budget."""
        groups: list[list[int]] = []
        room: list[int] = []
        sizes = [(int(self.starts[place + 1] - self.starts[place]), place) for place in places]
        for length, place in sorted(sizes, key=lambda size: -size[0]):
            if length > token_budget:
                raise ValueError(f"a sample of {length} tokens exceeds token_budget={token_budget}; raise the budget")
            at = next((i for i, free in enumerate(room) if free >= length), len(groups))
            if at == len(groups):
                groups.append([])
                room.append(token_budget)
            groups[at].append(place)
            room[at] -= length
        return groups

    def batch(self, places: Sequence[int], weight: float) -> TokenBatch:
        """The sequences packed in this order; every trained token gets `weight` in the loss."""
        spans = [self._span(place) for place in places]
        ids_T = torch.from_numpy(np.concatenate([self.ids_W[span] for span in spans]).astype(np.int64))
        trained_N = torch.from_numpy(np.concatenate([self.trained_W[span] for span in spans]).nonzero()[0])
        return TokenBatch(
            ids_T=ids_T,
            layout=SequenceLayout.from_lengths([span.stop.item() - span.start.item() for span in spans]),
            predictors_N=trained_N - 1,
            targets_N=ids_T[trained_N],
            weights_N=torch.full((len(trained_N),), weight),
        )
