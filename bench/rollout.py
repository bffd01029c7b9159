"""Sampled tokens per second: bare `LLM.generate`, our vLLM engine around it, and our pool of Ray actors, in one run.

    python -m bench.rollout                                                       # CPU, float32, the quickstart's shape
    python -m bench.rollout --preset 16b-a3b --layers 8 --device cuda --dtype bfloat16 --prompts 32 --max-tokens 512

All get the same requests (prompts, number of completions, lengths, temperature) and the same random weights, written
once to a temporary folder. `--bare-seeds` gives vLLM's own requests a seed each, as ours have; without it its sampler
draws for all rows at once, which is its fastest. The pool's rewards run in a thread while it generates. Each is a
process of its own, since one holds the GPU; `--rounds` of them in turn, and the median counts. `--kinds together` times
bare vLLM and our local pool with rewards in turn in one process, around the same `LLM`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models import build_model, find_config, save_pretrained
from rewards import Rubric, Sample, reward
from rollout.engine import EngineConfig
from rollout.pool import EnginePool, LocalPool, build_pool
from rollout.sample import CompletionGroup, Prompt, SamplingParams

KINDS = ("native", "bare", "engine", "pool", "together")
STOP = 1


def write_model(options: argparse.Namespace, folder: Path) -> None:
    config = find_config(options.preset).with_vocabulary(options.vocabulary, bos=None, eos=STOP, pad=0)
    config = replace(config, num_nextn_predict_layers=0, num_hidden_layers=options.layers or config.num_hidden_layers)
    save_pretrained(build_model(config, seed=0, dtype=getattr(torch, options.dtype), device=options.device), folder)


def make_prompts(options: argparse.Namespace) -> list[Prompt]:
    draw = random.Random(0)
    return [
        Prompt(id=f"p{i}", text="", token_ids=[draw.randrange(2, options.vocabulary) for _ in range(options.length)])
        for i in range(options.prompts)
    ]


@reward
def variety(sample: Sample) -> float:
    """A cheap reward of real work: the share of different words."""
    words = sample.completion.split()
    return len(set(words)) / max(1, len(words))


def score(group: CompletionGroup, rubric: Rubric) -> None:
    texts = [" ".join(map(str, completion.token_ids)) for completion in group.completions]
    rubric.score_groups([[Sample(prompt="", completion=text) for text in texts]])


def run_bare(options: argparse.Namespace, engine: Any, params: SamplingParams) -> int:
    """`LLM.generate` of vLLM by itself, started with the settings of our engine; its own draw, not ours."""
    import vllm

    sampler = getattr(engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner, "sampler", None)
    sampler = getattr(sampler, "topk_topp_sampler", None)
    ours = getattr(sampler, "forward", None)
    if engine._draws_are_ours:
        sampler.__init__(sampler.logprobs_mode)
    prompts = make_prompts(options)
    requests: list[Any] = [{"prompt_token_ids": p.token_ids} for p in prompts for _ in range(options.completions)]
    seeds = [params.seed_of(p.id, i) for p in prompts for i in range(options.completions)]
    own = [
        vllm.SamplingParams(
            temperature=1.0, max_tokens=options.max_tokens, stop_token_ids=[STOP], ignore_eos=True, logprobs=0,
            detokenize=False, seed=seed if options.bare_seeds else None,
        )
        for seed in seeds
    ]  # fmt: skip
    outputs = engine.llm.generate(requests, own, use_tqdm=False)
    if engine.recorder is not None:
        for output in outputs:
            engine.recorder.forget(output.request_id)
    if engine._draws_are_ours:
        sampler.forward = ours
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def run_pool(options: argparse.Namespace, pool: EnginePool, params: SamplingParams, rubric: Rubric | None) -> int:
    """Our pool; with a rubric, the rewards run in a thread while it generates, and are waited for."""
    tokens, scored = 0, []
    with ThreadPoolExecutor(1) as thread:
        for group in pool.generate(make_prompts(options), params):
            tokens += group.num_tokens
            if rubric is not None:
                scored.append(thread.submit(score, group, rubric))
        for one in scored:
            one.result()
    return tokens


@contextmanager
def runs_of(
    options: argparse.Namespace, config: EngineConfig, model: str, kind: str
) -> Iterator[dict[str, Callable[[SamplingParams], int]]]:
    """What to time in one process, by name."""
    transport = "ray" if kind == "pool" else "local"
    pool = build_pool(replace(config, kind="native" if kind == "native" else "vllm", transport=transport), model)
    rubric = Rubric([variety]) if kind in ("pool", "together") else None
    runs = {kind: lambda params: run_pool(options, pool, params, rubric)}
    if kind in ("bare", "together"):
        assert isinstance(pool, LocalPool)
        engine = pool._engine
        runs = {"bare": lambda params: run_bare(options, engine, params)} | ({} if kind == "bare" else runs)
    yield runs
    pool.close()


def measure(options: argparse.Namespace, kind: str, model: str) -> dict[str, list[float]]:
    """Tokens per second of each repetition, after one to warm up; in turn where a process times two."""
    config = EngineConfig(
        dtype=options.dtype, max_model_len=options.length + options.max_tokens, max_num_seqs=options.max_num_seqs,
        placement="separate",
    )  # fmt: skip
    torch.set_num_threads(config.num_threads)
    params = SamplingParams(num_completions=options.completions, max_tokens=options.max_tokens, stop_token_id=STOP)
    with runs_of(options, config, model, kind) as runs:
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for repetition in range(options.repetitions + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                tokens = run(replace(params, seed=repetition))
                rates[name].append(tokens / (time.perf_counter() - started))
    return {name: of_run[1:] for name, of_run in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a preset or a folder with a config.json")
    parser.add_argument("--layers", type=int, default=0, help="cut to this many layers, 0 for all")
    parser.add_argument("--vocabulary", type=int, default=352)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=16, help="per prompt")
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5, help="per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--kinds", nargs="+", default=None, choices=KINDS, help="all; without `native` on a GPU")
    parser.add_argument("--bare-seeds", action="store_true", help="vLLM's own requests have seeds too")
    parser.add_argument("--run", nargs=2, metavar=("KIND", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print("RATES", json.dumps(measure(options, *options.run)))
        return
    kinds = options.kinds or (KINDS[:4] if options.device == "cpu" else KINDS[1:4])
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(options, Path(folder) / "model")
        if options.device == "cuda":
            torch.cuda.empty_cache()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for _ in range(options.rounds):
            for kind in kinds:
                command = [sys.executable, "-m", "bench.rollout", *sys.argv[1:], "--run", kind, f"{folder}/model"]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"{kind} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                line = next(line for line in done.stdout.splitlines() if line.startswith("RATES"))
                for name, of_run in json.loads(line.removeprefix("RATES")).items():
                    rates.setdefault(name, []).append(statistics.median(of_run))
    report(rates, options)


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    if options.device == "cuda":
        print(torch.cuda.get_device_name())
    print(
        f"{options.preset}, {options.layers or 'all'} layers, {options.dtype}: {options.prompts} prompts of "
        f"{options.length} tokens x {options.completions} completions of up to {options.max_tokens}, "
        f"bare {'with' if options.bare_seeds else 'without'} seeds; median (least to most) of {options.rounds} runs"
    )
    reference = statistics.median(rates["bare"]) if "bare" in rates else None
    for kind, found in rates.items():
        middle = statistics.median(found)
        share = f"{middle / reference:8.1%} of bare" if reference else ""
        print(f"{kind:8}{middle:12,.0f} tokens/s  ({min(found):,.0f} to {max(found):,.0f}){share}")


if __name__ == "__main__":
    main()
