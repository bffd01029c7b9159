"""How chunks of weights cross between processes: by value, through CUDA IPC, or by broadcast.

| link | learner and engine | what moves |
| --- | --- | --- |
| `ByValue` | any two processes, CPU | arrays, which Ray keeps in shared memory for all engines of a host |
| `CudaIpc` | one GPU | a copy into a staging buffer that the engine maps |
| `Broadcast` | own GPUs (NCCL), or CPUs (gloo) | the staging buffer, once to all engines |

A chunk is acknowledged before the next is sent, so memory is bounded by a chunk on each side.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rollout.weight_source import Chunk, Post

c10d: Any = torch.distributed  # its stubs leave out what is used here

ALIGNMENT = 256
"""Bytes; tensors start at multiples of it in a staging buffer, as the CUDA allocator places them."""


class Message(Protocol):
    """A chunk as an engine gets it."""

    @property
    def version(self) -> int: ...
    @property
    def names(self) -> list[str]: ...

    def open(self, mailbox: "Mailbox") -> list[Tensor]:
        """The tensors, in the order of the names; they stay valid as long as they are referenced."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a chunk lie in a buffer of bytes."""

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    starts: list[int]
    num_bytes: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Layout":
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return Layout([t.shape for t in tensors], [t.dtype for t in tensors], starts, end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a uint8 buffer, not copied."""
        return [
            buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, start in zip(self.shapes, self.dtypes, self.starts, strict=True)
        ]

    def pack(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)


@dataclass(frozen=True, slots=True)
class ArrayMessage:
    """Carries the values themselves, as arrays of bytes: NumPy knows no bfloat16."""

    version: int
    names: list[str]
    arrays: list[np.ndarray]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    def open(self, mailbox: "Mailbox") -> list[Tensor]:
        with warnings.catch_warnings():
            # Ray's shared memory is read-only, which torch warns of; nobody writes to what arrived.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = [torch.from_numpy(array) for array in self.arrays]
        tensors = [f.view(d).view(s) for f, d, s in zip(flat, self.dtypes, self.shapes, strict=True)]
        return [tensor.to(mailbox.device) for tensor in tensors]


class ByValue:
    """Ray's object store keeps each array once per host, in shared memory, and engines read it in place.

    Measured on 2 cores, 1 GiB in chunks of 64 MiB: 0.40 s, as much as through a segment of shared memory of our own.
    """

    chunk_bytes = 64 * 2**20

    def send(self, chunk: Chunk, post: Post) -> None:
        flat = [tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy() for tensor in chunk.tensors]
        shapes, dtypes = [t.shape for t in chunk.tensors], [t.dtype for t in chunk.tensors]
        post("receive_weights", ArrayMessage(chunk.version, chunk.names, flat, shapes, dtypes))()

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class IpcMessage:
    """Names a staging buffer on the GPU that sender and engine share."""

    version: int
    names: list[str]
    layout: Layout
    gpu: str
    handle: tuple[Any, ...]

    def open(self, mailbox: "Mailbox") -> list[Tensor]:
        # Copied, because the next chunk overwrites the buffer while vLLM still waits for the rest of a layer.
        return self.layout.views(mailbox.map(self.gpu, self.handle)[: self.layout.num_bytes].clone())


class CudaIpc:
    """One staging buffer, exported once per sync and used for every chunk.

    vLLM 0.25.1's own `ipc` backend maps and unmaps the buffer with every chunk, against one export: the count of users
    falls below zero and a buffer is lost per sync (fixed later by its `PackedBufferImporter`). Ours maps it once. There
    is one engine on the GPU, since each export may be mapped once.
    """

    chunk_bytes = 2**30

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._exported: tuple[str, tuple[Any, ...]] = ("", ())

    def send(self, chunk: Chunk, post: Post) -> None:
        layout = Layout.of(chunk.tensors)
        if self._buffer is None or self._buffer.numel() < layout.num_bytes:  # one tensor may exceed a chunk
            size = max(layout.num_bytes, self.chunk_bytes)
            self._buffer = torch.empty(size, dtype=torch.uint8, device=chunk.tensors[0].device)
            self._exported = export_cuda(self._buffer)
        layout.pack(chunk.tensors, self._buffer)
        wait_for(self._buffer.device)
        post("receive_weights", IpcMessage(chunk.version, chunk.names, layout, *self._exported))()

    def close(self) -> None:
        self._buffer = None
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # returns the buffer, which the engine unmapped at the end of the sync


def wait_for(device: torch.device) -> None:
    """Until what was started on the device is done; another process is about to look."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def export_cuda(buffer: Tensor) -> tuple[str, tuple[Any, ...]]:
    """(GPU, handle) with which another process maps the buffer."""
    _, handle = reduce_tensor(buffer)
    return gpu_of(buffer.device), handle


def map_cuda(handle: tuple[Any, ...], device: torch.device) -> Tensor:
    """The buffer of another process. The device's number may be another one here than there."""
    arguments = list(handle)
    arguments[6] = device.index
    return rebuild_cuda_tensor(*arguments)


def gpu_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def open_store(size: int) -> Any:
    """Where the members of a broadcast group, this process among them, find each other; its `port` is its address."""
    return c10d.TCPStore("0.0.0.0", 0, size, is_master=True, wait_for_workers=False)


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where sender (rank 0) and engines meet for broadcasts."""

    host: str
    port: int
    rank: int
    size: int
    backend: str
    """`nccl` or `gloo`."""

    def connect(self, store: Any = None) -> Any:
        """Waits for all ranks. A group of its own: the learner's default process group is left alone."""
        timeout = timedelta(minutes=10)
        store = store or c10d.TCPStore(self.host, self.port, self.size, is_master=False, timeout=timeout)
        if self.backend == "nccl":
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return c10d.ProcessGroupNCCL(store, self.rank, self.size, options)
        return c10d.ProcessGroupGloo(store, self.rank, self.size, timeout)


@dataclass(frozen=True, slots=True)
class BroadcastMessage:
    """Announces a broadcast from rank 0."""

    version: int
    names: list[str]
    layout: Layout

    def open(self, mailbox: "Mailbox") -> list[Tensor]:
        return self.layout.views(mailbox.receive(self.layout.num_bytes))


class Broadcast:
    """Every chunk once to all engines.

    vLLM's own `nccl` backend hands what it receives straight to the model, so nothing could be checked on arrival, and
    its sender differs between 0.25.1 and 0.26. A dead engine leaves the others waiting: the caller's watchdog ends it.
    """

    chunk_bytes = 2**29

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, chunk: Chunk, post: Post) -> None:
        layout = Layout.of(chunk.tensors)
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=chunk.tensors[0].device)
        layout.pack(chunk.tensors, buffer)
        wait = post("receive_weights", BroadcastMessage(chunk.version, chunk.names, layout))
        broadcast(self._group, buffer)
        wait()

    def close(self) -> None:
        pass


def broadcast(group: Any, buffer: Tensor) -> None:
    """Fills every rank's buffer from rank 0's."""
    options = c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([buffer], options).wait()
    wait_for(buffer.device)


class Mailbox:
    """What an engine keeps between chunks: the mapped staging buffer, and its place in the broadcast group."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mapped: tuple[tuple[Any, ...], Tensor] | None = None
        self._group: Any = None

    def map(self, gpu: str, handle: tuple[Any, ...]) -> Tensor:
        """The sender's staging buffer, mapped once per export. Raises ValueError if it is on another GPU."""
        if gpu != (own := gpu_of(self.device)):
            raise ValueError(
                f"the learner's weights are on GPU {gpu}, the engine is on {own}: CUDA IPC needs one GPU; "
                "use placement 'separate'"
            )
        if self._mapped is None or self._mapped[0] != handle:
            self._mapped = (handle, map_cuda(handle, self.device))
        return self._mapped[1]

    def join(self, address: GroupAddress) -> None:
        self._group = address.connect()

    def receive(self, num_bytes: int) -> Tensor:
        assert self._group is not None, "the engine has not joined the broadcast group"
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        broadcast(self._group, buffer)
        return buffer

    def close(self) -> None:
        """Unmaps the staging buffer."""
        self._mapped = None
