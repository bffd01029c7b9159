"""The supervised loop, against transformers and against itself.

Pinned: (1) loss, held-out loss and gradient of a packed batch are transformers' own for labels of -100, sequence by
sequence, mean over all trained tokens, for a dense model and for ours, whatever the micro-batches; (2) one step from
there is torch's AdamW; (3) with bfloat16 weights, small updates add up, and the gradient is float32's but for rounding;
(4) early stopping keeps the best weights; (5) a run goes on from a checkpoint bit by bit; (6) a batch without a finite
gradient leaves the weights alone.
"""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo.batch import TrainingSample
from grpo.checkpoint import checkpoints
from grpo.metrics import read_metrics
from models import build_model, find_config, from_pretrained, hf_tensors, save_pretrained
from pipelines.supervised import SupervisedConfig, train_supervised
from pipelines.supervised_learner import SupervisedLearner
from pipelines.token_store import TokenStore

VOCABULARY = 64


def samples(count: int, seed: int) -> list[TrainingSample]:
    """Digits that count up from a random one, after a prompt of random length; some prompts are most of the sample."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, answer, first = rng.randrange(1, 9), rng.randrange(1, 20), rng.randrange(5, 40)
        ids = [first + i % 7 for i in range(prompt + answer)]
        mask = [i >= prompt for i in range(prompt + answer)]
        made.append(TrainingSample(token_ids=ids, loss_mask=mask, sampling_logprobs=[0.0] * len(ids)))
    return made


def store_of(some: list[TrainingSample]) -> TokenStore:
    return TokenStore.of((sample.token_ids, sample.loss_mask) for sample in some)


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "dense":
        torch.manual_seed(0)
        sizes: Any = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        Qwen2ForCausalLM(config).save_pretrained(path)
    else:
        sizes = find_config("tiny").with_vocabulary(VOCABULARY, bos=None, eos=1, pad=0)
        save_pretrained(build_model(sizes, seed=0), path)
    return path


def reference_gradient(folder: Path, some: list[TrainingSample]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' loss of each sequence alone, token mean over all of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = sum(sample.num_trained for sample in some)
    loss = 0.0
    for sample in some:
        ids, mask = torch.tensor([sample.token_ids]), torch.tensor([sample.loss_mask])
        part = model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss * sample.num_trained / total
        part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("token_budget", [40, 10_000])
def test_loss_and_gradient_are_transformers(folder: Path, token_budget: int) -> None:
    some = samples(12, seed=1)
    loss, gradients = reference_gradient(folder, some)
    model, store = from_pretrained(folder), store_of(some)
    learner = SupervisedLearner(model, SupervisedConfig(token_budget=token_budget), total_steps=1)
    assert learner.loss(store) == pytest.approx(loss, rel=1e-5)
    ours, _ = learner.add_gradient(store, range(len(store)))
    assert ours.item() == pytest.approx(loss, rel=1e-5)
    of_ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = set(of_ours) & set(gradients)
    assert len(names) > 10 and "model.embed_tokens.weight" in names
    for name in names:
        torch.testing.assert_close(of_ours[name], gradients[name], rtol=1e-3, atol=2e-6, msg=name)


def test_a_step_is_that_of_adamw(folder: Path) -> None:
    some = samples(8, seed=2)
    _, gradients = reference_gradient(folder, some)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    model, store = from_pretrained(folder), store_of(some)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    config = SupervisedConfig(lr=1e-3, weight_decay=0.1, grad_clip=norm.item() / 2, lr_decay="constant")
    metrics = SupervisedLearner(model, config, total_steps=1).update(store, range(len(store)))
    assert metrics["optimizer/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, after in model.named_parameters():
        if name not in gradients:
            continue
        clipped = gradients[name] / 2
        wanted = before[name] * (1 - 1e-3 * (0.1 if after.dim() > 1 else 0.0)) - 1e-3 * clipped / (clipped.abs() + 1e-8)
        certain = clipped.abs() > 1e-5  # the step of a tiny gradient is its sign, which rounding decides
        torch.testing.assert_close(after[certain], wanted[certain], rtol=1e-3, atol=1e-5, msg=name)


def test_small_updates_of_bfloat16_weights_add_up(folder: Path) -> None:
    some = samples(32, seed=3)
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = from_pretrained(folder, dtype=dtype)
        start = from_pretrained(folder, dtype=dtype)
        config = SupervisedConfig(steps=30, samples_per_step=16, lr=1e-4, lr_decay="constant", token_budget=64)
        result = train_supervised(model, some, config)
        moves = [(now - then).float() for (_, now), (_, then) in zip(hf_tensors(model), hf_tensors(start), strict=True)]
        runs[dtype] = result.loss, torch.cat([move.flatten() for move in moves if move.dim() > 1])
    assert runs[torch.bfloat16][0] == pytest.approx(runs[torch.float32][0], rel=0.03)
    # Updates of 1e-4 are below the rounding of most weights: rounded at each step, they would be lost.
    assert torch.cosine_similarity(*(moves for _, moves in runs.values()), dim=0) > 0.8


def test_early_stopping_keeps_the_best_weights(folder: Path, tmp_path: Path) -> None:
    train, heldout = samples(8, seed=4), samples(30, seed=5)
    model = from_pretrained(folder)
    config = SupervisedConfig(steps=400, samples_per_step=8, lr=3e-3, eval_every=4, patience=3, lr_decay="constant")
    result = train_supervised(model, train, config, heldout=heldout, run_dir=tmp_path)
    curve = {row["step"] + 1: row["loss/heldout"] for row in read_metrics(tmp_path) if "loss/heldout" in row}
    assert result.stopped_early and result.steps == result.best_step + 12 < 400, (
        "eight samples are soon learnt by heart"
    )
    assert result.best_step == min(curve, key=curve.__getitem__) and result.heldout_loss == min(curve.values())
    kept = SupervisedLearner(model, config, total_steps=1).loss(store_of(heldout))
    assert kept == pytest.approx(result.heldout_loss, rel=1e-6) and kept < curve[result.steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    train, heldout = samples(40, seed=6), samples(10, seed=7)
    config = SupervisedConfig(
        steps=12, samples_per_step=8, lr=1e-2, warmup_steps=3, eval_every=2, patience=2, save_every=5,
        curriculum_share=0.5, balance_speed=1e-2,
    )  # fmt: skip
    whole = from_pretrained(folder, dtype=dtype)
    result = train_supervised(whole, train, config, heldout=heldout, run_dir=tmp_path / "run")
    last = checkpoints(tmp_path / "run")[-1]
    assert int(last.name.removeprefix("step_")) < result.steps
    again = from_pretrained(folder, dtype=dtype)
    assert (
        train_supervised(again, train, replace(config, resume=True), heldout=heldout, run_dir=tmp_path / "run")
        == result
    )
    for (name, one), (_, other) in zip(hf_tensors(whole), hf_tensors(again), strict=True):
        assert torch.equal(one, other), name


def test_a_gradient_that_is_not_finite_ends_the_run_and_moves_nothing(folder: Path) -> None:
    model = from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[10] = math.inf
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 1: gradient norm nan"):
        train_supervised(model, samples(8, seed=8), SupervisedConfig(samples_per_step=8))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    model = build_model(find_config("tiny"), seed=0)
    some = samples(8, seed=9)
    silent = [replace(sample, loss_mask=[False] * len(sample.token_ids)) for sample in some]
    with pytest.raises(ValueError, match="no sample has a token to train"):
        train_supervised(model, silent, SupervisedConfig(samples_per_step=8))
    with pytest.raises(ValueError, match="need held-out samples"):
        train_supervised(model, some, SupervisedConfig(samples_per_step=8, eval_every=1, patience=1))
    with pytest.raises(ValueError, match="samples_per_step=64 exceeds the 8 samples"):
        train_supervised(model, some, SupervisedConfig())
    with pytest.raises(ValueError, match="exceeds token_budget=4; raise the budget"):
        train_supervised(model, some, SupervisedConfig(samples_per_step=8, token_budget=4))
    with pytest.raises(ValueError, match="patience=1 counts evaluations: set eval_every"):
        SupervisedConfig(patience=1)
