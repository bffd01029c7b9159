"""The sender's side of a sync: the model's tensors in chunks of bounded size, and the manifest written on the way.

deliver(WeightSource(model), version=3, post=call_here(engine))
"""

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from models import CausalLM, hf_tensors
from models.lora import adapted_modules, has_adapters
from models.parallel import whole
from rollout.engine import WeightStream
from rollout.manifest import Manifest, TensorRecord, differences, records, refuse

Post = Callable[[str, Any], Callable[[], Any]]
"""Starts a method of every engine, given its name and its one argument; what it returns waits for them all, and gives
a list of what they returned, or raises what one of them raised."""


class WeightSource:
    """(checkpoint name, whole tensor) of a model, layer by layer, experts split; may be iterated again and again.

    Parameters sharded by FSDP2 are gathered one at a time, so at most one layer exists whole beside the shards.
    Gathering is collective: every rank iterates, and the ranks that do not send drop what they get. Adapters are merged
    a tensor at a time; `is_frozen` tells which tensors they leave as they were.
    """

    def __init__(self, model: CausalLM, dtype: torch.dtype | None = None) -> None:
        """Parameters that are sharded are rounded to `dtype` before they are gathered, as they are for computing."""
        self.model = weakref.ref(model)
        self._tensors: Callable[[], Iterable[tuple[str, Tensor]]] = lambda: hf_tensors(model, lambda t: whole(t, dtype))
        self._changing = {fused_with(name) for name in adapted_modules(model)} if has_adapters(model) else None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors())

    def is_frozen(self, name: str) -> bool:
        """Whether neither the tensor nor one that an engine may fuse with it is trained."""
        return self._changing is not None and fused_with(name.rsplit(".", 1)[0]) not in self._changing

    def snapshot(self) -> "WeightSource":
        """The same weights as they are now, whatever becomes of the model."""
        copied = copy.copy(self)
        tensors = [(name, tensor if self.is_frozen(name) else tensor.clone()) for name, tensor in self]
        copied._tensors = lambda: tensors
        return copied


def fused_with(module: str) -> str:
    """What an engine may hold in one piece: a block's parts (q, k and v, gate and up), and all experts of a layer.

    `model.layers.0.self_attn.q_proj` -> `model.layers.0.self_attn`, `...mlp.experts.7.up_proj` -> `...mlp.experts`.
    """
    return module if module.endswith(".experts") else re.sub(r"(\.experts)\.\d+$", r"\1", module.rpartition(".")[0])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tensors of one version, by reference: for engines in this process."""

    version: int
    names: list[str]
    tensors: list[Tensor]

    def open(self, mailbox: object) -> list[Tensor]:
        return self.tensors

    def without(self, left_out: Callable[[str], bool]) -> "Chunk":
        kept = [i for i, name in enumerate(self.names) if not left_out(name)]
        return Chunk(self.version, [self.names[i] for i in kept], [self.tensors[i] for i in kept])


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

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        """Starts the engines on the chunk; what it returns waits until all have loaded it, and must be called before
        the next chunk is sent, whose place may be the same."""
        ...

    def close(self) -> None:
        """Frees what the link held for this sync."""
        ...


class ByReference:
    """For an engine in this process: nothing is copied."""

    chunk_bytes = 64 * 2**20

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        return post("receive_weights", chunk)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Delivered:
    """A sync that every engine has completed."""

    version: int
    model: object
    """Of which model, as `model_of` tells."""


def model_of(weights: WeightStream) -> object:
    """Equal for two sources of one model; a stream of other origin is equal to none."""
    return weights.model if isinstance(weights, WeightSource) else object()


def deliver(
    weights: WeightStream,
    version: int,
    post: Post,
    link: Link | None = None,
    same_as: Manifest | None = None,
    last: Delivered | None = None,
) -> Manifest:
    """One complete sync. Raises SyncError, or what a step raised; engines then refuse to sample until one succeeds.

    `same_as` is for repeating a sync: the weights must be those of that manifest still. `last` is the sync before this
    one: if it was of the same model and every engine has it whole, frozen tensors are not sent again. The manifest has
    them all the same, with fingerprints taken now, and the engines look for them in what they hold.
    """
    link = link or ByReference()
    sent: dict[str, TensorRecord] = {}
    held = post("start_weights", version)()
    may_stay = last is not None and last.model == model_of(weights) and all(v == last.version for v in held)
    try:
        for chunk in chunks(weights, version, link.chunk_bytes):
            changed = chunk.without(weights.is_frozen) if may_stay and isinstance(weights, WeightSource) else chunk
            wait = link.send(changed, post) if changed.names else None
            sent |= records(chunk.names, chunk.tensors)  # while the engines are at work
            if wait is not None:
                wait()
        if same_as is not None:
            refuse(differences(same_as.tensors, sent), f"the learner no longer has the weights of version {version}")
        post("finish_weights", Manifest(version, sent))()
    finally:
        link.close()
    return Manifest(version, sent)


def call_here(engine: object) -> Post:
    """The `Post` of an engine in this process."""

    def post(method: str, argument: Any) -> Callable[[], list[Any]]:
        result = getattr(engine, method)(argument)
        return lambda: [result]

    return post
