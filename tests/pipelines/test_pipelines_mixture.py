"""Mixtures of tasks in one run.

1. tasks come in the proportion of their weights, whatever the sizes of their data, and within a task every prompt once
   per epoch; the walk depends on the place alone, also for a curriculum
2. each prompt is judged by its own task's rewards, and metrics name the task
3. what cannot be meant is refused
4. `grpo zero --mixture` trains on both tasks, each with its reward
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from grpo.curriculum import Curriculum, CurriculumConfig
from pipelines.mixture import MixedSource, TaskRubric, parse_mixture
from pipelines.tasks import ledger
from rewards import Rubric, Sample, Score, reward
from rollout.sample import Prompt
from tests.pipelines.conftest import GSM8K, LOCAL, grpo

LARGE = [Prompt(id=f"a{i}", text="", token_ids=[1] * (i + 1)) for i in range(12)]
SMALL = [Prompt(id=f"b{i}", text="", token_ids=[2]) for i in range(3)]


def walk(source: MixedSource, count: int, at_once: int) -> list[str]:
    taken: list[str] = []
    place = 0
    while len(taken) < count:
        prompts, place = source.take(place, at_once)
        taken += [prompt.id for prompt in prompts]
    return taken


def test_weights_and_not_sizes_decide_how_often_a_task_comes():
    source = MixedSource({"a": LARGE, "b": SMALL}, [2, 1], seed=0)
    ids = walk(source, 36, at_once=3)
    assert all(Counter(name[0] for name in ids[at : at + 3]) == {"a": 2, "b": 1} for at in range(0, 36, 3))
    of_a, of_b = ([name for name in ids if name[0] == letter] for letter in "ab")
    for epoch in range(2):
        assert set(of_a[12 * epoch : 12 * (epoch + 1)]) == {prompt.id for prompt in LARGE}
    assert of_a[:12] != of_a[12:], "each epoch has an order of its own"
    assert all(set(of_b[at : at + 3]) == {"b0", "b1", "b2"} for at in range(0, 12, 3))


def test_the_walk_depends_on_place_and_seed_alone():
    ids = walk(MixedSource({"a": LARGE, "b": SMALL}, [2, 1], seed=0), 30, at_once=3)
    again = MixedSource({"a": LARGE, "b": SMALL}, [2, 1], seed=0)
    assert [prompt.id for prompt in again.take(27, 3)[0]] == ids[27:30]
    assert ids != walk(MixedSource({"a": LARGE, "b": SMALL}, [2, 1], seed=1), 30, at_once=3)
    assert len({prompt.id for prompt in again.take(0, 15)[0]}) == 15, "all there are, none twice"
    with pytest.raises(ValueError, match="16 different prompts are needed, the data has 15"):
        again.take(0, 16)


def test_a_curriculum_orders_a_mixture_too():
    source = MixedSource({"a": LARGE, "b": SMALL}, [1, 1], seed=0)
    prompts, _ = Curriculum(CurriculumConfig(short_first=True), source).take(0, 6, (), {})
    assert [len(prompt.token_ids) for prompt in prompts] == sorted(len(prompt.token_ids) for prompt in prompts)


@reward
def long(sample: Sample) -> Score:
    return Score(value=float(len(sample.completion)))


@reward
def yes(sample: Sample) -> float:
    return float(sample.completion == "yes")


def test_each_prompt_is_judged_by_its_own_task():
    rubric = TaskRubric({"a": Rubric([long]), "b": Rubric([yes])}, {"a0": "a", "b0": "b", "b1": "b"})
    samples = [Sample(prompt="", completion="yes", group_id=name) for name in ("b0", "a0", "b1")]
    scores = [score for (score,) in rubric.score_groups([[sample] for sample in samples])]
    assert [score.value for score in scores] == [1.0, 3.0, 1.0]
    assert scores[0].metrics == {"yes": 1.0, "b/yes": 1.0, "b/reward": 1.0}
    assert scores[1].metrics == {"long": 3.0, "a/long": 3.0, "a/reward": 3.0}
    assert [rubric.score(sample).value for sample in samples] == [1.0, 3.0, 1.0]


def test_a_mixture_is_read_and_checked():
    first, second = parse_mixture(("2*ledger=a=b.jsonl", "gsm8k"))
    assert (first.task.name, first.data, first.weight) == ("ledger", "a=b.jsonl", 2)
    assert (second.task.name, second.data, second.weight) == ("gsm8k", None, 1)
    for specs, message in (
        (("x*ledger",), "'x' is not a whole number above 0"),
        (("0*ledger",), "'0' is not a whole number above 0"),
        (("ledger", "2*ledger"), "names ledger twice"),
        (("leger",), "unknown task 'leger'"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", r"\*")):
            parse_mixture(specs)
    zero = ("zero", "--model", "m", "--mixture", "ledger", "--num-prompts", 9)
    assert "each task of a mixture has data" in grpo(*zero, "--data", "x.jsonl").one_line_error()
    assert "each task of a mixture has data" in grpo(*zero, "--reward", "math_answer").one_line_error()
    assert "say how many with --num-prompts" in grpo(*zero[:-2]).one_line_error()


def test_zero_trains_on_two_tasks(base: Path, tmp_path: Path):
    problems = tmp_path / "ledger.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in ledger.make_rows(40, seed=5)))
    flags = (
        *LOCAL, "--trainer.steps", 2, "--trainer.prompts-per-step", 6, "--trainer.completions-per-prompt", 2,
        "--trainer.max-tokens", 8, "--engine.max-model-len", 512, "--trainer.log-groups-every", 1,
        "--extra-reward", '0.5*language_consistency(language="en")',
    )  # fmt: skip
    run = tmp_path / "run"
    outcome = grpo("zero", "--model", base, "--mixture", f"2*ledger={problems}", f"gsm8k={GSM8K}", "--out", run, *flags)
    assert outcome.status == 0, outcome
    groups = [json.loads(line) for line in (run / "groups.jsonl").read_text().splitlines()]
    tasks = Counter(group["prompt_id"].rpartition("-")[0] for group in groups)
    assert tasks == {"ledger": 8, "gsm8k": 4}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("ledger/math_answer", "gsm8k/math_answer", "ledger/reward", "gsm8k/language_consistency"):
        assert all(f"reward/{name}" in row for row in rows), name
