"""Pins the vLLM engine on a GPU, each engine in a process of its own: MoE with latent attention, and a dense model.

1. Every token of a request has a draw of its own, whatever the scheduler does ahead; paused requests go on with theirs.
2. After a sync, asleep or not in between, the engine scores as the learner does, to bfloat16's rounding.
3. Recorded experts are those of the learner, but for a few near ties.
"""

import copy
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models import SequenceLayout, TransformersCausalLM, build_model, find_config, from_pretrained, save_pretrained
from models.checkpoint import hf_tensors
from rollout.engine import EngineConfig
from rollout.sample import Prompt, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, this machine has none"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PARAMS = SamplingParams(num_completions=4, max_tokens=40, stop_token_id=0)
PROMPTS = [Prompt(id=f"p{i}", text="", token_ids=[5 + i, 7, 11 * i + 2, 3]) for i in range(6)]


def write_dense(folder: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=640, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def write_moe(folder: Path) -> None:
    config = find_config("tiny-mla512").with_vocabulary(640, bos=None, eos=1, pad=0)
    save_pretrained(build_model(config, seed=0), folder)


def observe(folder: str, sleep: bool) -> dict[str, Any]:
    """Runs in a process of its own, where vLLM starts once."""
    import rollout.vllm_sampling as vllm_sampling
    from rollout.engine import build_engine

    draws: list[tuple[int, int]] = []
    uniforms = vllm_sampling.uniforms

    def watched(seeds: Any, places: Any, count: int) -> torch.Tensor:
        draws.extend(zip(seeds, places, strict=True))
        return uniforms(seeds, places, count)

    vllm_sampling.uniforms = watched
    config = EngineConfig(
        kind="vllm", transport="local", dtype="bfloat16", max_model_len=128, max_num_seqs=16, gpu_memory_share=0.2,
        sleep_while_learning=sleep,
    )  # fmt: skip
    engine = build_engine(config, folder)
    groups = engine.generate(PROMPTS, PARAMS)
    sampled = list(draws)
    learner = from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    if sleep:
        engine.sleep()
        engine.wake("weights")
    tensors = learner.hf_tensors() if isinstance(learner, TransformersCausalLM) else hf_tensors(learner)
    engine.load_weights(tensors, 1)
    engine.wake("kv_cache")
    again = engine.generate(PROMPTS, PARAMS)
    differences, other = [], []
    for group in again:
        for completion in group.completions:
            ids_T = torch.tensor([*group.prompt.token_ids, *completion.token_ids], device="cuda")
            layout = SequenceLayout.from_lengths([len(ids_T)], device="cuda")
            with torch.no_grad():
                output = learner(ids_T, layout)
                logprobs_TV = learner.lm_head(output.hidden_TD).float().log_softmax(-1)
            ours = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)[len(group.prompt.token_ids) - 1 :]
            differences += (ours.cpu() - torch.tensor(completion.logprobs)).abs().tolist()
            if completion.expert_ids is not None:
                chosen = torch.stack([output.expert_ids[layer] for layer in sorted(output.expert_ids)], dim=1)
                ours_TLK = np.sort(chosen[:-1].cpu().numpy(), axis=-1)
                other.append((ours_TLK != np.sort(completion.expert_ids, axis=-1)).any(-1).mean())
    engine.close()
    lengths = {c.seed: len(c.token_ids) for group in groups for c in group.completions}
    return {"draws": sampled, "lengths": lengths, "differences": differences, "other": other}


@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "asleep"])
@pytest.mark.parametrize("shape", ["moe", "dense"])
def test_engine(shape: str, sleep: bool, tmp_path: Path) -> None:
    if (shape, sleep) == ("dense", True):
        pytest.skip("a second start of vLLM that adds nothing to the other three")
    (write_moe if shape == "moe" else write_dense)(tmp_path / "model")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        seen = process.submit(observe, str(tmp_path / "model"), sleep).result()
    places: dict[int, list[int]] = {}
    for seed, place in seen["draws"]:
        places.setdefault(seed, []).append(place)
    for seed, length in seen["lengths"].items():
        drawn = copy.copy(places[seed])
        assert drawn[:length] == list(range(length)), "one draw for each token, in order"
    assert sum(seen["differences"]) / len(seen["differences"]) < 0.03
    if shape == "moe":
        assert len(seen["other"]) == len(PROMPTS) * PARAMS.num_completions
        assert sum(seen["other"]) / len(seen["other"]) < 0.1
