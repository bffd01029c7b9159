"""Faults planted one at a time: each gives one line that says what and what to do, and the exit status of its kind.

A key that does not exist, a missing file and other wrong flags are in test_pipelines_cli.py; rewards that always fail
are in test_pipelines_end_to_end.py.
"""

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import trainer
from grpo.learner import Learner
from rewards import sandbox
from tests.pipelines.conftest import LOCAL, Outcome, grpo

SMALL = (
    *LOCAL, "--num-threads", 1, "--trainer.steps", 2, "--trainer.prompts-per-step", 2,
    "--trainer.completions-per-prompt", 2, "--trainer.max-tokens", 8,
)  # fmt: skip


def zero(base: Path, out: Path, *more: object) -> Outcome:
    return grpo("zero", "ledger", "--model", base, "--out", out, *SMALL, *more)


def one_line(outcome: Outcome, status: int) -> str:
    assert outcome.status == status, outcome
    assert outcome.err.startswith("grpo: error: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def test_a_bad_line_of_json(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer\n')
    message = one_line(grpo("zero", "gsm8k", "--model", base, "--data", data, "--out", tmp_path / "run", *SMALL), 2)
    assert "rows.jsonl" in message and "line 2" in message
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint(base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = one_line(grpo("zero", "ledger", "--model", model, "--out", tmp_path / "run", *SMALL), 2)
    assert "model.safetensors" in message and "cuts 2 tensors" in message and "copy the checkpoint again" in message


def test_a_full_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    message = one_line(zero(base, tmp_path / "run"), 3)
    assert "the disk is full" in message and "free space and resume" in message


def test_a_full_gpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Learner, "update", too_large)
    message = one_line(zero(base, tmp_path / "run"), 3)
    assert "Tried to allocate 20.00 GiB" in message and "learner.token_budget" in message
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()


def test_vllm_is_missing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in [name for name in sys.modules if name.startswith("rollout.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    outcome = zero(base, tmp_path / "run", "--engine.kind", "vllm")
    message = one_line(outcome, 2)
    assert "vLLM, which is not installed; use the engine 'native'" in message


def test_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda tool, path: None)
    programs = tmp_path / "programs.jsonl"
    row = {"id": "one", "code": "print(1)", "tests": {"inputs": [""], "outputs": ["1\n"]}}
    programs.write_text(json.dumps(row) + "\n")
    message = one_line(grpo("reward", "code", programs, "--out", tmp_path / "out.jsonl"), 3)
    assert "bubblewrap refused: bwrap" in message and "Remedy" in message
