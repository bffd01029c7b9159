"""Pins the sender's side: chunks of bounded size in the stream's order, and the gathering of sharded parameters.

The FSDP2 test runs two processes over gloo on the CPU.
"""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import rollout.weight_source
from models import hf_tensors
from rollout.manifest import records
from rollout.weight_source import Chunk, WeightSource, call_here, chunks, deliver
from tests.models.test_models_parity import CORNERS, sharp_model


def test_chunks_keep_the_order_and_the_bound() -> None:
    tensors = [(f"t{i}", torch.zeros(size)) for i, size in enumerate([10, 20, 5, 200, 1, 30, 8])]
    grouped = list(chunks(iter(tensors), 3, max_bytes=4 * 40))
    assert [chunk.names for chunk in grouped] == [["t0", "t1", "t2"], ["t3"], ["t4", "t5", "t6"]]
    passed = [tensor.data_ptr() for chunk in grouped for tensor in chunk.tensors]
    assert passed == [tensor.data_ptr() for _, tensor in tensors], "by reference, nothing copied"
    assert {chunk.version for chunk in grouped} == {3}
    assert list(chunks([], 1, 100)) == []


def test_a_stream_is_pulled_one_chunk_at_a_time() -> None:
    """Gathered tensors exist while their chunk does: never the whole model twice."""
    pulled: list[str] = []
    loaded: list[tuple[int, int]] = []

    class Receiver:
        def start_weights(self, version: int) -> None: ...
        def finish_weights(self, manifest: object) -> None: ...
        def receive_weights(self, chunk: Chunk) -> None:
            loaded.append((len(pulled), sum(tensor.nbytes for tensor in chunk.tensors)))

    class Small(rollout.weight_source.ByReference):
        chunk_bytes = 4000

    def stream():
        for i in range(50):
            pulled.append(f"t{i}")
            yield f"t{i}", torch.zeros(100)

    deliver(stream(), 1, call_here(Receiver()), Small())
    assert all(size <= 4000 for _, size in loaded)
    assert [seen for seen, _ in loaded] == [11, 21, 31, 41, 50], "a chunk waits for the first tensor beyond it"


def compare_shards(rank: int, port: int, folder: str) -> None:
    """One of two ranks: shards a model, gathers it through WeightSource, and compares with the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, whole = sharp_model(CORNERS["v3_like"]), sharp_model(CORNERS["v3_like"])
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model.lm_head.weight, DTensor), "nothing is sharded, so nothing is tested"
    gathered: list[int] = []
    full_tensor = DTensor.full_tensor

    def counted(tensor: DTensor, **options: object) -> torch.Tensor:
        result = full_tensor(tensor, **options)  # type: ignore[arg-type]
        gathered.append(result.nbytes)
        return result

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    source = WeightSource(model)
    for _ in range(2):  # may be iterated again
        found = {name: tensor.clone() for name, tensor in source}
        wanted = dict(hf_tensors(whole))
        assert list(found) == list(wanted)
        assert records(found, list(found.values())) == records(wanted, list(wanted.values()))
    largest = max(parameter.nbytes for parameter in whole.state_dict().values())
    assert max(gathered) == largest, "one parameter at a time"
    sharded = sum(isinstance(value, DTensor) for value in model.state_dict().values())
    assert len(gathered) == 2 * sharded, "each parameter once per sync, not once per expert"
    Path(folder, f"rank{rank}").write_text("done")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_parameters_are_gathered_one_at_a_time(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(compare_shards, args=(port, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}
