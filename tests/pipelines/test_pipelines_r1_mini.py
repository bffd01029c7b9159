"""The R1 paper in miniature, at toy size.

Pinned: (1) every arm runs and leaves its numbers, and the report has all tables; (2) a second run repeats nothing but
the arm whose result was lost, with the same numbers; (3) an unfinished arm begins anew; (4) unknown arms
and a folder of another effort are refused; (5) both new tasks are learned from documents, the corpus holds
no held-out problem, and the coin knows nothing; (6) the intervals are Student's.
"""

import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from scipy.stats import t as student_t

from models import build_model
from pipelines.prompting import stop_token
from pipelines.r1_mini import results
from pipelines.r1_mini.arms import arms
from pipelines.r1_mini.controls import coin
from pipelines.r1_mini.effort import TOY, student
from pipelines.r1_mini.run import MiniConfig, run_r1_mini, wanted_arms
from pipelines.r1_mini.stages import documents, make_rows, new_tokenizer, problem, training_samples
from pipelines.supervised import SupervisedConfig, train_supervised
from rewards import Sample


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("r1") / "mini"
    assert run_r1_mini(MiniConfig(out=str(out), effort="toy", seeds=(0,))) == 0
    return out


def test_every_arm_leaves_its_numbers(toy: Path) -> None:
    found = json.loads((toy / "results.json").read_text())
    assert set(found) == set(arms(TOY)), "all arms, by name"
    for name, seeds in found.items():
        assert seeds["0"]["cpu_seconds"] >= 0, name
    assert found["ledger/zero"]["0"]["curve"]["accuracy"] and len(found["ledger/zero"]["0"]["curve"]["tokens"]) == 2
    report = (toy / "report.md").read_text()
    for line in ("ledger: RL from base", "control: SFT on own right samples", "| small |", "variables/zero", "never"):
        assert line in report
    assert report.count("not run") == 1, "the distillation of dense-256, which is there for RL's boundary alone"
    assert (toy / "countdown-mini-zero-thinking.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_corpus_and_prompts_hold_no_heldout_problem(toy: Path) -> None:
    for task in ("ledger", "countdown-mini", "variables"):
        folder = toy / "seed-0" / task / "base"
        heldout, prompts = (
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("heldout", "prompts")
        )
        assert not {problem(task, row) for row in heldout} & {problem(task, row) for row in prompts}
        corpus = (folder / "corpus.jsonl").read_text()
        assert not [row for row in heldout if f" {row['question']} " in corpus]


def test_only_a_lost_arm_is_run_again(toy: Path) -> None:
    lost = toy / "seed-0/ledger/cold/result.json"
    kept = {path: path.stat().st_mtime_ns for path in toy.glob("seed-0/**/result.json") if path != lost}
    before = json.loads(lost.read_text())
    lost.unlink()
    (lost.parent / "half").write_text("of an arm that was killed")
    run_r1_mini(MiniConfig(out=str(toy), effort="toy", seeds=(0,), arms=("ledger/cold-zero",), workers=1))
    assert json.loads(lost.read_text())["sampled"] == before["sampled"]
    assert not (lost.parent / "half").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(ValueError, match="holds arms of effort 'toy'"):
        run_r1_mini(MiniConfig(out=str(toy), effort="full"))


def test_arms_bring_what_they_need() -> None:
    wanted = wanted_arms(MiniConfig(effort="toy", arms=("student/on-policy",)))
    assert wanted == ["ledger/base", "ledger/zero", "traces", "student/dense-128", "student/on-policy"]
    with pytest.raises(ValueError, match="unknown arms ledger/sero; known: ledger/base"):
        MiniConfig(arms=("ledger/sero",))
    table = arms()
    order = list(table)
    assert all(order.index(need) < order.index(name) for name, arm in table.items() for need in arm.needs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", ["countdown-mini", "variables"])
def test_a_task_is_learned_from_its_documents(task: str, seed: int) -> None:
    """Format, arithmetic's range and what may follow what, in a few seconds; not yet the solutions."""
    torch.set_num_threads(1)
    pairs = documents(task, make_rows(task, 3300, seed, corpus=True), random.Random(seed))
    tokenizer = new_tokenizer(pairs)
    assert isinstance(tokenizer.pad_token_id, int)
    sizes = student(32).with_vocabulary(len(tokenizer), bos=None, eos=stop_token(tokenizer), pad=tokenizer.pad_token_id)
    model, samples = build_model(sizes, seed=seed), training_samples(pairs, tokenizer)
    config = SupervisedConfig(steps=50, samples_per_step=64, lr=1e-2, warmup_steps=10, device="cpu", seed=seed)
    result = train_supervised(model, samples[:3200], config, heldout=samples[3200:])
    assert result.heldout_loss is not None and result.heldout_loss < {"countdown-mini": 3.2, "variables": 2.0}[task]


def test_the_coin_knows_nothing_and_is_fair() -> None:
    def toss(completion: str, index: int) -> float:
        return coin(Sample(prompt="", completion=completion, group_id="g", index=index, step=3))

    values = [toss("a", index) for index in range(2000)]
    assert values == [toss("b", index) for index in range(2000)]
    assert set(values) == {0.0, 1.0} and abs(fmean(values) - 0.5) < 5 * 0.5 / 2000**0.5


def test_intervals_are_students() -> None:
    for degrees, quantile in results.T_QUANTILES.items():
        assert quantile == pytest.approx(student_t.ppf(0.975, degrees), abs=6e-4)
    values = [0.9, 0.96, 0.93]
    low, high = student_t.interval(0.95, 2, fmean(values), stdev(values) / math.sqrt(3))
    assert results.interval(values) == pytest.approx((low, high), abs=1e-4)
    assert results.number([1.0, 1.0, 0.97])["high"] == 1.0
    assert results.interval([0.5]) == (-math.inf, math.inf)


def test_when_a_threshold_is_reached() -> None:
    assert results.steps_to([0.1, 0.5, 0.9, 0.8], 0.5) == 1 and results.steps_to([0.1, 0.2], 0.5) == 2
    assert results.tokens_to([(10, 0.2), (20, 0.7)], 0.7) == 20 and results.tokens_to([(10, 0.2)], 0.7) == math.inf
