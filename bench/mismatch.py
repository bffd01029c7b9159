"""How far the engine's probabilities are from the learner's, without and with router replay, on the same completions.

    python -m bench.mismatch --preset 16b-a3b --layers 6 --engine vllm --device cuda             # bfloat16
    python -m bench.mismatch --preset tiny --engine native --device cpu

A model with random weights is made on the device and written to a temporary folder; the engine samples from it and
records its experts; the learner's model then scores the same tokens twice, choosing its experts itself and taking the
recorded ones. Both work in `--dtype`, so all that differs is rounding, and the experts that rounding flips. Random
weights tell little about a trained model's figures, only about the effect of replay.
"""

import argparse
import gc
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo.batch import TrainingSample
from grpo.logprobs import token_logprobs
from grpo.mismatch import MismatchMeter
from grpo.packing import pack
from models import DeepseekV3Config, SequenceLayout, find_config, load_pretrained, save_pretrained
from models.allocate import build_model
from rollout.engine import EngineConfig, build_engine
from rollout.sample import CompletionGroup, Prompt, SamplingParams

STOP = 1
ROWS = (
    ("KL(engine || learner), k3", "mismatch/kl_k3", "{:.3e}"),
    ("KL(engine || learner), k1", "mismatch/kl_k1", "{:+.3e}"),
    ("mean |log-probability difference|", "mismatch/abs_mean", "{:.3e}"),
    ("largest", "mismatch/abs_max", "{:.3g}"),
    ("learner / engine, 0.1% quantile", "mismatch/ratio_p0.1", "{:.4f}"),
    ("learner / engine, 99.9% quantile", "mismatch/ratio_p99.9", "{:.4f}"),
    ("other experts, of tokens x layers", "mismatch/other_experts", "{:.2%}"),
    ("tokens with any other expert", "mismatch/tokens_with_other_experts", "{:.2%}"),
    ("rows without recorded experts", "mismatch/rows_without_experts", "{:.2%}"),
)


def write_model(config: DeepseekV3Config, folder: Path, device: str, dtype: torch.dtype, sharpness: float) -> None:
    """Random weights, made on the device; `sharpness` is the spread of the logits."""
    model = build_model(config, seed=0, dtype=dtype, device=device)
    model.lm_head.weight.data *= sharpness
    save_pretrained(model, folder)


def sample(folder: Path, options: argparse.Namespace, vocabulary: int) -> list[CompletionGroup]:
    """Random prompts of `--prompt-tokens`, continued by the engine, which is then closed."""
    rng = random.Random(0)
    prompts = [
        Prompt(id=str(i), text="", token_ids=[rng.randrange(2, vocabulary) for _ in range(options.prompt_tokens)])
        for i in range(options.prompts)
    ]
    config = EngineConfig(
        kind=options.engine, transport="local", dtype=options.dtype,
        max_model_len=options.prompt_tokens + options.max_tokens,
        max_num_seqs=min(128, options.prompts * options.completions), sleep_while_learning=False,
    )  # fmt: skip
    engine = build_engine(config, str(folder))
    params = SamplingParams(
        num_completions=options.completions, max_tokens=options.max_tokens, stop_token_id=STOP, seed=0
    )
    groups = engine.generate(prompts, params)
    engine.close()
    del engine
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return groups


def to_samples(groups: list[CompletionGroup]) -> list[TrainingSample]:
    return [
        TrainingSample(
            token_ids=[*group.prompt.token_ids, *completion.token_ids],
            loss_mask=[False] * len(group.prompt.token_ids) + [True] * len(completion.token_ids),
            sampling_logprobs=[0.0] * len(group.prompt.token_ids) + completion.logprobs,
            expert_ids=completion.expert_ids,
        )
        for group in groups
        for completion in group.completions
    ]


@torch.no_grad()
def compare(model: Any, samples: list[TrainingSample], token_budget: int, *, replay: bool) -> dict[str, float]:
    device = model.lm_head.weight.device
    meter = MismatchMeter()
    for batch in pack(samples, token_budget, "token"):
        layout = SequenceLayout.from_lengths(list(batch.layout.lengths), device=device)
        assert batch.expert_ids_TLK is not None, "the engine recorded no experts"
        experts_TLK = batch.expert_ids_TLK.to(device)
        recorded = dict(zip(model.routers(), experts_TLK.unbind(1), strict=True)) if replay else None
        output = model(batch.ids_T.to(device), layout, replay=recorded)
        logprobs_N, _ = token_logprobs(
            output.hidden_TD[batch.predictors_N.to(device)], model.lm_head.weight, batch.targets_N.to(device),
            batch.temperatures_N.to(device),
        )  # fmt: skip
        meter.add(logprobs_N.cpu(), batch.sampling_logprobs_N)
        meter.add_experts(output.routing, experts_TLK, len(layout.lengths))
    return meter.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a preset or a folder with a config.json")
    parser.add_argument("--layers", type=int, default=0, help="cut to this many layers, 0 for all")
    parser.add_argument("--engine", choices=("vllm", "native"), default="native")
    parser.add_argument("--device", default="cpu", help="of the learner; vLLM decides for itself, native is on the CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=4, help="per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--sharpness", type=float, default=3.0, help="spread of the logits")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = find_config(options.preset)
    config = replace(config, num_nextn_predict_layers=0, num_hidden_layers=options.layers or config.num_hidden_layers)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(config, folder, options.device, dtype, options.sharpness)
        samples = to_samples(sample(folder, options, config.vocab_size))
        model = load_pretrained(folder, dtype=dtype, device=options.device)
    without, with_replay = (compare(model, samples, options.token_budget, replay=r) for r in (False, True))
    tokens = sum(sample.num_trained for sample in samples)
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{name}: {options.preset}, {config.num_hidden_layers} layers, {config.n_routed_experts} experts, "
          f"{options.engine}, {options.dtype}, {len(samples)} completions, {tokens} sampled tokens")  # fmt: skip
    print(f"{'':38}{'without replay':>16}{'with replay':>16}")
    for title, metric, form in ROWS:
        print(f"{title:38}{form.format(without[metric]):>16}{form.format(with_replay[metric]):>16}")


if __name__ == "__main__":
    main()
