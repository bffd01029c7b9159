"""Forward and backward speed of our model beside transformers' DeepseekV3, in one run.

    python bench/model.py --preset tiny                                        # CPU, float32
    python bench/model.py --preset 16b-a3b --layers 8 --device cuda --dtype bfloat16 --tokens 8192

Both get the same weights and the same packed tokens, and compute the mean cross entropy of every next token and its
gradient: ours through the chunked head, transformers with all logits and the settings `--experts` and `--attention`.
They are timed in turn, so a noisy machine treats them alike; the median of the rounds counts. MFU is against active
matrix multiplications, recomputation not counted.
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

from grpo.logprobs import token_logprobs
from models import SequenceLayout, find_config, from_pretrained, save_pretrained
from models.counts import count_parameters, training_flops
from models.transformer import DeepseekV3ForCausalLM

# Dense bfloat16 peak of the card, TFLOP/s.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}


def our_step(model: Any, ids_T: Tensor, layout: SequenceLayout) -> Callable[[], float]:
    last_T = torch.tensor(layout.offsets[1:], device=ids_T.device) - 1
    keep_T = torch.ones(len(ids_T), dtype=torch.bool, device=ids_T.device)
    keep_T[last_T] = False
    predictors_N = keep_T.nonzero().squeeze(1)
    ones_N = torch.ones(len(predictors_N), device=ids_T.device)

    def step() -> float:
        hidden_TD = model(ids_T, layout).hidden_TD
        logprobs_N, _ = token_logprobs(hidden_TD[predictors_N], model.lm_head.weight, ids_T[predictors_N + 1], ones_N)
        loss = -logprobs_N.mean()
        loss.backward()
        return loss.item()

    return step


def their_step(model: Any, ids_T: Tensor, layout: SequenceLayout) -> Callable[[], float]:
    labels_T = ids_T.clone()
    labels_T[torch.tensor(layout.offsets[:-1], device=ids_T.device)] = -100  # the first of a sequence has no predictor

    def step() -> float:
        output = model(ids_T[None], position_ids=layout.positions_T[None], labels=labels_T[None], use_cache=False)
        output.loss.backward()
        return output.loss.item()

    return step


def measure(steps: dict[str, Callable[[], float]], models: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, loss and peak GPU memory of each, timed in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    result: dict[str, dict[str, float]] = {name: {} for name in steps}
    on_gpu = models["ours"].lm_head.weight.is_cuda
    for index in range(rounds + 2):
        for name, step in steps.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            result[name]["loss"] = step()
            if on_gpu:
                torch.cuda.synchronize()
                result[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
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
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="packed tokens in one step")
    parser.add_argument("--length", type=int, default=0, help="tokens per sequence, 0 for a spread of lengths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts implementation")
    parser.add_argument("--attention", default="sdpa", help="transformers' attention implementation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    config = find_config(options.preset).with_vocabulary(options.vocabulary, bos=None, eos=1, pad=0)
    config = replace(config, num_nextn_predict_layers=0, num_hidden_layers=options.layers or config.num_hidden_layers)
    lengths = packed_lengths(options.tokens, options.length)
    layout = SequenceLayout.from_lengths(lengths, device=options.device)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(2, options.vocabulary, (sum(lengths),), generator=generator).to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        model = DeepseekV3ForCausalLM(config).to(options.device)
        model.init_weights(0)
        save_pretrained(model, Path(folder) / "model")
        ours = from_pretrained(Path(folder) / "model", dtype=dtype, device=options.device)
        load: Any = Reference
        theirs = load.from_pretrained(
            Path(folder) / "model", dtype=dtype, attn_implementation=options.attention,
            experts_implementation=options.experts,
        ).to(options.device)  # fmt: skip
        del model
    models = {"ours": ours, "transformers": theirs}
    steps = {"ours": our_step(ours, ids_T, layout), "transformers": their_step(theirs, ids_T, layout)}
    report(measure(steps, models, options.rounds), config, lengths, options)


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
    print(f"{'':14}{'tokens/s':>12}{'ms/step':>10}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}{'loss':>9}")
    for name, row in results.items():
        rate = flops / row["seconds"] / 1e12
        mfu = f"{rate / peak:.1%}" if peak else "-"
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        print(f"{name:14}{tokens / row['seconds']:12,.0f}{1000 * row['seconds']:10.1f}{rate:10.2f}{mfu:>8}{memory:>10}"
              f"{row['loss']:9.4f}")  # fmt: skip
    print(f"ours / transformers: {results['transformers']['seconds'] / results['ours']['seconds']:.2f}x")


if __name__ == "__main__":
    main()
