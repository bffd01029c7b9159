"""How chunks of weights cross between processes: packed into a buffer, which moves in one of three ways.

| link | learner and engine | what moves |
| --- | --- | --- |
| `ByValue` | CPUs | the buffer, which Ray keeps in shared memory for all engines of a host |
| `CudaIpc` | one GPU | a handle of the buffer, which the engine maps |
| `Broadcast` | own GPUs (NCCL), or CPUs (gloo) | the buffer, once to all engines |

A chunk is acknowledged before the next is sent, so memory is bounded by a chunk on each side.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rollout.weight_source import Chunk, Post

c10d: Any = torch.distributed  # its stubs leave out what is used here

ALIGNMENT = 256
"""Bytes; tensors start at multiples of it in a buffer, as the CUDA allocator places them."""


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


@dataclass(frozen=True, slots=True)
class Packed:
    """A chunk as it crosses: what is in the buffer, and the buffer or the way to it."""

    version: int
    names: list[str]
    layout: Layout
    carried: Any

    def open(self, mailbox: "Mailbox") -> list[Tensor]:
        """The tensors, in the order of the names; they stay valid as long as they are referenced."""
        return self.layout.views(mailbox.fetch(self.carried, self.layout.num_bytes))


class ByValue:
    """Ray's object store keeps the buffer once per host, in shared memory, and engines read it in place.

    A segment of shared memory of our own took 0.4 s for a GiB where this takes 0.6 (docs/log.md), but reaches no
    other host.
    """

    chunk_bytes = 64 * 2**20

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        layout = Layout.of(chunk.tensors)
        device = self._device(chunk)
        if len(self._buffer) < layout.num_bytes or self._buffer.device != device:  # one tensor may exceed a chunk
            self._buffer = torch.empty(max(layout.num_bytes, self.chunk_bytes), dtype=torch.uint8, device=device)
            self._prepare()
        for view, tensor in zip(layout.views(self._buffer), chunk.tensors, strict=True):
            view.copy_(tensor)
        wait_for(device)
        buffer = self._buffer[: layout.num_bytes]
        wait = post("receive_weights", Packed(chunk.version, chunk.names, layout, self._carried(buffer)))
        self._move(buffer)
        return wait

    def _device(self, chunk: Chunk) -> torch.device:
        return torch.device("cpu")

    def _prepare(self) -> None:
        """There is a new buffer."""

    def _carried(self, buffer: Tensor) -> Any:
        return buffer.numpy()

    def _move(self, buffer: Tensor) -> None:
        """Every engine has been told of the buffer, and none has answered."""

    def close(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)


class CudaIpc(ByValue):
    """The buffer is exported once per sync, and mapped once by the one engine on the GPU.

    vLLM 0.25.1's own `ipc` backend maps and unmaps it with every chunk, against one export: the count of users falls
    below zero and a buffer is lost per sync (later versions have `PackedBufferImporter` against that).
    """

    chunk_bytes = 2**29

    def _device(self, chunk: Chunk) -> torch.device:
        return chunk.tensors[0].device

    def _prepare(self) -> None:
        self._exported = export_cuda(self._buffer)

    def _carried(self, buffer: Tensor) -> Any:
        return self._exported

    def close(self) -> None:
        super().close()
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()  # returns the buffer, which the engine unmapped at the end of the sync


class Broadcast(ByValue):
    """Every chunk once to all engines.

    vLLM's own `nccl` backend hands what it receives straight to the model, so nothing could be checked on arrival, and
    its sender differs between 0.25.1 and 0.26. A dead engine leaves the others waiting: the caller's watchdog ends it.
    """

    chunk_bytes = 2**29

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group = group

    def _device(self, chunk: Chunk) -> torch.device:
        return chunk.tensors[0].device

    def _carried(self, buffer: Tensor) -> Any:
        return None

    def _move(self, buffer: Tensor) -> None:
        broadcast(self._group, buffer)


def wait_for(device: torch.device) -> None:
    """Until what was started on the device is done; another process is about to look."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def export_cuda(buffer: Tensor) -> tuple[str, tuple[Any, ...]]:
    """(GPU, handle) with which another process maps the buffer."""
    return gpu_of(buffer.device), reduce_tensor(buffer)[1]


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


def broadcast(group: Any, buffer: Tensor) -> None:
    """Fills every rank's buffer from rank 0's."""
    options = c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([buffer], options).wait()
    wait_for(buffer.device)


class Mailbox:
    """An engine's end of a link, with what it keeps between chunks: the mapped buffer, its place in the group."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mapped: tuple[tuple[Any, ...], Tensor] | None = None
        self._group: Any = None

    def join(self, address: GroupAddress) -> None:
        self._group = address.connect()

    def fetch(self, carried: Any, num_bytes: int) -> Tensor:
        """A chunk's bytes, on the engine's device. Raises ValueError for CUDA IPC from another GPU."""
        if isinstance(carried, np.ndarray):
            with warnings.catch_warnings():
                # Ray's shared memory is read-only, which torch warns of; nobody writes to what arrived.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                return torch.from_numpy(carried).to(self.device)
        if carried is None:
            assert self._group is not None, "the engine has not joined the broadcast group"
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            broadcast(self._group, buffer)
            return buffer
        # Copied, because the next chunk overwrites the buffer while vLLM still waits for the rest of a layer.
        return self._map(*carried)[:num_bytes].clone()

    def _map(self, gpu: str, handle: tuple[Any, ...]) -> Tensor:
        if gpu != (own := gpu_of(self.device)):
            raise ValueError(
                f"the learner's weights are on GPU {gpu}, the engine is on {own}: CUDA IPC needs one GPU; "
                "use placement 'separate'"
            )
        if self._mapped is None or self._mapped[0] != handle:
            self._mapped = (handle, map_cuda(handle, self.device))
        return self._mapped[1]

    def close(self) -> None:
        """Unmaps the buffer."""
        self._mapped = None
