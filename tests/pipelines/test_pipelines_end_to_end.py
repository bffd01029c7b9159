"""Pretraining, R1-Zero and evaluation, one after the other on tiny inputs, through the command line.

Pinned: (1) the base loads in transformers and gives the same logits; (2) it has learnt, its experts are in use and the
router's bias has moved, by at most the balance speed a step; (3) pretraining is deterministic; (4) a run folder holds
what the documents promise, and its config.json reads back equal; (5) training changes the policy; (6) GSM8K rows serve
as prompts, with a reward from a user's file; (7) `grpo eval` gives an honest number that follows from its records;
(8) a finished run is not overwritten, nor any folder by pretraining, and input that is refused late leaves no folder
behind; (9) names with brackets are printed as they are.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.metrics import read_metrics
from grpo.trainer import TrainerConfig
from models import DeepseekV3ForCausalLM, SequenceLayout, load_pretrained
from models.balance import load_metrics
from models.checkpoint import read_tensors
from pipelines.config import read_config
from pipelines.evaluate import EvalConfig
from pipelines.pretrain import PretrainConfig, run_pretrain
from pipelines.prompting import load_tokenizer
from pipelines.recipes import pretrain_ledger, zero_ledger
from pipelines.statistics import wilson_interval
from pipelines.tasks import ledger
from pipelines.zero import ZeroConfig
from tests.pipelines.conftest import GSM8K, LOCAL, NUM_DOCUMENTS, PRETRAIN_STEPS, ROOT, grpo

SMALL = (
    *LOCAL, "--num-threads", 1, "--trainer.steps", 2, "--trainer.prompts-per-step", 4,
    "--trainer.completions-per-prompt", 4,
)  # fmt: skip


def text_ids(folder: Path, count: int) -> list[list[int]]:
    """Ledger documents that the base has not seen, as token ids."""
    rows = ledger.make_rows(NUM_DOCUMENTS + count, seed=0)[NUM_DOCUMENTS:]
    ids: Any = load_tokenizer(str(folder))([ledger.document(row, 10) for row in rows])["input_ids"]
    return ids


@torch.no_grad()
def run_model(model: DeepseekV3ForCausalLM, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, dict[int, Any]]:
    """Logits [T, V] of the sequences end to end, and the experts of each token."""
    layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences])
    output = model(torch.tensor([token for sequence in sequences for token in sequence]), layout)
    return model.lm_head(output.hidden_TD), output.expert_ids


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(folder))


def test_the_base_loads_in_transformers_and_gives_the_same_logits(base: Path) -> None:
    load: Any = AutoModelForCausalLM
    reference, loading = load.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert reference.config.vocab_size == len(tokenizer)
    assert reference.config.eos_token_id == tokenizer.eos_token_id
    assert reference.config.pad_token_id == tokenizer.pad_token_id
    sequences = text_ids(base, 4)
    ours_TV, _ = run_model(load_pretrained(base), sequences)
    with torch.no_grad():
        theirs_TV = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in sequences])
    assert ours_TV.std() > 1, "logits far from uniform, so that a difference would show"
    torch.testing.assert_close(ours_TV, theirs_TV, atol=5e-5, rtol=0)


def test_the_base_has_learnt_the_form_and_uses_its_experts(base: Path) -> None:
    model = load_pretrained(base)
    sequences = text_ids(base, 64)
    logits_TV, expert_ids = run_model(model, sequences)
    ids_T = torch.tensor([token for ids in sequences for token in ids])
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:]).item()
    assert loss < 3.0 < torch.tensor(float(model.config.vocab_size)).log().item() - 2, "2 nats better than uniform"
    counts_LE = {layer: torch.bincount(ids_TK.flatten(), minlength=8) for layer, ids_TK in expert_ids.items()}
    assert sorted(counts_LE) == [0, 1] and load_metrics(counts_LE)["moe/experts_used"] >= 0.75
    for router in model.routers().values():
        bias_E = router.e_score_correction_bias
        assert bias_E.abs().max() > 0
        assert bias_E.abs().max() <= PRETRAIN_STEPS * PretrainConfig(data="", out="").balance_speed + 1e-6


def test_pretraining_is_deterministic_and_balancing_can_be_turned_off(
    base_config: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(base_config, steps=2, balance_speed=0.0)
    first, second = (run_pretrain(replace(config, out=str(tmp_path / name))) for name in ("first", "second"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    other = run_pretrain(replace(config, out=str(tmp_path / "other"), seed=1))
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    biases = [tensor for name, tensor in tensors(first).items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and not any(bias_E.any() for bias_E in biases)


def test_the_pretraining_folder_says_how_it_was_made(base: Path, base_config: PretrainConfig) -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in base.iterdir()} == names
    assert read_config(PretrainConfig, base.parent / "config.json", default=pretrain_ledger()) == base_config
    losses = [row["loss/train"] for row in read_metrics(base.parent)]
    assert len(losses) == PRETRAIN_STEPS and losses[-1] < 3.0 < losses[0]


def test_pretrain_command(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(corpus.read_text() + '{"text": ""}\n{"txt": "x"}\n')
    arguments = ("pretrain", "ledger", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "deep" / "base")
    done = grpo(*arguments, "--steps", 2, "--samples-per-step", 16, "--num-threads", 1)
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert f"line {NUM_DOCUMENTS + 1}: field 'text' is missing or empty" in said
    assert f"2 of {NUM_DOCUMENTS + 2} rows are malformed" in said
    assert f"{NUM_DOCUMENTS:,} documents" in said and "8 routed experts a layer" in said
    assert load_pretrained(tmp_path / "deep" / "base" / "model").config.n_routed_experts == 8


def test_pretraining_does_not_replace_a_folder_that_is_there(corpus: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("ten years of work")
    message = grpo("pretrain", "ledger", "--data", corpus, "--out", precious.parent, "--steps", 1).one_line_error()
    assert str(precious.parent) in message and "--out" in message
    assert precious.read_text() == "ten years of work"


@pytest.fixture(scope="module")
def ledger_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `grpo zero`."""
    folder = tmp_path_factory.mktemp("zero") / "run"
    arguments = ("zero", "ledger", "--model", base, "--num-prompts", 50, "--out", folder, *SMALL)
    done = grpo(*arguments, "--trainer.log-groups-every", 1, "--reward", "r1_format", "0*thinking_length")
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert "engine native; 4 prompts x 4 completions = 16 samples = 1 optimizer step, 2 times" in said
    return folder


def test_the_run_folder(ledger_run: Path) -> None:
    promised = {"config.json", "metrics.jsonl", "tensorboard", "groups.jsonl", "checkpoints", "model"}
    assert {path.name for path in ledger_run.iterdir()} == promised
    assert [path.name for path in (ledger_run / "checkpoints").iterdir()] == ["step_000002"], "the newest only"
    assert list((ledger_run / "tensorboard").glob("events*"))

    rows = read_metrics(ledger_run)
    assert [row["step"] for row in rows] == [0, 1]
    named = {"reward/mean", "reward/r1_format", "reward/thinking_length", "policy/loss", "policy/entropy",
             "mismatch/abs_max", "sync/probe_difference", "completion/tokens", "speed/rollout_tokens_per_s",
             "speed/learn_tokens_per_s", "moe/experts_used"}  # fmt: skip
    assert all(named <= set(row) for row in rows)
    assert all(row["mismatch/abs_max"] < 1e-4 and row["sync/probe_difference"] < 1e-4 for row in rows)

    groups = [json.loads(line) for line in (ledger_run / "groups.jsonl").read_text().splitlines()]
    assert [group["step"] for group in groups] == [0] * 4 + [1] * 4
    rewards = [row["reward"] for group in groups if group["step"] == 0 for row in group["completions"]]
    assert sum(rewards) / 16 == pytest.approx(rows[0]["reward/mean"])


def test_the_config_of_the_run_reads_back_equal(base: Path, ledger_run: Path) -> None:
    recipe = zero_ledger()
    expected = replace(
        recipe,
        model=str(base),
        num_prompts=50,
        out=str(ledger_run),
        num_threads=1,
        reward=("r1_format", "0*thinking_length"),
        trainer=replace(recipe.trainer, steps=2, prompts_per_step=4, completions_per_prompt=4, log_groups_every=1),
        engine=replace(recipe.engine, kind="native", transport="local", num_engines=1),
    )
    assert read_config(ZeroConfig, ledger_run / "config.json", default=ZeroConfig(model="")) == expected


def test_training_changed_the_policy_and_nothing_else(base: Path, ledger_run: Path) -> None:
    before, after = tensors(base), tensors(ledger_run / "model")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"} <= changed
    assert not [name for name in changed if name.endswith("e_score_correction_bias")], "RL leaves the balance alone"
    policy = tensors(ledger_run / "checkpoints" / "step_000002" / "policy")
    assert all(tensor.equal(policy[name]) for name, tensor in after.items())
    for name in ("config.json", "tokenizer.json"):
        assert (ledger_run / "model" / name).read_bytes() == (base / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(ledger_run / "model").config.model_type == "deepseek_v3"


def test_a_run_is_not_overwritten(base: Path, ledger_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in ledger_run.rglob("*")}
    message = grpo("zero", "ledger", "--model", base, "--num-prompts", 50, "--out", ledger_run, *SMALL).one_line_error()
    assert message == f"{ledger_run} already holds a run; continue it with --resume, or choose another --out"
    assert {path: path.stat().st_mtime_ns for path in ledger_run.rglob("*")} == before


def test_zero_takes_gsm8k_rows_and_a_reward_file(base: Path, tmp_path: Path) -> None:
    spec = f"{ROOT / 'examples' / '01_custom_reward.py'}:right_and_brief"
    done = grpo(
        "zero", "--model", base, "--task", "gsm8k", "--data", GSM8K, "--out", tmp_path / "run", *SMALL,
        "--trainer.max-tokens", 16, "--trainer.log-groups-every", 1, "--reward", spec, "0.1*r1_format",
    )  # fmt: skip
    assert done.status == 0, done.err
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 <= row["reward/right_and_brief/right"] <= 1 and row["reward/errors"] == 0 for row in rows)
    # Two different halves of the eight rows; the gold answer reached the reward.
    groups = [json.loads(line) for line in (tmp_path / "run" / "groups.jsonl").read_text().splitlines()]
    assert sorted(group["prompt_id"] for group in groups) == [f"gsm8k-{number}" for number in range(1, 9)]
    golds = {group["prompt_id"]: group["completions"][0]["info"]["right_and_brief"]["gold"] for group in groups}
    assert (golds["gsm8k-1"], golds["gsm8k-3"]) == ("18", "70000")


def test_rewards_that_always_fail_end_the_run(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("from rewards import reward\n\n\n@reward\ndef broken(sample):\n    return 1 / 0\n")
    flags = (*LOCAL, "--num-threads", 1, "--trainer.steps", 9, "--trainer.prompts-per-step", 2)
    flags += ("--trainer.completions-per-prompt", 2, "--trainer.max-tokens", 8, "--trainer.log-groups-every", 1)
    outcome = grpo("zero", "ledger", "--model", base, "--out", tmp_path / "run", "--reward", f"{path}:broken", *flags)
    assert outcome.status == 1
    assert "no completion of the last 3 steps had a reward" in outcome.err and outcome.err.count("\n") == 1, outcome.err
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    groups = [json.loads(line) for line in (tmp_path / "run" / "groups.jsonl").read_text().splitlines()]
    assert "division by zero" in json.dumps(groups), "the error is where the message says"
    assert not (tmp_path / "run" / "model").exists()


def test_eval_command_gives_an_honest_number(base: Path, tmp_path: Path) -> None:
    arguments = ("eval", "--model", base, "--task", "gsm8k", "--data", GSM8K, "--out", tmp_path, *LOCAL)
    done = grpo(*arguments, "--max-tokens", 24)
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "results.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"gsm8k-{number}/0" for number in range(1, 9)]
    questions = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    assert [record["row"]["question"] for record in records] == questions
    assert all(question in record["prompt"] for question, record in zip(questions, records, strict=True))
    right = sum(record["metrics"]["math_answer"] for record in records)
    assert result["accuracy"] == right / 8 <= 0.25, "a tiny model cannot do grade-school mathematics"
    assert (result["accuracy_low"], result["accuracy_high"]) == pytest.approx(wilson_interval(int(right), 8))
    assert (result["num_problems"], result["num_unscored"]) == (8, 0)
    cut = [record for record in records if record["finish_reason"] == "length"]
    assert result["truncated"] == len(cut) / 8
    config = read_config(EvalConfig, tmp_path / "config.json", default=EvalConfig(model=""))
    assert config.model == str(base) and config.data == str(GSM8K) and config.max_tokens == 24
    assert f"accuracy {right / 8:.1%} (95% interval" in " ".join(done.out.split())


def test_brackets_in_names_are_text(base: Path, tmp_path: Path) -> None:
    """The library that prints would take them for its markup."""
    data, out = tmp_path / "rows[red].jsonl", tmp_path / "out[bold]"
    data.write_text(GSM8K.read_text() + "{bad\n")
    arguments = ("eval", "--model", base, "--data", data, "--max-bad-share", 0.2, "--out", out, *LOCAL)
    done = grpo(*arguments, "--max-tokens", 2)
    assert done.status == 0, done.err
    assert f"{data}, line 9: not JSON" in done.out.replace("\n", "") and f"results in {out}" in done.out


def test_evaluation_is_repeatable_and_seeded(base: Path, tmp_path: Path) -> None:
    def completions(name: str, *flags: object) -> list[str]:
        arguments = ("eval", "--model", base, "--task", "ledger", "--limit", 20, "--out", tmp_path / name, *LOCAL)
        assert grpo(*arguments, *flags).status == 0
        lines = (tmp_path / name / "records.jsonl").read_text().splitlines()
        return [json.loads(line)["completion"] for line in lines]

    sampled = completions("a", "--temperature", 1)
    assert sampled == completions("b", "--temperature", 1)
    greedy = completions("c")
    assert greedy == completions("d", "--engine.max-num-seqs", 3) and greedy != sampled


def test_a_model_folder_without_weights_leaves_no_run_behind(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").unlink()
    arguments = ("zero", "ledger", "--model", broken, "--num-prompts", 50, "--out", tmp_path / "run", *SMALL)
    assert "model.safetensors" in grpo(*arguments).one_line_error()
    assert not (tmp_path / "run").exists(), "else the same command, once repaired, is refused: a run is there already"


def test_prompts_that_do_not_fit_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    lengths = sorted(len(tokenizer(json.loads(line)["question"])["input_ids"]) for line in GSM8K.open())
    room = lengths[-1] + 2 + 3  # the opening is one token; " User: " and " Assistant:" take a few more
    done = grpo(
        "eval", "--model", base, "--data", GSM8K, "--max-tokens", 4, "--engine.max-model-len", room,
        "--out", tmp_path, *LOCAL,
    )  # fmt: skip
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert "1 of 8 prompts are longer than" in said and "not scored: 1 problems, 1 completions (1 no_room)" in said
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["num_problems"], result["num_unscored"], result["failures"]) == (8, 1, {"no_room": 1})


def test_arithmetic_is_spelt_out() -> None:
    config = TrainerConfig(steps=3, prompts_per_step=8, completions_per_prompt=4, minibatches=2)
    assert config.arithmetic() == "8 prompts x 4 completions = 32 samples = 2 optimizer steps, 3 times"
