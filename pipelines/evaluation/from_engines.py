"""Completions of a checkpoint, sampled by the engines that training uses."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from grpo.samples import Decode
from pipelines.evaluation.samples import Drawn, cut_at_stop
from rollout.pool import StreamingPool
from rollout.sample import FinishReason, Prompt, SamplingParams
from rollout.stream import Key, requests_of


def sample_engines(
    pool: StreamingPool,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    decode: Decode,
    *,
    done: AbstractSet[Key] = frozenset(),
    stop: Sequence[str] = (),
) -> Iterator[Drawn]:
    """`params.num_completions` of each prompt but those in `done`, as they finish.

    Each has a seed of its own from its prompt's id and its index, so what is sampled does not depend on what is in
    `done`. Engines know a stop token only; text from the first stop string on is cut off here.
    """
    groups = [[request for request in requests_of(prompt, params) if request.key not in done] for prompt in prompts]
    for sampled in pool.stream([requests for requests in groups if requests], params, None):
        completion = sampled.completion
        text, stopped = cut_at_stop(decode([completion.token_ids])[0], stop)
        failed = completion.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH)
        yield Drawn(
            prompt_id=sampled.prompt_id,
            index=sampled.index,
            text=text,
            token_ids=completion.token_ids,
            tokens=len(completion.token_ids),
            finish_reason="error" if failed else "stop" if stopped else completion.finish_reason.value,
            failure="engine" if failed else "",
            error="the engine could not finish it" if failed else "",
        )
