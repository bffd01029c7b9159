"""What the tests of pipelines share: a tiny corpus, a base checkpoint pretrained from it, and the command line."""

import json
import os
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.pretrain import PretrainConfig, run_pretrain
from pipelines.recipes import pretrain_ledger
from pipelines.tasks import ledger

ROOT = Path(__file__).parents[2]
GSM8K = ROOT / "tests" / "fixtures" / "gsm8k_test_8.jsonl"
LOCAL = ("--engine.kind", "native", "--engine.transport", "local", "--engine.num-engines", "1")
"""Flags that keep engines in this process, without vLLM or Ray."""
NUM_DOCUMENTS, PRETRAIN_STEPS = 1500, 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one call of the command line ended."""

    status: int
    """Exit status."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""

    def one_line_error(self) -> str:
        """The message, after checking that wrong input got status 2 and exactly one line without box or traceback."""
        assert self.status == 2, self
        assert self.err.startswith("grpo: error: ") and self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("grpo: error: ").removesuffix("\n")


def grpo(*arguments: object) -> Outcome:
    """`grpo("zero", "--steps", 3)` runs the command in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # the help text of a command ends so
            assert stop.code is None or isinstance(stop.code, int), stop.code
            status = stop.code or 0
    return Outcome(status=status, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For subprocesses: this checkout, one thread, no network."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ledger documents as `grpo pretrain` reads them."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = ledger.documents(ledger.make_rows(NUM_DOCUMENTS, seed=0), random.Random(0))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def base_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return replace(
        pretrain_ledger(), data=str(corpus), out=str(tmp_path_factory.mktemp("base") / "model"), steps=PRETRAIN_STEPS,
        samples_per_step=64, warmup_steps=5, num_threads=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def base(base_config: PretrainConfig) -> Path:
    """A base checkpoint: it has learnt the form of a ledger document, hardly more."""
    return run_pretrain(base_config)
