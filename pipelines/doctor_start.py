"""`grpo doctor`, the slow part: Ray, vLLM, a two-step run and the drift test, each really started, in a process of its
own that is killed at its deadline.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipelines.config import write_config
from pipelines.findings import Finding
from pipelines.recipes import zero_ledger
from pipelines.students import build_student, write_student
from pipelines.tasks import ledger
from pipelines.tokenizer import train_tokenizer
from pipelines.zero_config import ZeroConfig
from rollout.engine import EngineConfig

_RAY = """
import ray
from rollout.ray_actor import start_ray
start_ray(1)
assert ray.get(ray.remote(num_cpus=1)(lambda: 41 + 1).remote()) == 42
ray.shutdown()
"""
_VLLM = """
import sys
from rollout.engine import EngineConfig, build_engine
from rollout.sample import Prompt, SamplingParams
if __name__ == "__main__":
    engine = build_engine(EngineConfig(kind="vllm", transport="local", max_model_len=64), sys.argv[1])
    prompt = Prompt(id="1", text="", token_ids=[5, 6, 7], row={})
    params = SamplingParams(num_completions=2, max_tokens=4, temperature=1.0, stop_token_id=0, seed=0)
    assert len(engine.generate([prompt], params)[0].completions) == 2
    engine.close()
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Something to start."""

    check: str
    command: list[str]
    success: str
    remedy: str
    timeout_s: float = 180.0
    """Deadline; engines on a GPU compile for minutes at their first start."""


def slow_findings(has_vllm: bool) -> Iterator[Finding]:
    """Makes a model of random weights and starts one thing after the other."""
    with tempfile.TemporaryDirectory(prefix="grpo-doctor-") as name:
        folder = Path(name)
        model, config = write_model(folder / "model"), folder / "zero.json"
        write_config(tiny_run(str(model), str(folder / "run")), config)
        still = folder / "still.json"
        write_config(replace(tiny_run(str(model), ""), engine=EngineConfig(max_model_len=256)), still)
        for trial in trials(model, config, still, has_vllm):
            yield attempt(trial)


def write_model(folder: Path) -> Path:
    """A checkpoint of random weights, with a tokenizer."""
    texts = ledger.documents(ledger.make_rows(300, seed=0), random.Random(0))
    tokenizer = train_tokenizer(texts, 320, ())
    model = build_student("tiny", tokenizer, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    return write_student(model, tokenizer, folder)


def tiny_run(model: str, out: str) -> ZeroConfig:
    """Two steps of the quickstart's RL, in this process."""
    zero = zero_ledger()
    return replace(
        zero, model=model, out=out, num_prompts=50,
        engine=EngineConfig(kind="native", transport="local", max_model_len=1024),
        trainer=replace(zero.trainer, steps=2, prompts_per_step=4, completions_per_prompt=4, max_tokens=12),
    )  # fmt: skip


def trials(model: Path, config: Path, still: Path, has_vllm: bool) -> list[Trial]:
    grpo = [sys.executable, "-m", "pipelines.cli"]
    vllm = Trial(
        check="vllm", command=[sys.executable, "-c", _VLLM, str(model)], timeout_s=600.0,
        success="started, and sampled from a model of random weights",
        remedy="the packages above; until then --engine native",
    )  # fmt: skip
    return [
        Trial(
            check="ray", command=[sys.executable, "-c", _RAY], success="started, and ran a task",
            remedy="/dev/shm, open files and free disk above; until then --engine.transport local",
        ),
        *([vllm] if has_vllm else []),
        Trial(
            check="two steps", command=[*grpo, "zero", "--config", str(config)], success="grpo zero, native engine",
            remedy="the versions above; this needs neither Ray nor vLLM",
        ),
        Trial(
            check="lr 0", command=[*grpo, "doctor", "--lr0", str(still), "--steps", "2"], timeout_s=600.0,
            success=f"nothing drifts with learning rate 0 ({'vLLM' if has_vllm else 'native'}, in a Ray actor)",
            remedy="grpo doctor --lr0 with your own recipe shows more; docs/mismatch.md",
        ),
    ]  # fmt: skip


def attempt(trial: Trial) -> Finding:
    """Runs it in a process group of its own, so that nothing it started is left."""
    started = time.perf_counter()
    process = subprocess.Popen(
        trial.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        errors="replace",
    )  # fmt: skip
    try:
        said, status = process.communicate(timeout=trial.timeout_s)[0], process.returncode
    except subprocess.TimeoutExpired:
        said, status = f"no end after {trial.timeout_s:.0f} s", 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - started
    if status == 0:
        return Finding(level="ok", check=trial.check, text=trial.success, seconds=seconds)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit status {status}"]
    told = next((line for line in lines if line.startswith(("grpo: error:", "error "))), lines[-1])
    return Finding(level="error", check=trial.check, text=told, remedy=trial.remedy, seconds=seconds)
