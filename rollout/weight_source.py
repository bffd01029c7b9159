"""The sender's side of a sync: the model's tensors in chunks of bounded size, and the manifest written on the way.

deliver(WeightSource(model), version=3, post=call_here(engine))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models import CausalLM, hf_tensors
from models.parallel import whole
from rollout.engine import WeightStream
from rollout.manifest import Manifest, TensorRecord, differences, records, refuse

Post = Callable[[str, Any], Callable[[], object]]
"""Starts a method of every engine, given its name and its one argument; what it returns waits for them all, and raises
what one of them raised."""


class WeightSource:
    """(checkpoint name, whole tensor) of a model, layer by layer, experts split; may be iterated again and again.

    Parameters sharded by FSDP2 are gathered one at a time, so at most one layer exists whole beside the shards.
    Gathering is collective: every rank iterates, and the ranks that do not send drop what they get.
    """

    def __init__(self, model: CausalLM, dtype: torch.dtype | None = None) -> None:
        """Parameters that are sharded are rounded to `dtype` before they are gathered, as they are for computing."""
        self._model, self._dtype = model, dtype

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return hf_tensors(self._model, lambda tensor: whole(tensor, self._dtype))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tensors of one version, by reference: for engines in this process."""

    version: int
    names: list[str]
    tensors: list[Tensor]

    def open(self, mailbox: object) -> list[Tensor]:
        return self.tensors


def chunks(weights: WeightStream, version: int, max_bytes: int) -> Iterator[Chunk]:
    """Groups the stream, in its order, into chunks of at most `max_bytes`; a larger tensor is a chunk of its own."""
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for name, tensor in weights:
        if names and size + tensor.nbytes > max_bytes:
            yield Chunk(version, names, tensors)
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor.detach())
        size += tensor.nbytes
    if names:
        yield Chunk(version, names, tensors)


class Link(Protocol):
    """A way for chunks to reach the engines."""

    chunk_bytes: int
    """Largest chunk; about so much memory is taken at a time."""

    def send(self, chunk: Chunk, post: Post) -> None:
        """Returns when every engine has loaded the chunk, and nothing of it is in use any more."""
        ...

    def close(self) -> None:
        """Frees what the link held for this sync."""
        ...


class ByReference:
    """For an engine in this process: nothing is copied."""

    chunk_bytes = 64 * 2**20

    def send(self, chunk: Chunk, post: Post) -> None:
        post("receive_weights", chunk)()

    def close(self) -> None:
        pass


def deliver(
    weights: WeightStream, version: int, post: Post, link: Link | None = None, same_as: Manifest | None = None
) -> Manifest:
    """One complete sync. Raises SyncError, or what a step raised; engines then refuse to sample until one succeeds.

    `same_as` is for repeating a sync: the weights must be those of that manifest still.
    """
    link = link or ByReference()
    sent: dict[str, TensorRecord] = {}
    post("start_weights", version)()
    try:
        for chunk in chunks(weights, version, link.chunk_bytes):
            sent |= records(chunk.names, chunk.tensors)
            link.send(chunk, post)
        if same_as is not None:
            refuse(differences(same_as.tensors, sent), f"the learner no longer has the weights of version {version}")
        post("finish_weights", Manifest(version, sent))()
    finally:
        link.close()
    return Manifest(version, sent)


def call_here(engine: object) -> Post:
    """The `Post` of an engine in this process."""

    def post(method: str, argument: Any) -> Callable[[], object]:
        result = getattr(engine, method)(argument)
        return lambda: result

    return post
