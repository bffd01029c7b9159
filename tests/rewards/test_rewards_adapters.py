"""Functions in the forms of TRL, verl and OpenRLHF work as they are; the forms are those of their documentation."""

from pathlib import Path

import pytest

from rewards import Sample, Score, ScoreStatus, from_openrlhf, from_trl, from_verl, load_reward

GROUP = [
    Sample(prompt="2+2?", completion=text, completion_ids=(1,) * len(text), row=row, group_id="g", index=i, step=7)
    for i, (text, row) in enumerate([("4", {"answer": "4", "prompt": "p"}), ("five", {"answer": "4", "level": 2})])
]


def values(function) -> list:
    return [score.value for score in function.score_groups([GROUP])[0]]


def parts(function, part: str) -> list:
    return [dict(getattr(score, part)) for score in function.score_groups([GROUP])[0]]


def test_trl_with_everything_it_passes() -> None:
    def accuracy(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, **kwargs):
        assert prompts == ["2+2?", "2+2?"] and [len(ids) for ids in completion_ids] == [1, 4]
        assert trainer_state.global_step == 7
        assert kwargs == {"level": [None, 2]}, "the columns prompt and completion go in the plural"
        right = [float(text == gold) for text, gold in zip(completions, answer, strict=True)]
        log_metric("accuracy", sum(right) / 2)
        log_extra("parsed", completions)
        return [right[0], None]

    wrapped = from_trl(accuracy, weight=0.5)
    assert (wrapped.name, wrapped.weight, wrapped.batch) == ("accuracy", 0.5, True)
    assert values(wrapped) == [1.0, None]
    assert parts(wrapped, "metrics") == [{"accuracy": 0.5}] * 2
    assert parts(wrapped, "info") == [{"parsed": "4"}, {"parsed": "five"}]


def test_trl_conversational_async_and_without_kwargs() -> None:
    def length(completions: list) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    async def later(prompts: list, **kwargs: object) -> list[float]:
        return [float(prompt[-1]["role"] == "user") for prompt in prompts]

    assert values(from_trl(length, conversational=True)) == [1.0, 4.0]
    assert values(from_trl(later, conversational=True, timeout_s=5)) == [1.0, 1.0]


def test_trl_wrong_length() -> None:
    scores = from_trl(lambda completions, **kwargs: [1.0]).score_groups([GROUP])[0]
    assert [score.status for score in scores] == [ScoreStatus.ERROR] * 2
    assert "the list of rewards must have 2 entries, one per sample, got 1" in scores[0].info["error"]


def test_verl() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        assert (data_source, extra_info["answer"]) == ("mine", "4")
        right = solution_str == ground_truth
        return {"score": float(right), "acc": right, "pred": solution_str}

    wrapped = from_verl(compute_score, data_source="mine")
    assert values(wrapped) == [1.0, 0.0]
    assert parts(wrapped, "metrics") == [{"acc": 1.0}, {"acc": 0.0}]
    assert parts(wrapped, "info") == [{"pred": "4"}, {"pred": "five"}]


def test_verl_rows_async_and_mistakes() -> None:
    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "7"}, "extra_info": {"index": 3}}

    async def score(data_source, solution_str, ground_truth, extra_info, **kwargs) -> float:
        assert (data_source, extra_info) == ("gsm8k", {"index": 3})
        return float(solution_str == ground_truth)

    assert from_verl(score).score(Sample(prompt="", completion="7", row=row)).value == 1.0
    missing = from_verl(score).score(Sample(prompt="", completion="7", row={"gold": "7"}))
    message = "no column 'answer' for the ground truth; from_verl(f, ground_truth=...); columns: gold"
    assert message in missing.info["error"]
    wrong = from_verl(lambda solution_str: {"reward": 1}).score(GROUP[0])
    assert "returns a number or a dict with 'score', got keys reward" in wrong.info["error"]


class Tensor(list):
    """Has what the adapters use of a torch tensor."""

    def tolist(self) -> list:
        return list(self)


def test_openrlhf() -> None:
    def reward_func(queries, prompts, labels, **kwargs):
        assert queries == ["2+2?4", "2+2?five"]
        right = Tensor(float(q[len(p) :] == label) for q, p, label in zip(queries, prompts, labels, strict=True))
        return {"rewards": right, "scores": right, "extra_logs": {"format": Tensor([0.5, 0.25]), "temperature": 1.0}}

    assert values(from_openrlhf(reward_func)) == [1.0, 0.0]
    assert parts(from_openrlhf(reward_func), "metrics") == [
        {"format": 0.5, "temperature": 1.0, "score": 1.0},
        {"format": 0.25, "temperature": 1.0, "score": 0.0},
    ]
    assert values(from_openrlhf(lambda queries, prompts, labels: Tensor([0.5, 1.0]))) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"reward": [1, 2]}, "'rewards' is missing from the answer; it has reward"),
        ({"rewards": [1.0]}, "'rewards' must have 2 entries, one per sample, got 1"),
        ({"rewards": [1.0, 0.0], "extra_logs": {"x": [1.0]}}, "x must have 2 entries"),
        ("no", "'rewards' must be a list of numbers, got str: 'no'"),
    ],
)
def test_openrlhf_mistakes(returned: object, message: str) -> None:
    scores = from_openrlhf(lambda queries: returned).score_groups([GROUP])[0]
    assert all(message in score.info["error"] for score in scores)
    score = from_openrlhf(lambda queries: [1.0], label="gold").score(GROUP[0])
    assert "no column 'gold' for the labels; pass label=...; columns: answer, prompt" in score.info["error"]


def test_adapted_functions_of_a_file_can_be_isolated(tmp_path: Path) -> None:
    path = tmp_path / "theirs.py"
    path.write_text(
        "import time\nfrom rewards import from_trl, from_verl\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    time.sleep(60 if solution_str == 'hang' else 0)\n"
        "    return {'score': solution_str == ground_truth}\n"
        "def trl(completions, **kwargs):\n    return [len(text) for text in completions]\n"
        "judged = from_verl(compute_score, timeout_s=0.5)\n"
        "lengths = from_trl(trl, timeout_s=5)\n"
    )
    judged = load_reward(f"{path}:judged")
    hanging = Sample(prompt="", completion="hang", row={"answer": "4"})
    scores: list[Score] = judged.score_groups([[*GROUP, hanging]])[0]
    assert [score.value for score in scores] == [1.0, 0.0, None]
    assert scores[2].status is ScoreStatus.TIMEOUT
    assert values(load_reward(f"{path}:lengths")) == [1.0, 4.0]
