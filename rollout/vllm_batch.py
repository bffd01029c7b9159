"""The requests that vLLM works on: ours on the way in, completions on the way out."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollout.engine import check_prompt_lengths
from rollout.sample import FinishReason, SamplingParams
from rollout.stream import Request, Sampled, outcome
from rollout.vllm_sampling import take_kept

if TYPE_CHECKING:
    from rollout.vllm_engine import VLLMEngine


class VLLMBatch:
    """Implements `rollout.engine.Batch` with vLLM's scheduler, which queues what has no place yet."""

    room = sys.maxsize

    def __init__(self, engine: "VLLMEngine", params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._core: Any = engine.llm.llm_engine
        self._running: dict[str, tuple[Request, str]] = {}
        """Our request id -> the request, and vLLM's id for it."""

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, requests: Sequence[Request]) -> None:
        check_prompt_lengths(requests, self._engine.max_model_len)
        for request in requests:
            name = f"{request.prompt_id}/{request.index}"
            tokens = {"prompt_token_ids": request.prompt_token_ids + request.sampled_token_ids}
            params = self._engine.sampling_params(request, self._params)
            self._running[name] = request, self._core.add_request(name, tokens, params)

    def step(self) -> list[Sampled]:
        finished = []
        for output in self._core.step():
            request, _ = self._running.pop(output.request_id)
            only = output.outputs[0]
            # It says "stop" for every token that it was told to stop at.
            reason = "paused" if only.token_ids[-1] in self._params.turn_token_ids else only.finish_reason
            finished.append(
                outcome(
                    request,
                    list(only.token_ids),
                    list(only.logprobs.logprobs),
                    FinishReason(reason) if reason in ("stop", "length", "paused") else FinishReason.ERROR,
                    self._engine.version,
                    self._engine.recorder.take(output) if self._engine.recorder else None,
                    take_kept(self._engine.kept, request, len(only.token_ids)),
                )
            )
        return finished

    def pause(self) -> list[Sampled]:
        states = self._core.output_processor.request_states
        left = []
        for request, name in self._running.values():
            token_ids = list(states[name].detokenizer.output_token_ids)
            logprobs = list(states[name].logprobs_processor.logprobs.logprobs)
            kept = take_kept(self._engine.kept, request, len(token_ids))
            left.append(outcome(request, token_ids, logprobs, FinishReason.PAUSED, self._engine.version, kept_ids=kept))
        self._core.abort_request(list(self._running))
        if self._engine.recorder:
            for name in self._running:
                self._engine.recorder.forget(name)
        self._running.clear()
        return left
