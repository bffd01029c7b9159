"""Forward and backward speed of our model beside transformers' DeepseekV3, in one run.

    python -m bench.model --preset tiny                                        # CPU, float32
    python -m bench.model --preset 16b-a3b --layers 8 --device cuda --dtype bfloat16 --tokens 8192

Both get the same weights and the same packed tokens, and compute the mean cross entropy of every next token and its
gradient: ours through the chunked head, transformers with all logits and each of `--settings`. They are timed in turn,
so a noisy machine treats them alike; the median of the rounds counts. MFU is against active matrix multiplications,
recomputation not counted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM as Reference

from models import SequenceLayout, build_model, find_config, save_pretrained
from models.counts import count_parameters, training_flops
from models.head import linear_cross_entropy
from models.transformer import DeepseekV3ForCausalLM

# Dense bfloat16 peak of the card, TFLOP/s.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}


def our_step(model: Any, ids_T: Tensor, layout: SequenceLayout) -> Callable[[], float]:
    last_T = torch.tensor(layout.offsets[1:], device=ids_T.device) - 1
    keep_T = torch.ones(len(ids_T), dtype=torch.bool, device=ids_T.device)
    keep_T[last_T] = False
    predictors_N = keep_T.nonzero().squeeze(1)
    weights_N = torch.full((len(predictors_N),), 1 / len(predictors_N), device=ids_T.device)

    def step() -> float:
        hidden_TD = model(ids_T, layout).hidden_TD
        targets_N = ids_T[predictors_N + 1]
        loss = linear_cross_entropy(hidden_TD[predictors_N], model.lm_head.weight, targets_N, weights_N)
        loss.backward()
        return loss.item()

    return step


def their_step(model: Any, ids_T: Tensor, layout: SequenceLayout, setting: str) -> Callable[[], float]:
    """`setting` is ATTENTION/packed (one row, told apart by positions) or ATTENTION/padded (a row per sequence)."""
    attention, form = setting.split("/")
    labels_T = ids_T.clone()
    labels_T[torch.tensor(layout.offsets[:-1], device=ids_T.device)] = -100  # the first of a sequence has no predictor
    inputs: dict[str, Any] = {"input_ids": ids_T[None], "labels": labels_T[None]}
    if form == "packed":
        inputs["position_ids"] = layout.positions_T[None]
    else:
        # Right padding needs no mask: no real token sees what is behind it, and padding has no label.
        inputs = {"input_ids": layout.pad(ids_T), "labels": layout.pad(labels_T + 100) - 100}

    def step() -> float:
        model.set_attn_implementation(attention)
        output = model(**inputs, use_cache=False)
        output.loss.backward()
        return output.loss.item()

    return step


def measure(steps: dict[str, Callable[[], float]], models: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, loss and peak GPU memory of each, timed in turn; `models` by the steps' names.

    Peak memory is that of the model's weights, its gradients and everything a step takes; the other model, which is in
    memory too, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    result: dict[str, dict[str, float]] = {name: {} for name in steps}
    on_gpu = models["ours"].lm_head.weight.is_cuda
    for index in range(rounds + 2):
        for name, step in steps.items():
            if on_gpu:
                resident = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            result[name]["loss"] = step()
            if on_gpu:
                torch.cuda.synchronize()
                weights = sum(parameter.nbytes for parameter in models[name].parameters())
                result[name]["peak_gib"] = (torch.cuda.max_memory_allocated() - resident + weights) / 2**30
            if index >= 2:
                seconds[name].append(time.perf_counter() - started)
            models[name].zero_grad(set_to_none=True)
    for name in steps:
        result[name]["seconds"] = statistics.median(seconds[name])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a preset or a folder with a config.json")
    parser.add_argument("--layers", type=int, default=0, help="cut to this many layers, 0 for all")
    parser.add_argument("--vocabulary", type=int, default=0, help="0 for the preset's own")
    parser.add_argument("--tokens", type=int, default=4096, help="packed tokens in one step")
    parser.add_argument("--length", type=int, default=0, help="tokens per sequence, 0 for a spread of lengths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts implementation")
    parser.add_argument("--settings", default="sdpa/packed,sdpa/padded", help="of transformers: attention/form, ...")
    parser.add_argument("--profile", action="store_true", help="print the operations that our step spends its time in")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    config = find_config(options.preset)
    if options.vocabulary:
        config = config.with_vocabulary(options.vocabulary, bos=None, eos=1, pad=0)
    config = replace(config, num_nextn_predict_layers=0, num_hidden_layers=options.layers or config.num_hidden_layers)
    lengths = packed_lengths(options.tokens, options.length)
    layout = SequenceLayout.from_lengths(lengths, device=options.device)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(2, config.vocab_size, (sum(lengths),), generator=generator).to(options.device)
    ours = build_model(config, seed=0, dtype=dtype, device=options.device)
    models: dict[str, Any] = {"ours": ours}
    steps = {"ours": our_step(ours, ids_T, layout)}
    if options.settings:
        theirs = transformers_twin(ours, options.experts)
        for setting in options.settings.split(","):
            models[setting], steps[setting] = theirs, their_step(theirs, ids_T, layout, setting)
    report(measure(steps, models, options.rounds), config, lengths, options)
    if options.profile:
        print_profile(steps["ours"], options.device)


def transformers_twin(model: DeepseekV3ForCausalLM, experts: str) -> Any:
    """The same weights in transformers' model, by way of a checkpoint."""
    weight = model.lm_head.weight
    load: Any = Reference
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        twin = load.from_pretrained(Path(folder) / "model", dtype=weight.dtype, experts_implementation=experts)
    return twin.to(weight.device)


def print_profile(step: Callable[[], float], device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80))


def packed_lengths(tokens: int, length: int) -> list[int]:
    """Sequences of one length, or of 1/32 to 1/4 of the whole, that add up to `tokens`."""
    if length:
        return [length] * (tokens // length)
    shares = (8, 4, 3, 1, 2, 6, 5, 3)
    lengths = [tokens * share // sum(shares) for share in shares]
    lengths[0] += tokens - sum(lengths)
    return lengths


def report(results: dict[str, dict[str, float]], config: Any, lengths: list[int], options: argparse.Namespace) -> None:
    tokens = sum(lengths)
    flops = tokens * training_flops(config, context_length=sum(n * (n + 1) // 2 for n in lengths) // tokens)
    peak = None
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for card, value in PEAK_TFLOPS.items() if card in name), None)
        print(name)
    shape = f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {tokens} in all"
    parameters = f"{config.num_hidden_layers} layers, {count_parameters(config).total:,} parameters"
    print(f"{options.preset}, {parameters}, {options.dtype}, {shape}")
    print(f"{'':24}{'tokens/s':>12}{'ms/step':>10}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}{'loss':>9}")
    for name, row in results.items():
        rate = flops / row["seconds"] / 1e12
        mfu = f"{rate / peak:.1%}" if peak else "-"
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        print(f"{name:24}{tokens / row['seconds']:12,.0f}{1000 * row['seconds']:10.1f}{rate:10.2f}{mfu:>8}{memory:>10}"
              f"{row['loss']:9.4f}")  # fmt: skip
    others = {name: row["seconds"] for name, row in results.items() if name != "ours"}
    if others:
        best = min(others, key=lambda name: others[name])
        print(f"ours / transformers at its best ({best}): {others[best] / results['ours']['seconds']:.2f}x")


if __name__ == "__main__":
    main()
