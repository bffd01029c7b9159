"""The learner's optimization step beside TRL's and a plain loop over transformers, in one run, on the same samples.

    python -m bench.learner --device cuda --out learner                        # all shapes and systems
    python -m bench.learner --device cuda --shapes dense --long 32768          # 32k tokens, layers recomputed
    python -m bench.learner --tiny                                             # CPU, seconds

Each system runs in a process of its own, one after the other, from the same checkpoint of random weights; one that
fails or takes longer than `--limit` is reported, and the others go on. What is in a row is printed and written to
`--out` as soon as it is known. Tokens count prompts and completions, without padding. The median of the steps counts,
the first two left out: they compile. MFU is against the matrix multiplications that the step needs, the head's on
completion tokens only, nothing for padding or recomputation. Peak memory is PyTorch's, weights and optimizer included.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import grpo_step
from bench.learner_systems import SYSTEMS, Clock, Given, make_samples
from bench.model import PEAK_TFLOPS
from models import DeepseekV3Config, build_model, find_config, save_pretrained
from models.auto import read_model_type
from models.config import MODEL_TYPES
from models.counts import training_flops
from pipelines.tokenizer import train_tokenizer

LAYERS = {"mini": 0, "16b-a3b": 6}
KINDS = {
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|_grouped_mm|linear)|mkldnn",
    "attention": r"attention|flash|fmha|sdpa|cudnn",
    "optimizer, clipping": r"adam|multi_tensor|foreach|norm_cleanup",
    "compiled": r"triton",
    "copies, fills": r"memcpy|memset|copy|fill|zero|cat",
}


def write_model(options: Namespace, folder: Path) -> None:
    """Random weights. `dense` is Qwen3-0.6B's shape, the others are presets of ours, 16b-a3b cut to six layers."""
    if options.shape == "dense":
        shape = "tiny" if options.tiny else "dense"
        grpo_step.write_checkpoint(Namespace(shape=shape, dtype=options.dtype, device=options.device), folder)
        return
    config = find_config("tiny" if options.tiny else options.shape)
    config = replace(
        config, num_nextn_predict_layers=0, num_hidden_layers=LAYERS[options.shape] or config.num_hidden_layers
    )
    config = config if not options.tiny else replace(config, num_hidden_layers=2)
    save_pretrained(build_model(config, seed=0, dtype=getattr(torch, options.dtype), device=options.device), folder)
    train_tokenizer([grpo_step.SENTENCE], 300, []).save_pretrained(str(folder))


def flops_needed(folder: Path, samples: list[Given]) -> float:
    """Of one step, forward and backward."""
    lengths = [len(s.prompt) + len(s.completion) for s in samples]
    tokens, trained = sum(lengths), sum(len(s.completion) for s in samples)
    context = sum(n * (n + 1) // 2 for n in lengths) // tokens
    values = json.loads((folder / "config.json").read_text())
    head = 6 * values["vocab_size"] * values["hidden_size"]
    if read_model_type(folder / "config.json") in MODEL_TYPES:
        per_token = training_flops(DeepseekV3Config.load(folder), context) - head
    else:
        width, kv = (values[key] * values["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
        layer = values["hidden_size"] * (2 * width + 2 * kv + 3 * values["intermediate_size"])
        per_token = values["num_hidden_layers"] * (6 * layer + 12 * width * context)
    return tokens * per_token + trained * head


def run_child(options: Namespace) -> None:
    """One system; its last line of output is for the parent."""
    folder = Path(options.folder)
    samples = make_samples(options, json.loads((folder / "config.json").read_text())["vocab_size"])
    clock = Clock(options.device)
    norm, step = SYSTEMS[options.child](options, str(folder), samples, clock)
    tokens, seconds = sum(len(s.prompt) + len(s.completion) for s in samples), statistics.median(clock.seconds[2:])
    row = {"seconds": seconds, "tokens_per_s": tokens / seconds, "grad_norm": norm, "tokens": tokens}
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for card, value in PEAK_TFLOPS.items() if card in name), None)
        row |= {"device": name, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        row |= {"mfu": flops_needed(folder, samples) / seconds / peak / 1e12} if peak else {}
    print("RESULT " + json.dumps(row), flush=True)
    if options.child == "ours" and step is not None:
        print("PROFILE " + json.dumps(profile(step, options.device)), flush=True)


def profile(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Where the time of one step goes: seconds by kind of operation, and the fifteen longest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with record(activities=activities) as recorded:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = recorded.key_averages()
    if device == "cuda":  # the kernels alone: an operator has their time once more
        on_device = torch.autograd.DeviceType.CUDA
        events = [event for event in events if event.device_type == on_device and not event.is_user_annotation]
    spent = {event.key: getattr(event, key) / 1e6 for event in events}
    kinds: dict[str, float] = {}
    for name, seconds in spent.items():
        kind = next(
            (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "elementwise, other"
        )
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    longest = sorted(spent.items(), key=lambda item: -item[1])[:15]
    return {"by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])), "longest": dict(longest)}


def run_part(options: Namespace, shape: str, system: str, folder: Path) -> dict[str, Any]:
    """One system in a process of its own; its result, or what went wrong."""
    arguments = [*sys.argv[1:], "--child", system, "--folder", str(folder), "--shape", shape]
    command = [sys.executable, "-u", "-m", "bench.learner", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(options.limit, process.kill)
    timer.start()
    result: dict[str, Any] = {}
    tail: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            word, _, rest = line.partition(" ")
            if word in ("RESULT", "PROFILE"):
                result |= json.loads(rest) if word == "RESULT" else {"profile": json.loads(rest)}
            elif line.startswith("step "):
                print(f"{shape} {system}: {line}", end="", flush=True)
            tail = [*tail[-15:], line]
    finally:
        process.wait()
        in_time = timer.is_alive()
        timer.cancel()
    if "seconds" not in result:
        reason = f"exit status {process.returncode}" if in_time else f"stopped after {options.limit:.0f} s"
        result |= {"error": f"{reason}; last: {tail[-1].strip() if tail else 'nothing'}", "tail": tail}
        print("".join(tail), flush=True)
    return result


def report(results: dict[str, dict[str, Any]]) -> None:
    """The table so far."""
    print(f"\n{'':20}{'tokens/s':>10}{'s/step':>9}{'MFU':>8}{'peak GiB':>10}{'grad norm':>11}{'speed':>8}{'memory':>8}")
    for name, row in results.items():
        if "error" in row:
            print(f"{name:20}{row['error'][:110]}")
            continue
        base = results.get(f"{name.split()[0]} trl", {})
        against = f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}x" if "tokens_per_s" in base else "-"
        memory = f"{row['peak_gib'] / base['peak_gib']:.2f}x" if "peak_gib" in base and "peak_gib" in row else "-"
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        print(f"{name:20}{row['tokens_per_s']:10,.0f}{row['seconds']:9.3f}{mfu:>8}{peak:>10}"
              f"{row['grad_norm']:11.4g}{against:>8}{memory:>8}")  # fmt: skip
    print("speed and memory: against TRL, same shape", flush=True)


def report_profile(name: str, found: dict[str, Any]) -> None:
    total = sum(found["by_kind"].values())
    print(f"\n{name}: where one step's {1000 * total:,.0f} ms of the device go")
    for kind, seconds in found["by_kind"].items():
        print(f"  {kind:24}{1000 * seconds:10.1f} ms{seconds / total:8.1%}")
    for operation, seconds in found["longest"].items():
        print(f"    {operation[:80]:80}{1000 * seconds:9.1f} ms")


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="dense,mini,16b-a3b")
    parser.add_argument("--systems", default="ours,trl,plain")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--median", type=int, default=512, help="of the completions' lengths")
    parser.add_argument("--longest", type=int, default=4096, help="prompt and completion together")
    parser.add_argument("--long", type=int, default=0, help="instead: two samples of so many tokens, one at a time")
    parser.add_argument("--recompute", action="store_true", help="layers' activations, in all systems; --long does")
    parser.add_argument("--batch", type=int, default=16, help="TRL and plain: samples in a micro-batch")
    parser.add_argument("--token-budget", type=int, default=32768, help="ours: tokens in a micro-batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="", help="of weights, gradients and optimizer state, in all systems")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each system of each shape")
    parser.add_argument("--out", default="", help="folder for results.json")
    parser.add_argument("--tiny", action="store_true", help="models and samples of toy size")
    for hidden in ("child", "folder", "shape"):
        parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.tiny:
        options.samples, options.median, options.longest, options.batch, options.token_budget = 16, 24, 96, 4, 512
    if options.long:
        options.samples, options.batch, options.steps, options.recompute = 2, 1, min(options.steps, 4), True
    return options


def main() -> None:
    options = parse()
    if options.child:
        run_child(options)
        return
    results: dict[str, dict[str, Any]] = {}
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            options.shape = shape
            try:
                write_model(options, Path(folder) / "model")
            except Exception:  # the other shapes go on
                print(f"{shape}: no model\n{traceback.format_exc()}", flush=True)
                continue
            if options.device == "cuda":
                torch.cuda.empty_cache()
            for system in options.systems.split(","):
                row = run_part(options, shape, system, Path(folder) / "model")
                results[f"{shape} {system}"] = row
                report(results)
                if "profile" in row:
                    report_profile(f"{shape} {system}", row["profile"])
                if options.out:
                    Path(options.out).mkdir(parents=True, exist_ok=True)
                    stated = {"options": vars(options), "results": results}
                    (Path(options.out) / "results.json").write_text(json.dumps(stated, indent=2) + "\n")


if __name__ == "__main__":
    main()
