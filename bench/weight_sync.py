"""How long new weights take from a learner to an engine in another process, and the copy rate of the device beside it.

    python -m bench.weight_sync --preset tiny                                          # CPU, shared memory
    python -m bench.weight_sync --preset 16b-a3b --device cuda --dtype bfloat16        # GPU, CUDA IPC, our own model
    python -m bench.weight_sync --preset 16b-a3b --device cuda --dtype bfloat16 --engine vllm

The learner's model is in this process, the engine in a second one on the same device, without Ray. A round is a whole
sync as in training, after every parameter has changed: manifest, staging buffer, checks on arrival, loading, reading
back. Beside the whole stands what the sender waited for, by call, and the rate at which the device copies within its
own memory.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from models import DeepseekV3ForCausalLM, find_config, load_pretrained, save_pretrained
from models.counts import count_parameters
from rollout.engine import EngineConfig, build_engine
from rollout.native_engine import ModelReceiver
from rollout.weight_source import WeightSource, deliver
from rollout.weight_transport import ByValue, CudaIpc, Mailbox


class SharedMemory(ByValue):
    """The buffer itself is in shared memory, and a pipe hands over its file descriptor."""

    def _prepare(self) -> None:
        self._buffer.share_memory_()

    def _carried(self, buffer: Tensor) -> Tensor:
        return buffer


class SharedMailbox(Mailbox):
    def fetch(self, carried: Any, num_bytes: int) -> Tensor:
        return carried.clone() if isinstance(carried, Tensor) else super().fetch(carried, num_bytes)


def serve(pipe: Connection, kind: str, folder: str, device: str, dtype: str) -> None:
    """The engine's process: builds it, then does what it is sent until None comes."""
    torch.set_num_threads(1)
    engine: Any
    if kind == "native":
        engine = ModelReceiver(load_pretrained(folder, dtype=getattr(torch, dtype), device=device))
    else:
        sizes = {"max_model_len": 256, "max_num_seqs": 16}
        config = EngineConfig(kind="vllm", transport="local", dtype=dtype, **sizes)  # type: ignore[arg-type]
        engine = build_engine(config, folder)
    engine._mailbox = SharedMailbox(engine._mailbox.device)
    pipe.send(None)
    while (call := pipe.recv()) is not None:
        try:
            getattr(engine, call[0])(call[1])
            pipe.send(None)
        except Exception as error:  # told to the sender, which stops on it
            pipe.send(error)
            raise


class Steps:
    """Posts calls to the engine's process and adds up how long each method took there and on the way."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.seconds: dict[str, float] = {}

    def post(self, method: str, argument: Any) -> Callable[[], object]:
        started = time.perf_counter()
        self._pipe.send((method, argument))

        def wait() -> None:
            answer = self._pipe.recv()
            self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - started
            if answer is not None:
                raise answer

        return wait


def copy_rate(device: str, num_bytes: int) -> float:
    """Bytes per second of a copy within the device's memory."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    synchronize(device)
    return 10 * num_bytes / (time.perf_counter() - started)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a preset or a folder with a config.json")
    parser.add_argument("--layers", type=int, default=0, help="cut to this many layers, 0 for all")
    parser.add_argument("--vocabulary", type=int, default=0, help="0 for 102,400 on a GPU and 512 on a CPU")
    parser.add_argument("--engine", choices=["native", "vllm"], default="native")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.vocabulary = options.vocabulary or (512 if options.device == "cpu" else 102_400)
    torch.set_num_threads(1)
    config = find_config(options.preset).with_vocabulary(options.vocabulary, bos=None, eos=1, pad=0)
    config = replace(config, num_nextn_predict_layers=0, num_hidden_layers=options.layers or config.num_hidden_layers)
    with torch.device(options.device):
        torch.set_default_dtype(getattr(torch, options.dtype))
        model = DeepseekV3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        measure(model, str(Path(folder) / "model"), options, count_parameters(config).total)


def measure(model: DeepseekV3ForCausalLM, folder: str, options: argparse.Namespace, parameters: int) -> None:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(theirs, options.engine, folder, options.device, options.dtype), daemon=True
    )
    process.start()
    theirs.close()  # so that a dead engine ends this process, too, instead of leaving it waiting
    ours.recv()
    link = SharedMemory() if options.device == "cpu" else CudaIpc()
    num_bytes = sum(tensor.nbytes for _, tensor in WeightSource(model))
    print(f"{options.preset}, {parameters:,} parameters, {num_bytes / 1e9:.3f} GB, engine {options.engine}")
    print(f"{'sync':8}{'seconds':>10}{'GB/s':>10}   of which the sender waited for")
    for version in range(1, options.rounds + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        synchronize(options.device)
        steps = Steps(ours)
        started = time.perf_counter()
        deliver(WeightSource(model), version, steps.post, link)
        seconds = time.perf_counter() - started
        waited = ", ".join(f"{method} {value:.3f} s" for method, value in steps.seconds.items())
        print(f"{version:<8}{seconds:10.3f}{num_bytes / seconds / 1e9:10.2f}   {waited}")
    rate = copy_rate(options.device, min(2**30, max(2**20, num_bytes)))
    print(f"a copy within the device's memory: {rate / 1e9:.1f} GB/s")
    ours.send(None)
    process.join()


if __name__ == "__main__":
    main()
