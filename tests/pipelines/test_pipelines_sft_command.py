"""`grpo sft` and `grpo pretrain` from the command line.

Pinned: (1) fine-tuning lowers the held-out loss, and leaves a checkpoint with tokenizer and chat template that others
load; (2) students with fresh weights, ours and a dense one, learn with the teacher's tokenizer; (3) adapters alone are
trained, and merged; (4) killed by SIGKILL and resumed, both stages end with the bytes and metrics of an uninterrupted
run; SIGTERM lets them save; (5) a pretrained model's documents are cut at `max_length`, and some are held out; (6) wrong
input is one line.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from grpo.metrics import read_metrics
from models import from_pretrained
from pipelines.prompting import load_tokenizer
from pipelines.tasks import ledger
from pipelines.templates import TEMPLATES
from tests.pipelines.conftest import ROOT, grpo

STEPS, SAVE_EVERY, ROWS_BEFORE_KILL = 12, 3, 7
SMALL = ("--samples-per-step", 16, "--steps", STEPS, "--lr", 3e-3, "--eval-every", 4)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two worked solutions of each of 60 problems."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = ledger.make_rows(60, seed=5)
    with path.open("w") as file:
        for row in rows:
            for depth in (4, ledger.NUM_STEPS):
                texts = {"prompt": TEMPLATES["r1"].format(row["question"]), "completion": ledger.completion(row, depth)}
                file.write(json.dumps({"id": row["question"], **texts, "reward": 1.0}) + "\n")
    return path


def heldout_losses(run: Path) -> list[float]:
    return [row["loss/heldout"] for row in read_metrics(run) if "loss/heldout" in row]


def test_fine_tuning(base: Path, traces: Path, tmp_path: Path) -> None:
    done = grpo("sft", "--model", base, "--data", traces, "--out", tmp_path / "run", *SMALL, "--heldout-share", 0.2)
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert "96 samples with" in said and "24 samples held out" in said, said
    before = float(said.partition("held-out loss before training: ")[2].split()[0])
    losses = heldout_losses(tmp_path / "run")
    assert len(losses) == STEPS / 4 and losses[-1] < 0.8 * before
    model = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    question = [{"role": "user", "content": "What?"}]
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert asked == TEMPLATES["r1"].format("What?")
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.testing.assert_close(from_pretrained(model).logits(ids), theirs(ids).logits, rtol=1e-3, atol=1e-3)
    assert (model / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["tiny", "dense"])
def test_students_with_fresh_weights(kind: str, base: Path, traces: Path, tmp_path: Path) -> None:
    architecture = kind
    if kind == "dense":
        architecture = str(tmp_path / "dense")
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(architecture)  # fmt: skip
    flags = ("--tokenizer", base, "--data", traces, "--dtype", "bfloat16", "--curriculum-share", 0.5, *SMALL)
    done = grpo("sft", "--architecture", architecture, "--out", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    losses = heldout_losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    student = from_pretrained(tmp_path / "run" / "model")
    assert student.config.vocab_size == len(load_tokenizer(str(base))) == len(load_tokenizer(f"{tmp_path}/run/model"))
    assert student.config.model_type == "llama" if kind == "dense" else student.routers()


def test_adapters(base: Path, traces: Path, tmp_path: Path) -> None:
    flags = ("--lora.rank", 4, "--heldout", traces, *SMALL)
    done = grpo("sft", "--model", base, "--data", traces, "--out", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    losses = heldout_losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    start, end = from_pretrained(base), from_pretrained(tmp_path / "run" / "model")
    changed = {
        name
        for (name, one), (_, other) in zip(start.named_parameters(), end.named_parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed and all(".self_attn." in name or ".experts." in name for name in changed)
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").is_file()


def stage(name: str, base: Path, corpus: Path, traces: Path, out: Path) -> list[str]:
    flags = (*SMALL, "--save-every", SAVE_EVERY, "--warmup-steps", 2, "--heldout-share", 0.1, "--out", out)
    source = ("--data", corpus, "--samples-per-step", 16) if name == "pretrain" else ("--model", base, "--data", traces)
    return list(map(str, (name, *source, *flags)))


def stop_in_the_middle(arguments: list[str], out: Path, environment: dict[str, str], number: signal.Signals) -> int:
    """Starts `grpo` in a process of its own and sends it a signal when seven steps are logged; its exit status."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline, metrics = time.monotonic() + 100, out / "metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < ROWS_BEFORE_KILL:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert not (out / "model").exists()
    return process.returncode


@pytest.mark.parametrize(
    ("name", "number"), [("sft", signal.SIGKILL), ("sft", signal.SIGTERM), ("pretrain", signal.SIGKILL)]
)
def test_stopped_and_resumed(
    name: str, number: signal.Signals, base: Path, corpus: Path, traces: Path, tmp_path: Path,
    environment: dict[str, str],
) -> None:  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert grpo(*stage(name, base, corpus, traces, whole)).status == 0
    arguments = stage(name, base, corpus, traces, stopped)
    status = stop_in_the_middle(arguments, stopped, environment, number)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    message = grpo(*arguments, "--resume", "--lr", 1e-4).one_line_error()
    assert "was started with another lr" in message
    done = grpo(*arguments, "--resume")
    assert done.status == 0, done.err
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (stopped / "model" / file).read_bytes() == (whole / "model" / file).read_bytes(), file
    rows = [read_metrics(run) for run in (whole, stopped)]
    for one, other in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if "speed/" not in k} == {
            k: v for k, v in other.items() if "speed/" not in k
        }


def test_long_documents_are_cut(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = list(ledger.documents(ledger.make_rows(300, seed=1), random.Random(1)))
    path.write_text("".join(json.dumps({"text": " ".join(texts[i : i + 3])}) + "\n" for i in range(0, 300, 3)))
    flags = ("--max-length", 50, "--tokens-per-step", 400, "--token-budget", 100, "--steps", 3, "--heldout-share", 0.1)
    done = grpo("pretrain", "ledger", "--data", path, "--out", tmp_path / "run", *flags)
    assert done.status == 0, done.err
    said = " ".join(done.out.split())
    assert "100 documents in" in said and "0 tokens to train" not in said
    for row in read_metrics(tmp_path / "run"):
        assert 350 < row["data/tokens"] <= 400, "full to the last piece"
        assert row["data/trained_tokens"] == row["data/tokens"] - row["data/samples"]
    assert len(heldout_losses(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "{traces}"), "no model given: add --model"),
        (("--data", "{traces}", "--model", "{base}", "--architecture", "tiny"), "give one of them"),
        (("--data", "{traces}", "--architecture", "tiny"), "--architecture needs --tokenizer"),
        (("--data", "{traces}", "--model", "{base}", "--template", "r2"), "unknown template 'r2'"),
        (("--data", "{traces}", "--model", "{base}", "--resume"), "holds no run to resume"),
        (("--data", "{corpus}", "--model", "{base}"), "field 'completion' is missing"),
        (("--data", "{traces}", "--model", "{base}", "--max-length", "9000"), "between 0 and token_budget=8192"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], message: str, base: Path, corpus: Path, traces: Path, tmp_path: Path
) -> None:
    given = [argument.format(traces=traces, base=base, corpus=corpus) for argument in arguments]
    assert message in grpo("sft", *given, "--out", tmp_path / "run").one_line_error()
    assert not (tmp_path / "run").exists()
