"""The engine's side of a sync: checks what arrives, loads it, checks what is held, and refuses to sample in between.

Both engines are receivers; they add how tensors are loaded and which can be read back.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rollout.engine import WeightStream
from rollout.manifest import Manifest, SyncError, TensorRecord, differences, fingerprints, records, refuse
from rollout.weight_source import Chunk, Delivered, call_here, deliver, model_of
from rollout.weight_transport import GroupAddress, Mailbox, Packed

Part = Literal["weights", "kv_cache"]
Held = tuple[str, str, Tensor]
"""Checkpoint name, the place where the engine holds it, and the tensor there in the checkpoint's shape."""


class WeightReceiver:
    """A sync is `start_weights`, any number of `receive_weights`, `finish_weights`; the last makes it usable again.

    An engine implements `_load` and `_held`, and the rest where it has something to do there.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """`shapes`: every tensor the model needs, by checkpoint name. `device`: where tensors are to arrive."""
        self.version = 0
        self._delivered: Delivered | None = None
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._mailbox = Mailbox(device)
        self._receiving: int | None = None
        self._unusable: str | None = None
        self._arrived: dict[str, TensorRecord] = {}
        # What the last sync brought, until something touches it; and during a sync, what of that has not come anew.
        self._complete: dict[str, TensorRecord] = {}
        self._staying: dict[str, TensorRecord] = {}
        self._to_hold: dict[tuple[str, torch.dtype], TensorRecord] = {}
        # The dtypes in which a tensor is held, for what can be read back; an engine may cast what arrives.
        self._held_dtypes: dict[str, set[torch.dtype]] = {}

    def load_weights(self, weights: WeightStream, version: int) -> None:
        """A whole sync from a stream in this process."""
        deliver(weights, version, call_here(self), last=self._delivered)
        self._delivered = Delivered(version, model_of(weights))

    def join_weight_group(self, address: GroupAddress) -> None:
        """Meets the sender, for weights that come by broadcast."""
        self._mailbox.join(address)

    def start_weights(self, version: int) -> int | None:
        """The version that the engine has whole from an earlier sync, None if it has none."""
        self._arrived = {}
        self._staying, had_version = self._complete, self.version if self._complete else None
        self.reject_weights(f"its weights are half replaced: the sync of version {version} did not complete")
        self._receiving = version
        self._begin_load()
        return had_version

    @torch.no_grad()
    def receive_weights(self, message: Chunk | Packed) -> None:
        """Loads a chunk. Raises SyncError for a tensor of another version, unexpected, misshapen or given twice."""
        tensors = message.open(self._mailbox)  # first of all: in a broadcast the others wait for this engine
        self._check_chunk(message.version, message.names, tensors)
        self._arrived |= records(message.names, tensors)
        for name, tensor in zip(message.names, tensors, strict=True):
            self._staying.pop(name, None)
            for dtype in self._held_dtypes.get(name, ()):
                self._to_hold.pop((name, dtype), None)  # of an earlier sync
                if dtype != tensor.dtype:
                    self._to_hold[name, dtype] = records([name], [tensor.to(dtype)])[name]
        self._load(list(zip(message.names, tensors, strict=True)))

    def _check_chunk(self, version: int, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        if version != self._receiving:
            raise SyncError(f"tensors of version {version} arrived in the sync of version {self._receiving}")
        problems = []
        seen = set(self._arrived)
        for name, tensor in zip(names, tensors, strict=True):
            if name in seen:
                problems.append(f"given twice {name}")
            elif name not in self._shapes:
                problems.append(f"unexpected {name}")
            elif list(tensor.shape) != self._shapes[name]:
                problems.append(f"{name} has shape {list(tensor.shape)}, the engine needs {self._shapes[name]}")
            seen.add(name)
        refuse(problems, f"weights of version {version} do not fit the engine's model")

    @torch.no_grad()
    def finish_weights(self, manifest: Manifest) -> None:
        """Ends a sync. Raises SyncError if anything is missing, or arrived or is held otherwise than it was sent."""
        if manifest.version != self._receiving:
            raise SyncError(f"a manifest of version {manifest.version} ends the sync of version {self._receiving}")
        present = {name: record for name, record in self._staying.items() if name in manifest.tensors} | self._arrived
        missing = [f"missing {name}" for name in self._shapes if name not in present]
        refuse(missing, f"weights of version {manifest.version} are not complete")
        refuse(differences(manifest.tensors, present), f"weights of version {manifest.version} arrived altered")
        self._end_load()
        self._check_held(manifest)
        self._mailbox.close()
        self._receiving, self._unusable = None, None
        self._complete, self._staying, self._arrived = present, {}, {}
        self.version = manifest.version

    def _check_held(self, manifest: Manifest) -> None:
        held: list[tuple[str, str, torch.dtype]] = []

        def tensors() -> Iterator[Tensor]:
            for name, place, tensor in self._held():
                held.append((name, place, tensor.dtype))
                yield tensor

        problems = []
        for found, (name, place, dtype) in zip(fingerprints(tensors()), held, strict=True):
            wanted = self._to_hold.get((name, dtype), manifest.tensors[name])
            if found != wanted.fingerprint:
                problems.append(f"{name} in {place}")
        refuse(problems, f"after the sync of version {manifest.version} the engine holds other values than were sent")

    def reject_weights(self, reason: str) -> None:
        """Makes the engine refuse to sample until the next complete sync, with `reason` in the error."""
        self._unusable, self._complete = reason, {}

    def check_usable(self) -> None:
        """Raises SyncError if the engine's weights are not whole and checked."""
        if self._unusable is not None:
            raise SyncError(f"this engine must not sample: {self._unusable}; a complete sync makes it usable again")

    def sleep(self, _: None = None) -> None:
        """Gives its accelerator memory to the learner. Nothing to give on a CPU, where this does nothing."""

    def wake(self, part: Part) -> None:
        """Takes memory back: `weights` before a sync, `kv_cache` after it."""

    def _begin_load(self) -> None:
        """Makes ready for tensors; a load that broke off earlier may lie around."""

    def _load(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Takes the tensors, whose names and shapes are right; they stay valid as long as they are referenced."""
        raise NotImplementedError

    def _end_load(self) -> None:
        """All tensors have been loaded."""

    def _held(self) -> Iterable[Held]:
        """What can be read back, one at a time."""
        raise NotImplementedError
