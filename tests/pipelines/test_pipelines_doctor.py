"""`grpo doctor --lr0`.

Pinned: (1) a healthy recipe passes, from a run's config file and by name, leaving nothing behind; (2) a learner whose
weights move, an engine that holds another weight, an engine that records other probabilities than it sampled from and
one that records no experts are each named by their own check, errors with exit status 1; (3) values near a limit warn,
and a NaN is above it; (4) wrong input is one line.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.learner import Learner
from pipelines import doctor_drift
from pipelines.config import write_config
from pipelines.doctor_drift import examine, find_recipe, judge, still
from pipelines.findings import Finding
from pipelines.recipes import zero_ledger
from pipelines.zero import ZeroConfig, build_learner, prepare
from rollout.engine import EngineConfig, WeightStream
from rollout.pool import LocalPool
from rollout.sample import CompletionGroup, SamplingParams
from rollout.stream import Work
from tests.pipelines.conftest import grpo

STEPS = 3


@pytest.fixture(scope="module")
def recipe(base: Path) -> ZeroConfig:
    zero = zero_ledger()
    return replace(
        zero, model=str(base), num_prompts=50, engine=EngineConfig(kind="native", transport="local", max_model_len=256),
        trainer=replace(zero.trainer, prompts_per_step=4, completions_per_prompt=4, max_tokens=12),
    )  # fmt: skip


class Pool(LocalPool):
    """Engines as they should be; the tests break one part each."""

    def __init__(self, zero: ZeroConfig) -> None:
        super().__init__(zero.engine, zero.model)


class StalePool(Pool):
    """From version 2 on, one expert's matrix is a little off."""

    def load_weights(self, weights: WeightStream, version: int) -> None:
        wrong = "model.layers.1.mlp.experts.3.down_proj.weight" if version >= 2 else ""
        super().load_weights(((name, t * 0.9 if name == wrong else t) for name, t in weights), version)


class OtherTemperaturePool(Pool):
    """Samples at another temperature than it was asked for; the probe does not see that."""

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        yield from super().generate(work, replace(params, temperature=0.8 * params.temperature), stop=stop)


class ForgetfulPool(Pool):
    """Records no experts for the first completion of each group."""

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        for group in super().generate(work, params, stop=stop):
            first, *others = group.completions
            yield replace(group, completions=[replace(first, expert_ids=None), *others])


def healthy(learner: Learner) -> None:
    pass


def moving(learner: Learner) -> None:
    """A weight changes in every optimizer step, whatever the learning rate."""
    weight = next(iter(learner.model.parameters()))

    def add(*_: object) -> None:
        weight.data.add_(1e-4)

    learner.optimizer.register_step_post_hook(add)


@pytest.mark.parametrize(
    ("pool", "breakage", "failed"),
    [
        (Pool, healthy, {}),
        (Pool, moving, {"weights": "1 of 75 tensors changed with learning rate 0, the first is model.embed_tokens"}),
        (StalePool, healthy, {"sync": "after the push of version 2, engine 0 scores the probe differently"}),
        (OtherTemperaturePool, healthy, {"mismatch": "first above it at step 0: what was sampled has another"}),
    ],
)
def test_each_drift_is_named(
    pool: type[Pool], breakage: Callable[[Learner], None], failed: dict[str, str], recipe: ZeroConfig, tmp_path: Path
) -> None:
    run = prepare(still(recipe, STEPS, tmp_path / "run"))
    learner = build_learner(run.config)
    breakage(learner)
    findings = {finding.check: finding for finding in examine(run, learner, pool(recipe), STEPS)}
    assert list(findings) == ["weights", "sync", "probe", "mismatch", "experts"]
    assert {check for check, finding in findings.items() if finding.level == "error"} == set(failed)
    for check, text in failed.items():
        assert text in findings[check].text
    if not failed:
        assert {finding.level for finding in findings.values()} == {"ok"}, findings
        assert "75 tensors equal to the bit" in findings["weights"].text
        assert "over 3 steps" in findings["mismatch"].text and "0.00% otherwise" in findings["experts"].text


def test_rows_without_experts_warn(recipe: ZeroConfig, tmp_path: Path) -> None:
    run = prepare(still(recipe, 1, tmp_path / "run"))
    findings = {f.check: f for f in examine(run, build_learner(run.config), ForgetfulPool(recipe), 1)}
    assert findings["experts"].level == "warning" and "are not replayed" in findings["experts"].text


def test_the_command_prints_and_exits(
    recipe: ZeroConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    write_config(replace(recipe, resume=True, out=str(tmp_path / "run")), path)
    good = grpo("doctor", "--lr0", path, "--steps", 1)
    assert good.status == 0, good
    assert not (tmp_path / "run").exists(), "the run that is examined is not touched"
    monkeypatch.setattr(doctor_drift, "build_pool", lambda engine, model: OtherTemperaturePool(recipe))
    bad = grpo("doctor", "--lr0", path, "--steps", 1)
    assert bad.status == 1, bad
    lines = [line.split()[:2] for line in (good.out + bad.out + capsys.readouterr().out).splitlines()]
    assert ["error", "mismatch"] in lines and lines.count(["ok", "weights"]) == 2, lines


def test_recipes_by_name_and_wrong_input(base: Path) -> None:
    assert find_recipe("ledger", str(base)) == replace(zero_ledger(), model=str(base))
    for wrong in ("ledgr", "no.yaml"):
        message = grpo("doctor", "--lr0", wrong, "--model", base).one_line_error()
        assert "--lr0 needs a recipe of `grpo zero` (ledger, gsm8k) or a config file" in message
    assert "steps must be >= 1, got 0" in grpo("doctor", "--lr0", "ledger", "--steps", 0).one_line_error()


def test_levels() -> None:
    def level(*values: float) -> str:
        return judge([{"x": value} for value in values], "check", "x", 1.0, "mend it").level

    assert level(0.0, 0.05) == "ok"
    assert level(0.0, 0.5) == "warning"
    assert level(0.5, 1.5) == level(math.nan) == level(0.0, math.nan, 0.0) == "error"
    assert judge([{}], "check", "x", 1.0, "").level == "error", "nothing measured is no success"
    assert str(Finding(level="ok", check="sync", text="fine")) == "ok       sync        fine"
