"""`grpo zero` with adapters, through the command line: the final folder is the merged model, its `adapter/` loads by
peft, tensors that are not adapted are the base's bits, and a run that was stopped continues.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from grpo.metrics import read_metrics
from models.checkpoint import read_tensors
from pipelines.config import read_config
from pipelines.recipes import zero_ledger
from pipelines.zero import ZeroConfig
from tests.pipelines.conftest import LOCAL, grpo

FLAGS = (
    *LOCAL, "--num-prompts", 100, "--num-threads", 1, "--trainer.steps", 4, "--trainer.save-every", 2,
    "--trainer.prompts-per-step", 4, "--trainer.completions-per-prompt", 4, "--learner.lr", 1e-2,
    "--learner.objective.kl-coef", 0.05, "--lora.rank", 4, "--lora.targets", "q_proj", "o_proj",
)  # fmt: skip


def test_a_run_by_adapters(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = grpo("zero", "ledger", "--model", base, "--out", out, *FLAGS)
    assert done.status == 0, done.err
    config = read_config(ZeroConfig, out / "config.json", default=zero_ledger())
    assert (config.lora.rank, config.lora.targets) == (4, ("q_proj", "o_proj"))
    rows = read_metrics(out)
    assert rows[0]["policy/kl_to_reference"] == 0 < rows[3]["policy/kl_to_reference"]
    assert all(row["sync/probe_difference"] < 1e-4 for row in rows), "sampler and learner agree after every step"

    before, after = dict(read_tensors(base)), dict(read_tensors(out / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(("q_proj.weight", "o_proj.weight")) for name in changed)
    load: Any = AutoModelForCausalLM.from_pretrained
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        merged = load(out / "model")(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(load(base), str(out / "model" / "adapter")).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)


def test_a_stopped_run_continues(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("zero", "ledger", "--model", base, *FLAGS)
    assert grpo(*arguments, "--out", tmp_path / "whole").status == 0
    from grpo.trainer import GRPOTrainer

    run_step = GRPOTrainer.run_step

    def stop_in_step_3(trainer: GRPOTrainer, step: int) -> None:
        if step == 3:
            raise OSError("the power went")
        run_step(trainer, step)

    monkeypatch.setattr(GRPOTrainer, "run_step", stop_in_step_3)
    assert grpo(*arguments, "--out", tmp_path / "cut").status != 0
    monkeypatch.undo()
    done = grpo(*arguments, "--out", tmp_path / "cut", "--resume")
    assert done.status == 0, done.err
    whole, cut = (dict(read_tensors(tmp_path / name / "model")) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_experts_in_four_bits_are_refused(base: Path, tmp_path: Path) -> None:
    refused = grpo("zero", "ledger", "--model", base, "--out", tmp_path / "run", *FLAGS, "--lora.quantize-base")
    assert "4-bit weights are for dense models only" in refused.one_line_error()
