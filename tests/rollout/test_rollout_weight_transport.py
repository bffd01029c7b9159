"""Pins how chunks cross: each link brings every dtype and shape bit for bit, and frees what it held.

CUDA IPC's handles are stood in for by a table of buffers on the CPU; what only a GPU can show is marked gpu. Broadcasts
run over gloo, between threads and between processes.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import rollout.weight_transport as transport
from models import hf_tensors
from rollout.manifest import SyncError, records
from rollout.native_engine import ModelReceiver
from rollout.weight_source import Chunk, WeightSource, call_here, deliver
from rollout.weight_transport import Broadcast, ByValue, CudaIpc, GroupAddress, Layout, Mailbox, open_store
from tests.models.test_models_parity import CORNERS, sharp_model

CPU = torch.device("cpu")
TENSORS = {
    "matrix": torch.randn(7, 5),
    "bfloat16": torch.randn(3, 4, 3).bfloat16(),
    "odd": torch.randn(13).half(),
    "one": torch.tensor(2.5),
    "view": torch.randn(6, 8)[:, 2:5],
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
}
CHUNK = Chunk(4, list(TENSORS), list(TENSORS.values()))


class Posted:
    """Stands for one engine elsewhere: keeps what its mailbox opened."""

    def __init__(self) -> None:
        self.mailbox = Mailbox(CPU)
        self.opened: list[Tensor] = []
        self.messages: list[Any] = []

    def post(self, method: str, message: Any) -> Callable[[], object]:
        self.messages.append(message)
        self.opened = message.open(self.mailbox)
        return lambda: None


def is_equal(opened: list[Tensor]) -> bool:
    return records(TENSORS, opened) == records(TENSORS, list(TENSORS.values()))


def test_layouts_are_aligned_and_do_not_overlap() -> None:
    layout = Layout.of(CHUNK.tensors)
    assert all(start % transport.ALIGNMENT == 0 for start in layout.starts)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for view, tensor in zip(layout.views(buffer), CHUNK.tensors, strict=True):
        view.copy_(tensor)
    assert is_equal(layout.views(buffer))


def test_by_value() -> None:
    engine = Posted()
    ByValue().send(CHUNK, engine.post)()
    assert is_equal(engine.opened)
    assert engine.messages[0].names == CHUNK.names and engine.messages[0].version == 4


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """A stand-in for the driver: handle -> exported buffer."""
    exported: dict[int, Tensor] = {}

    def export(buffer: Tensor) -> tuple[str, tuple[Any, ...]]:
        exported[len(exported)] = buffer
        return "GPU-a", (len(exported) - 1,)

    monkeypatch.setattr(transport, "export_cuda", export)
    monkeypatch.setattr(transport, "map_cuda", lambda handle, device: exported[handle[0]])
    monkeypatch.setattr(transport, "gpu_of", lambda device: "GPU-a")
    return exported


def test_one_staging_buffer_serves_every_chunk(table: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    link, engine = CudaIpc(), Posted()
    link.chunk_bytes = 4096
    link.send(CHUNK, engine.post)()
    first = engine.opened
    link.send(Chunk(4, ["zeros"], [torch.zeros(500)]), engine.post)()
    assert is_equal(first), "vLLM may still hold the tensors of an earlier chunk"
    assert len(table) == 1, "one export for all chunks"
    link.send(Chunk(4, ["large"], [torch.ones(5000)]), engine.post)()
    assert len(table) == 2 and torch.equal(engine.opened[0], torch.ones(5000)), "a tensor larger than a chunk"
    link.close()
    link.send(CHUNK, engine.post)()
    assert len(table) == 3 and is_equal(engine.opened), "the next sync has a buffer of its own"


def test_a_buffer_is_mapped_once_per_export(table: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[Any] = []
    monkeypatch.setattr(transport, "map_cuda", lambda handle, device: mapped.append(handle) or table[handle[0]])
    link, engine = CudaIpc(), Posted()
    link.chunk_bytes = 4096
    for _ in range(3):
        link.send(CHUNK, engine.post)()
    assert mapped == [(0,)], "each mapping is counted against the one export"
    engine.mailbox.close()
    link.close()
    link.send(CHUNK, engine.post)()
    assert mapped == [(0,), (1,)]


def test_another_gpu_is_refused(table: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Posted()
    monkeypatch.setattr(transport, "gpu_of", lambda device: "GPU-b")
    with pytest.raises(ValueError, match="on GPU GPU-a, the engine is on GPU-b: CUDA IPC needs one GPU"):
        CudaIpc().send(CHUNK, engine.post)()


def test_broadcasts_reach_every_engine() -> None:
    """Two engines in threads; the sender starts to broadcast before they have answered, or all would wait forever."""
    receivers = [ModelReceiver(sharp_model(CORNERS["plain"])) for _ in range(2)]
    store = open_store(3)
    addresses = [GroupAddress("127.0.0.1", store.port, rank, 3, "gloo") for rank in range(3)]
    joining = [
        threading.Thread(target=receiver.join_weight_group, args=(address,))
        for receiver, address in zip(receivers, addresses[1:], strict=True)
    ]
    for thread in joining:
        thread.start()
    link = Broadcast(addresses[0].connect(store))
    for thread in joining:
        thread.join()

    def post(method: str, argument: Any) -> Callable[[], object]:
        errors: list[BaseException] = []

        def call(receiver: ModelReceiver) -> None:
            try:
                call_here(receiver)(method, argument)
            except SyncError as error:
                errors.append(error)

        threads = [threading.Thread(target=call, args=(receiver,)) for receiver in receivers]
        for thread in threads:
            thread.start()

        def wait() -> None:
            for thread in threads:
                thread.join()
            for error in errors:
                raise error

        return wait

    other = sharp_model(CORNERS["plain"], seed=5)
    link.chunk_bytes = 30_000
    deliver(WeightSource(other), 2, post, link)
    for receiver in receivers:
        assert receiver.version == 2
        for name, tensor in hf_tensors(other):
            assert torch.equal(tensor, dict(hf_tensors(receiver.model))[name]), name
    lacking = [(name, tensor) for name, tensor in WeightSource(other) if name != "model.norm.weight"]
    with pytest.raises(SyncError, match=r"missing model\.norm\.weight"):
        deliver(lacking, 3, post, link)


def receive_on_gpu(pipe: Any) -> None:
    receiver = ModelReceiver(sharp_model(CORNERS["plain"]).to("cuda"))
    while (call := pipe.recv()) is not None:
        getattr(receiver, call[0])(call[1])
        pipe.send(None)
    pipe.send(receiver.version)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a CUDA device")
def test_cuda_ipc_between_two_processes() -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive_on_gpu, args=(theirs,))
    process.start()

    def post(method: str, argument: Any) -> Callable[[], object]:
        ours.send((method, argument))
        return ours.recv

    link = CudaIpc()
    link.chunk_bytes = 2**20
    before = torch.cuda.memory_allocated()
    for version in (1, 2, 3):
        deliver(WeightSource(sharp_model(CORNERS["plain"], seed=version).to("cuda")), version, post, link)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20, "a staging buffer is lost with each sync"
    ours.send(None)
    assert ours.recv() == 3
    process.join()
