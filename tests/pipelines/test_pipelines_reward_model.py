"""Reward models.

Pinned: (1) the head's rewards are those of transformers' sequence classifier with the same weights, for our model and a
dense one; (2) a step has the gradient of -log sigmoid(margin), and of centring, however pairs fall into micro-batches;
(3) the command learns a preference that held-out pairs confirm, and a run that lost its last checkpoint goes on to the
same numbers; (4) the folder is a reward, by file and by name, around 0, of the completion or of the answer alone.
"""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from grpo.metrics import read_metrics
from models import from_pretrained
from pipelines.pairs import Pair, as_sample
from pipelines.prompting import load_tokenizer
from pipelines.reward_model import RewardLearner, RewardModel, RewardModelConfig, reward_model
from pipelines.tasks import ledger
from rewards import Sample, load_reward
from tests.pipelines.conftest import ROOT, grpo

FLAGS = ("--max-length", 256, "--pairs-per-step", 16, "--lr", 1e-3, "--epochs", 2, "--heldout-share", 0.2)


def rows_of(count: int, seed: int) -> list[dict[str, str]]:
    """Preferred are two attempts, over four."""
    rows = []
    for row in ledger.make_rows(count, seed=seed):
        short, long = (ledger.document(row, attempts) for attempts in (2, 4))
        at = short.index("Assistant:") + len("Assistant:")
        rows.append({"prompt": short[:at], "chosen": short[at:], "rejected": long[at:]})
    return rows


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(100, seed=3)))
    return path


@pytest.fixture(scope="module")
def trained(base: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder."""
    out = tmp_path_factory.mktemp("rm") / "run"
    done = grpo("reward-model", "--model", base, "--data", pairs_file, "--out", out, *FLAGS, "--save-every", 5)
    assert done.status == 0, done.err
    assert "held-out pairs" in done.out
    return out


def dense(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_rewards_are_those_of_a_sequence_classifier(kind: str, base: Path, tmp_path: Path) -> None:
    folder = base if kind == "ours" else dense(tmp_path / "dense")
    made = RewardModel(from_pretrained(folder), mean=0.25)
    torch.manual_seed(1)
    made.score.data.normal_()
    (tmp_path / "rm").mkdir()
    made.write(tmp_path / "rm")
    (tmp_path / "rm" / "reward_model.json").write_text('{"mean": 0.25}')
    loaded = RewardModel.load(tmp_path / "rm", dtype=torch.float32, device=torch.device("cpu"))
    load: Any = AutoModelForSequenceClassification
    theirs = load.from_pretrained(tmp_path / "rm", num_labels=1, dtype=torch.float32)
    theirs.score.weight.data.copy_(made.score.data)
    sequences = [[5, 9, 100, 7], [8, 3], [40, 41, 42, 43, 44, 45]]
    with torch.no_grad():
        ours = loaded(sequences)
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in sequences])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours + 0.25, expected, atol=2e-5, rtol=1e-5)


def some_pairs(folder: Path, count: int) -> list[Pair]:
    tokenizer = load_tokenizer(str(folder))
    return [
        Pair(**{name: as_sample(row["prompt"], row[name], tokenizer) for name in ("chosen", "rejected")})
        for row in rows_of(count, seed=4)
    ]


@pytest.mark.parametrize("token_budget", [520, 4096])
def test_a_step_has_the_gradient_of_the_loss_written_down(token_budget: int, base: Path, tmp_path: Path) -> None:
    pairs = some_pairs(base, 5)
    config = RewardModelConfig(
        model=str(base), data="", max_length=256, token_budget=token_budget, grad_clip=1e9, center_coef=0.1
    )
    learner = RewardLearner(RewardModel(from_pretrained(base)), config, pairs, 1)
    torch.manual_seed(1)
    head = torch.randn_like(learner.model.score)
    learner.model.score.data.copy_(head)
    found: list[Tensor | None] = []
    learner.optimizer.step = lambda *_: found.extend(  # type: ignore[method-assign]
        None if p.grad is None else p.grad.clone() for p in learner.model.parameters()
    )
    report = learner.update(range(5))

    other = RewardModel(from_pretrained(base))
    other.score.data.copy_(head)
    rewards = [other([s.token_ids])[0] for kind in ("chosen", "rejected") for s in (getattr(p, kind) for p in pairs)]
    chosen, rejected = torch.stack(rewards).view(2, 5)
    loss = (-F.logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2).mean()
    loss.backward()
    assert report["rm/loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = [p.grad for p in other.parameters()]
    for ours, plain in zip(found, expected, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-3)
    assert expected[-1] is not None and expected[-1].abs().max() > 0.01


def test_command_learns_what_heldout_pairs_confirm(trained: Path) -> None:
    measured = json.loads((trained / "model" / "reward_model.json").read_text())
    assert measured["pairs"] == 20 and measured["accuracy"] >= 0.9 and measured["margin"] > 0.2
    rows = read_metrics(trained)
    assert len(rows) == 10 and rows[0]["rm/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["rm/loss"] < 0.6 and rows[-1]["rm/accuracy"] > 0.8


def test_resumed_run_ends_with_the_same_numbers(trained: Path, base: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_000010")
    arguments = ("reward-model", "--model", base, "--data", pairs_file, "--out", run, *FLAGS, "--save-every", 5)
    assert grpo(*arguments, "--resume").status == 0
    assert read_metrics(run) == read_metrics(trained)
    for name in ("model.safetensors", "score.safetensors", "reward_model.json"):
        assert (run / "model" / name).read_bytes() == (trained / "model" / name).read_bytes(), name


def samples(seed: int) -> list[Sample]:
    return [
        Sample(prompt=row["prompt"], completion=row[name])
        for row in rows_of(12, seed)
        for name in ("chosen", "rejected")
    ]


def test_the_folder_is_a_reward(trained: Path) -> None:
    path = ROOT / "pipelines" / "reward_model.py"
    spec = f"0.5*{path}:reward_model(folder='{trained / 'model'}', batch_size=5)"
    loaded = load_reward(spec)
    assert loaded.weight == 0.5 and loaded.name == "reward_model"
    values = [score.value for (score,) in loaded.score_groups([[one] for one in samples(seed=9)])]
    assert all(value is not None for value in values)
    better = sum(a > b for a, b in zip(values[::2], values[1::2], strict=True))  # type: ignore[operator]
    assert better >= 10
    measured = json.loads((trained / "model" / "reward_model.json").read_text())
    assert abs(sum(values) / len(values)) < measured["spread"], "the mean has been taken off"  # type: ignore[arg-type]


def test_the_command_line_knows_it_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["grpo.rewards"]["reward_model"].partition(":")
    assert (module, name) == (reward_model.__module__, reward_model.__name__)


def test_answer_alone_and_cut_off_completions(trained: Path) -> None:
    [whole] = samples(seed=9)[:1]
    prefix = "<think> a long thought </think>"
    thinking = replace(whole, prompt=whole.prompt, completion=prefix + whole.completion)
    answers = reward_model(str(trained / "model"), only_answer=True)
    everything = reward_model(str(trained / "model"))

    def value(function: Any, sample: Sample) -> float:
        score = function.score(sample)
        assert score.value is not None, score
        return score.value

    plain = Sample(prompt="q", completion="an answer")
    thought = Sample(prompt="q", completion=f"{prefix}an answer")
    assert value(answers, thought) == pytest.approx(value(everything, plain), abs=1e-6)
    assert value(everything, thinking) != value(everything, whole)
    cut = replace(whole, finish_reason="length")
    assert value(everything, cut) != value(everything, whole)


def test_refused(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"score\.safetensors"):
        reward_model(str(base))
    out = ("--out", tmp_path / "run")
    error = grpo("reward-model", "--model", base, "--data", pairs_file, *out, "--heldout-share", 0).one_line_error()
    assert "heldout_share" in error and not (tmp_path / "run").exists()
    one = tmp_path / "one.jsonl"
    one.write_text(pairs_file.read_text().splitlines()[0] + "\n")
    error = grpo("reward-model", "--model", base, "--data", one, *out).one_line_error()
    assert "none is left" in error and not (tmp_path / "run").exists()
