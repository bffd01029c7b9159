"""Rules of `grpo doctor RUN`, with made-up curves that trigger them and that do not."""

import pytest

from pipelines.doctor_rules import Curves, entropy_collapse, flat_groups, reward_hacking, throughput_loss, truncation


def curves(**series: list[float]) -> Curves:
    names = {name.replace("__", "/"): values for name, values in series.items()}
    steps = range(len(next(iter(names.values()))))
    return Curves(rows=[{"step": i} | {n: v[i] for n, v in names.items()} for i in steps])


LOW, FLAT = [1.0] * 10 + [0.01] * 30, [0.5] * 40


@pytest.mark.parametrize(
    ("rule", "bad", "good", "since"),
    [
        (
            truncation,
            curves(completion__truncated=[0.0] * 20 + [0.5] * 20),
            curves(completion__truncated=FLAT[:3] + [0.0] * 37),
            "since step 20",
        ),
        (
            flat_groups,
            curves(groups__without_spread=[0.1] * 9 + [0.9] * 9, reward__mean=[0.5] * 18),
            curves(groups__without_spread=[0.9] * 9, reward__mean=[1.0] * 9),
            "since step 9",
        ),
        (
            entropy_collapse,
            curves(policy__entropy=LOW, reward__mean=FLAT),
            curves(policy__entropy=LOW, reward__mean=[0.5] * 10 + [1.0] * 30),
            "since step 14",
        ),
        (
            throughput_loss,
            curves(speed__rollout_tokens_per_s=[100.0] * 30 + [10.0] * 30),
            curves(speed__rollout_tokens_per_s=[100.0] * 60),
            "since step",
        ),
    ],
)
def test_rules(rule, bad: Curves, good: Curves, since: str) -> None:
    found = rule(bad)
    assert found.level == "warning" and since in found.text and found.remedy, found
    assert rule(good).level == "ok"


def test_reward_hacking_names_what_rose() -> None:
    run = curves(reward__mean=[0.9] * 20 + [0.3] * 20, reward__form=[0.1] * 20 + [0.9] * 20)
    found = reward_hacking(run)
    assert found is not None and found.level == "warning" and "reward/form rose from 0.10 to 0.90" in found.text
