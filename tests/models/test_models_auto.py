"""Other architectures behind our interface. Pinned, for random tiny models of five families, fp32 on CPU:

1. logits of packed sequences equal transformers' own, one sequence at a time and in right-padded batches, within 1e-5;
2. so do the gradients of every parameter, relative;
3. sliding windows shorter than a sequence change neither;
4. what the interface cannot express is refused when the model is loaded.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import models
from grpo.batch import TrainingSample
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import SequenceLayout, TransformersCausalLM, hf_tensors
from models.auto import load_hf_tensors
from models.checkpoint import tensor_shapes
from models.presets import TINY

LENGTHS = [20, 13, 1, 30]
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2_tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "soft cap": (lambda: transformers.Gemma2Config(**SIZES, head_dim=16), "final_logit_softcapping=30"),
    "scaled logits": (lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0), "more than hidden states times"),
    "experts": (lambda: transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16), "has experts"),
    "head with bias": (lambda: transformers.PhiConfig(**SIZES), "bias-free lm_head"),
}


def reference_model(config: Any, seed: int = 0) -> Any:
    """Random weights far from zero, so that position and context matter."""
    torch.manual_seed(seed)
    reference = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return reference


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (n,), generator=generator) for n in LENGTHS]


def gradients(model: torch.nn.Module, logits_TV: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every logit differently."""
    weights_TV = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits_TV * weights_TV).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_equals_separate_and_padded(family: str) -> None:
    reference = reference_model(CONFIGS[family]())
    model = TransformersCausalLM(copy.deepcopy(reference))
    ids = sequences()
    packed_TV = model.lm_head(model(torch.cat(ids), SequenceLayout.from_lengths(LENGTHS)).hidden_TD)
    separate_TV = torch.cat([reference(x[None], use_cache=False).logits[0] for x in ids])
    mask_BS = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids_BS = pad_sequence(ids, batch_first=True)
    padded_TV = reference(ids_BS, attention_mask=mask_BS.long(), use_cache=False).logits[mask_BS]

    assert separate_TV.abs().max() > 2, "logits too flat to show an error"
    assert (packed_TV - separate_TV).abs().max() < 1e-5
    assert (packed_TV - padded_TV).abs().max() < 1e-5
    ours = gradients(model, packed_TV)
    for theirs in (gradients(reference, separate_TV), gradients(reference, padded_TV)):
        assert ours.keys() == theirs.keys()
        for name, grad in theirs.items():
            assert (ours[name] - grad).norm() < 1e-5 * grad.norm(), name


@pytest.mark.parametrize("family", ["qwen2_window", "gemma3"])
def test_the_window_is_shorter_than_the_sequences(family: str) -> None:
    """Else the test above would say nothing about windows."""
    windowed = reference_model(CONFIGS[family]())
    config = CONFIGS[family]()
    config.sliding_window = 64
    open_model = reference_model(config)
    ids = sequences()[3][None]
    assert (windowed(ids).logits - open_model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", CONFIGS)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    reference = reference_model(CONFIGS[family]())
    tokens_BS = torch.stack([x[:10] for x in sequences() if len(x) >= 10])
    expected_BSV = reference(tokens_BS, use_cache=False).logits
    models.save_pretrained(TransformersCausalLM(reference), tmp_path / "saved")
    model = models.from_pretrained(tmp_path / "saved", dtype=torch.float32, device="cpu")
    logits_BSV = model.logits(tokens_BS)
    assert isinstance(model, TransformersCausalLM)
    assert (logits_BSV - expected_BSV).abs().max() < 1e-5
    assert {name: list(x.shape) for name, x in hf_tensors(model)} == tensor_shapes(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(plain(tokens_BS, use_cache=False).logits, expected_BSV)


def test_our_architecture_gives_our_model(tmp_path: Path) -> None:
    model = models.DeepseekV3ForCausalLM(TINY)
    model.init_weights(0)
    models.save_pretrained(model, tmp_path / "saved")
    back = models.from_pretrained(tmp_path / "saved", dtype=torch.float32, device="cpu")
    tokens_BS = torch.arange(12).view(2, 6)
    assert isinstance(back, models.DeepseekV3ForCausalLM)
    assert torch.equal(back.logits(tokens_BS), model.logits(tokens_BS))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        TransformersCausalLM(reference_model(config()))


def test_a_model_whose_packed_sequences_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under attention kernels that build no mask from positions."""
    reference = reference_model(CONFIGS["qwen2_window"]())
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match="sees the one packed before it"):
        TransformersCausalLM(reference)


def test_wrong_folders_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.from_pretrained(tmp_path)
    reference = reference_model(CONFIGS["llama"]())
    del reference.model.layers[1].mlp.up_proj.weight
    reference.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        models.from_pretrained(tmp_path / "broken")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(ValueError, match="no_such_thing"):
        models.from_pretrained(tmp_path / "unknown")


def test_loading_weights_is_strict() -> None:
    model = TransformersCausalLM(reference_model(CONFIGS["qwen2_tied"]()))
    other = TransformersCausalLM(reference_model(CONFIGS["qwen2_tied"](), seed=5))
    tokens_BS = torch.arange(12).view(2, 6)
    assert not torch.equal(model.logits(tokens_BS), other.logits(tokens_BS))
    load_hf_tensors(model, hf_tensors(other), "other")
    assert torch.equal(model.logits(tokens_BS), other.logits(tokens_BS))
    tensors = dict(hf_tensors(other))
    with pytest.raises(ValueError, match=r"here: lacks 1 tensors of the model: model\.norm\.weight"):
        load_hf_tensors(model, [x for x in tensors.items() if x[0] != "model.norm.weight"], "here")
    with pytest.raises(ValueError, match="no such tensor"):
        load_hf_tensors(model, (tensors | {"extra": torch.zeros(1)}).items(), "here")
    with pytest.raises(ValueError, match=r"shape \[3\], the model has \[48\]"):
        load_hf_tensors(model, (tensors | {"model.norm.weight": torch.zeros(3)}).items(), "here")


def test_the_learner_trains_it(tmp_path: Path) -> None:
    """The loss falls, the reference for KL stays put, and a checkpoint continues bitwise."""
    samples = [
        TrainingSample(
            token_ids=x.tolist(), loss_mask=[False] + [True] * (len(x) - 1), sampling_logprobs=[0.0] * len(x),
            advantage=1.0,
        ) for x in sequences() if len(x) > 1
    ]  # fmt: skip
    config = LearnerConfig(lr=1e-2, objective=ObjectiveConfig(kl_coef=0.1, clip_high=1e9))

    def learner() -> Learner:
        return Learner(TransformersCausalLM(reference_model(CONFIGS["qwen2_tied"]())), config, total_steps=4)

    first, second = learner(), learner()
    before = first.score([x.tolist() for x in sequences()])
    reports = [first.update(samples) for _ in range(2)]
    after = first.score([x.tolist() for x in sequences()])
    assert reports[0]["policy/kl_to_reference"] < 1e-6 < 1e-3 < reports[1]["policy/kl_to_reference"]
    assert sum(map(sum, after)) > sum(map(sum, before))
    save_checkpoint(tmp_path, first, 2, {"place": 7})
    assert load_checkpoint(tmp_path, second) == (2, {"place": 7})
    first.update(samples)
    second.update(samples)
    for (name, ours), (_, theirs) in zip(first.named_weights(), second.named_weights(), strict=True):
        assert torch.equal(ours, theirs), name
