"""On-policy distillation through the command line, from one tiny model into another.

Pinned: (1) the student comes closer to the teacher on its own samples, with a teacher served by an engine and with its
whole distribution, with and without traces; (2) the rewards' advantages are added where asked for; (3) a run that lost
its last checkpoint goes on to the same numbers; (4) input that makes no sense is refused with the remedy, before a
folder is made.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.metrics import read_metrics
from models.checkpoint import read_tensors
from pipelines.pretrain import PretrainConfig, run_pretrain
from pipelines.tasks import get_task, ledger
from pipelines.templates import get_template
from tests.pipelines.conftest import LOCAL, grpo

STEPS = 8
TEACHER = ("--teacher-engine.kind", "native", "--teacher-engine.transport", "local")
SMALL = (
    *LOCAL, *TEACHER, "--task", "ledger", "--num-prompts", 50, "--trainer.prompts-per-step", 4,
    "--trainer.completions-per-prompt", 8, "--trainer.max-tokens", 24, "--engine.max-model-len", 512,
    "--learner.lr", 3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def student(base_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It knows less than the base, of which it learns."""
    out = str(tmp_path_factory.mktemp("student") / "model")
    return run_pretrain(replace(base_config, out=out, steps=12, seed=1))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    template, task = get_template("r1"), get_task("ledger")
    rows = ledger.make_rows(20, seed=5)
    prompts = [template.format(task.question(row)) for row in rows]
    documents = [ledger.document(row, 3) for row in rows]
    assert all(d.startswith(p) for d, p in zip(documents, prompts, strict=True))
    lines = [{"prompt": p, "completion": d[len(p) :]} for d, p in zip(documents, prompts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def distill(student: Path, teacher: Path, out: Path, *flags: object) -> list[dict[str, float]]:
    done = grpo(
        "distill", "on-policy", "--model", student, "--teacher", teacher, "--out", out, *SMALL, "--steps", STEPS, *flags
    )
    assert done.status == 0, done.err
    return read_metrics(out)


def last_falls_below(rows: list[dict[str, Any]], share: float) -> bool:
    values = [row["distill/divergence"] for row in rows]
    assert len(values) == STEPS
    return sum(values[-2:]) < share * sum(values[:2])


def test_sampled_tokens(student: Path, base: Path, tmp_path: Path) -> None:
    rows = distill(student, base, tmp_path / "run")
    assert last_falls_below(rows, 0.7), [row["distill/divergence"] for row in rows]
    assert all(row["seconds/teacher"] > 0 and "reward/mean" in row for row in rows)


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_whole_distributions(beta: float, student: Path, base: Path, tmp_path: Path) -> None:
    rows = distill(student, base, tmp_path / "run", "--divergence", "whole", "--beta", beta)
    assert last_falls_below(rows, 0.7), [row["distill/divergence"] for row in rows]
    assert rows[-1]["distill/agreement"] > rows[0]["distill/agreement"]


def test_traces_beside_own_samples(student: Path, base: Path, traces: Path, tmp_path: Path) -> None:
    whole = ("--divergence", "whole", "--traces", traces, "--on-policy-share", 0.5)
    rows = distill(student, base, tmp_path / "run", *whole)
    assert last_falls_below(rows, 0.7), [row["distill/divergence"] for row in rows]
    assert all(row["mismatch/abs_max"] < 1e-4 for row in rows), "traces are no tokens of the engine's"


def test_rewards_beside_the_teacher(student: Path, base: Path, tmp_path: Path) -> None:
    """With a vanishing weight of the teacher, what is left is GRPO."""
    reward = tmp_path / "reward.py"
    reward.write_text("def short(completion):\n    return -len(completion) / 100\n")
    flags = ("--reward", f"{reward}:short", "--reward-weight", 1, "--kl-coef", 1e-6)
    rows = distill(student, base, tmp_path / "run", *flags)
    without = distill(student, base, tmp_path / "without", "--reward", f"{reward}:short")
    assert rows[0]["reward/mean"] == without[0]["reward/mean"]
    assert rows[-1]["completion/tokens"] < 0.7 * rows[0]["completion/tokens"]
    assert rows[-1]["completion/tokens"] < without[-1]["completion/tokens"]


@pytest.mark.parametrize("divergence", ["sampled", "whole"])
def test_resumed_run_equals_a_whole_one(
    divergence: str, student: Path, base: Path, traces: Path, tmp_path: Path
) -> None:
    flags: tuple[object, ...] = ("--divergence", divergence, "--trainer.save-every", 4)
    if divergence == "whole":
        flags += ("--traces", traces, "--on-policy-share", 0.8)
    rows = distill(student, base, tmp_path / "run", *flags)
    tensors = dict(read_tensors(tmp_path / "run" / "model"))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000008")
    resumed = distill(student, base, tmp_path / "run", *flags, "--resume")
    assert [_repeatable(row) for row in resumed] == [_repeatable(row) for row in rows]
    after = dict(read_tensors(tmp_path / "run" / "model"))
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def _repeatable(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("seconds/", "speed/", "memory/"))}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--beta", 0.5), "divergence to 'whole'"),
        (("--trainer.temperature", 0.9), "engines score at temperature 1"),
        (("--trainer.top-k", 5), "trainer.top_k to 0"),
        (("--teacher-engine.num-engines", 2, "--teacher-engine.transport", "ray"), "tensor_parallel_size"),
        (("--divergence", "whole", "--mesh.ranks", 2), "or one rank"),
        (("--divergence", "whole", "--on-policy-share", 0.5), "needs traces"),
        (("--learner.objective.loss", "gmpo"), "gmpo"),
        (("--kl-coef", 0), "kl_coef > 0"),
        (("--teacher", "nowhere"), "nowhere holds no tokenizer.json"),
    ],
)
def test_refused(flags: tuple[object, ...], message: str, student: Path, base: Path, tmp_path: Path) -> None:
    arguments = (
        "distill",
        "on-policy",
        "--model",
        student,
        "--teacher",
        base,
        "--out",
        tmp_path / "run",
        *SMALL,
        *flags,
    )
    assert message in grpo(*arguments).one_line_error()
    assert not (tmp_path / "run").exists()


def test_other_tokenizer_is_refused(student: Path, base_config: PretrainConfig, tmp_path: Path) -> None:
    teacher = run_pretrain(replace(base_config, out=str(tmp_path / "teacher"), steps=1, vocab_size=300))
    error = grpo("distill", "on-policy", "--model", student, "--teacher", teacher, "--out", tmp_path / "run", *SMALL)
    assert "is '" in error.one_line_error() and "to the teacher" in error.err
    assert not (tmp_path / "run").exists()


def distill_traces(out: Path, *flags: object) -> Any:
    settings = ("--sft.steps", 30, "--sft.samples-per-step", 8, "--sft.lr", 3e-3, "--sft.heldout-share", 0.2)
    return grpo("distill", "traces", "--out", out, *settings, *flags)


def test_traces_that_the_teacher_writes_now(base: Path, tmp_path: Path) -> None:
    """Into a student of random weights; what is kept comes from the teacher, in its tokenizer."""
    flags = (
        "--student", "tiny", "--teacher", base, "--sample.task", "ledger", "--sample.num-prompts", 20,
        "--sample.max-tokens", 24, "--sample.completions", 4, "--sample.select.no-correct", "--sample.select.truncated",
        "--sample.engine.kind", "native", "--sample.engine.transport", "local", "--sample.engine.max-model-len", 512,
    )  # fmt: skip
    done = distill_traces(tmp_path / "run", *flags)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "sample" / "traces.jsonl").read_text().splitlines()]
    assert lines and {line["source"]["model"] for line in lines} == {str(base)}
    model = tmp_path / "run" / "sft" / "model"
    assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    losses = [row["loss/train"] for row in read_metrics(tmp_path / "run" / "sft")]
    assert len(losses) == 30 and sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert "--resume" in distill_traces(tmp_path / "run", *flags).one_line_error()
    shutil.rmtree(tmp_path / "run" / "sft")  # as if it had been killed between the two
    before = (tmp_path / "run" / "sample" / "traces.jsonl").stat().st_mtime_ns
    assert distill_traces(tmp_path / "run", *flags, "--resume").status == 0
    assert (tmp_path / "run" / "sample" / "traces.jsonl").stat().st_mtime_ns == before
    again = [row["loss/train"] for row in read_metrics(tmp_path / "run" / "sft")]
    assert again == losses


def test_traces_of_a_file_into_a_checkpoint(student: Path, traces: Path, tmp_path: Path) -> None:
    done = distill_traces(tmp_path / "run", "--student", student, "--traces", traces)
    assert done.status == 0, done.err
    losses = [row["loss/train"] for row in read_metrics(tmp_path / "run" / "sft")]
    assert losses[-1] < losses[0] and not (tmp_path / "run" / "sample").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--traces", "x.jsonl"), "add --student"),
        (("--student", "tiny", "--traces", "x.jsonl"), "add --teacher"),
        (("--student", "tiny", "--sft.model", "x"), "without sample. or sft."),
    ],
)
def test_traces_refused(flags: tuple[object, ...], message: str, tmp_path: Path) -> None:
    assert message in distill_traces(tmp_path / "run", *flags).one_line_error()
    assert not (tmp_path / "run").exists()
