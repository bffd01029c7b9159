"""Direct preference optimization.

Pinned: (1) losses and gradients equal those of TRL's DPOTrainer: the numbers below were made by calling `_compute_loss`
of TRL 1.16.0 on these log-probabilities in float64: the loss, then its gradient for one token of each completion; (2)
label smoothing is a cross entropy, the NLL term a mean per token; (3) a step has the gradient of the loss written down
plainly, however the completions fall into micro-batches; (4) the command learns which completions are preferred, its
reference is the policy before training, and a run that lost its last checkpoint goes on to the same numbers; (5) pairs
of texts and of messages become the same tokens; (6) what cannot be used is refused.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.metrics import read_metrics
from models import from_pretrained
from models.checkpoint import read_tensors
from pipelines.pairs import Pair, as_sample, places_of
from pipelines.preference import DPO, DPOConfig, PreferenceLoss, build_learner
from pipelines.prompting import load_tokenizer
from pipelines.tasks import ledger
from tests.pipelines.conftest import grpo

LENGTHS = torch.tensor([4, 2, 5, 3, 5, 1])  # three chosen ones, three rejected ones
FROM_TRL: dict[str, tuple[PreferenceLoss, float, list[float]]] = {
    "sigmoid": (
        PreferenceLoss(beta=0.3), 0.7346143801,
        [-0.055025259, -0.0538555182, -0.0468143293, 0.055025259, 0.0538555182, 0.0468143293],
    ),
    "sigmoid_norm": (
        PreferenceLoss(beta=1.5, length_normalized=True), 0.6731589723,
        [-0.069968638, -0.1492598655, -0.0251848497, 0.0932915173, 0.0597039462, 0.1259242486],
    ),
    "ipo": (
        PreferenceLoss(kind="ipo", beta=0.3, length_normalized=True), 2.647440309,
        [-0.3044604302, -0.6429210168, -0.1254419737, 0.4059472403, 0.2571684067, 0.6272098685],
    ),
}  # fmt: skip


def trl_sums(step: float) -> Tensor:
    curve = -2 * torch.sin(torch.arange(36, dtype=torch.float64) * step).abs().reshape(6, 6) - 0.1
    return (curve * (torch.arange(6) < LENGTHS[:, None])).sum(1)


TRL_POLICY, TRL_REFERENCE = trl_sums(0.7), trl_sums(1.9)


def of_pairs(loss: PreferenceLoss, policy_2P: Tensor, reference_2P: Tensor) -> Tensor:
    lengths = LENGTHS.double().view(2, 3)
    return loss.of_pairs(
        policy_2P[0], policy_2P[1], (reference_2P[0], reference_2P[1]), (lengths[0], lengths[1])
    )  # fmt: skip


@pytest.mark.parametrize("name", FROM_TRL)
def test_loss_and_gradient_are_trls(name: str) -> None:
    loss, theirs, gradient = FROM_TRL[name]
    policy = TRL_POLICY.clone().requires_grad_()
    ours = of_pairs(loss, policy.view(2, 3), TRL_REFERENCE.view(2, 3)).mean()
    ours.backward()
    assert ours.item() == pytest.approx(theirs, abs=1e-9) and policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-9, rtol=0)


def test_label_smoothing_and_nll() -> None:
    policy, reference = TRL_POLICY.view(2, 3), TRL_REFERENCE.view(2, 3)
    h_P = (policy - reference)[0] - (policy - reference)[1]
    smoothed = of_pairs(PreferenceLoss(beta=0.5, label_smoothing=0.2), policy, reference)
    right_way = torch.full_like(h_P, 0.8)
    theirs = F.binary_cross_entropy_with_logits(0.5 * h_P, right_way, reduction="none")
    torch.testing.assert_close(smoothed, theirs)
    with_nll = of_pairs(PreferenceLoss(beta=0.5, nll_coef=2.0), policy, reference)
    extra = with_nll - of_pairs(PreferenceLoss(beta=0.5), policy, reference)
    torch.testing.assert_close(extra, -2.0 * policy[0] / torch.tensor([4.0, 2.0, 5.0], dtype=torch.float64))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferred are two attempts, over four."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for row in ledger.make_rows(96, seed=3):
        short, long = (ledger.document(row, count) for count in (2, 4))
        at = short.index("Assistant:") + len("Assistant:")
        lines.append({"prompt": short[:at], "chosen": short[at:], "rejected": long[at:]})
    assert all(line["chosen"] != line["rejected"] for line in lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(model: Path, data: Path, out: Path, **settings: Any) -> DPOConfig:
    small: dict[str, Any] = {"max_length": 256, "token_budget": 1024, "pairs_per_step": 16, "lr": 1e-3}
    return DPOConfig(model=str(model), data=str(data), out=str(out), **{**small, **settings})


def some_pairs(model: Path, data: Path, count: int) -> list[Pair]:
    tokenizer = load_tokenizer(str(model))
    rows = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    return [
        Pair(
            chosen=as_sample(row["prompt"], row["chosen"], tokenizer),
            rejected=as_sample(row["prompt"], row["rejected"], tokenizer),
        )
        for row in rows
    ]


@pytest.mark.parametrize("loss", [PreferenceLoss(beta=0.5, nll_coef=0.3), PreferenceLoss(kind="ipo", beta=0.5)])
@pytest.mark.parametrize("token_budget", [520, 4096])
def test_a_step_has_the_gradient_of_the_loss_written_down(
    token_budget: int, loss: PreferenceLoss, base: Path, pairs_file: Path, tmp_path: Path
) -> None:
    pairs = some_pairs(base, pairs_file, 6)
    config = config_of(base, pairs_file, tmp_path, token_budget=token_budget, grad_clip=1e9, loss=loss)
    dpo = DPO(build_learner(config, 1), loss, pairs)
    dpo.begin(None)
    torch.manual_seed(0)
    dpo.reference_2P = dpo.reference_2P + torch.randn(2, 6)
    found: dict[str, Tensor] = {}
    step = dpo.learner.optimizer.step
    dpo.learner.optimizer.step = lambda *_: found.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in dpo.learner.model.named_parameters() if p.grad is not None}
    )
    report = dpo.update(range(6))
    dpo.learner.optimizer.step = step  # type: ignore[method-assign]

    model = from_pretrained(base)
    totals, lengths = [], []
    for sample in (s for kind in ("chosen", "rejected") for s in (getattr(pair, kind) for pair in pairs)):
        ids = torch.tensor([list(sample.token_ids)])
        logprobs = model.logits(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        totals.append(logprobs[torch.tensor(sample.loss_mask[1:])].sum())
        lengths.append(float(sum(sample.loss_mask)))
    policy, sizes = torch.stack(totals).view(2, 6), torch.tensor(lengths).view(2, 6)
    reference = (dpo.reference_2P[0], dpo.reference_2P[1])
    plain = loss.of_pairs(policy[0], policy[1], reference, (sizes[0], sizes[1])).mean()
    plain.backward()
    assert report["dpo/loss"] == pytest.approx(plain.item(), rel=1e-4)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scale = max(grad.abs().max().item() for grad in expected.values())
    assert set(expected) <= set(found) and scale > 0.01
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-5 * scale, rtol=1e-3, msg=name)


def test_command_learns_the_preference_and_resumes(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    flags = (
        "--pairs-per-step", 16, "--max-length", 256, "--lr", 1e-3, "--epochs", 2, "--save-every", 6, "--loss.beta", 0.2
    )  # fmt: skip
    arguments = ("dpo", "--model", base, "--data", pairs_file, "--out", tmp_path / "run", *flags)
    done = grpo(*arguments)
    assert done.status == 0, done.err
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 12
    assert rows[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the policy before training"
    assert abs(rows[0]["dpo/margin"]) < 1e-4
    assert rows[-1]["dpo/accuracy"] > 0.9 and rows[-1]["dpo/margin"] > 0.5 > rows[-1]["dpo/loss"]
    assert rows[-1]["dpo/margin"] == pytest.approx(rows[-1]["dpo/reward_chosen"] - rows[-1]["dpo/reward_rejected"])
    tensors = dict(read_tensors(tmp_path / "run" / "model"))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000012")
    assert grpo(*arguments, "--resume").status == 0
    assert read_metrics(tmp_path / "run") == rows
    after = dict(read_tensors(tmp_path / "run" / "model"))
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert "holds something already" in grpo(*arguments).one_line_error()


def test_every_pair_once_an_epoch() -> None:
    config = DPOConfig(model="", data="", pairs_per_step=4, epochs=2)
    steps = [places_of(step, 10, config) for step in range(config.num_steps(10))]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([place for step in epoch for place in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_messages_become_the_template_s_text(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "2+2?"}], [{"role": "assistant", "content": "It is 4"}]
    sample = as_sample(prompt, answer, tokenizer)
    text = as_sample(f"<user>2+2?{tokenizer.eos_token}<assistant>", "It is 4", tokenizer)
    assert sample == text
    trained = [t for t, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m]
    assert trained[-1] == tokenizer.eos_token_id and tokenizer.decode(trained[:-1]) == "It is 4"
    assert list(as_sample("a", "b", tokenizer, ended=False).token_ids)[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, (), "field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, (), "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, (), "all texts or all"),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, (), "needs 'role' and 'content'"),
        (
            {name: [{"role": "user", "content": name}] for name in ("prompt", "chosen", "rejected")},
            (), "no chat template",
        ),
        ({"prompt": "a", "chosen": "b c d e f g", "rejected": "c"}, ("--max-length", 4), "no pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("--loss.beta", 0), "beta > 0"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("--token-budget", 100), "token_budget=100"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("--loss.kind", "ipo", "--loss.label-smoothing", 0.1), "ipo"),
    ],
)  # fmt: skip
def test_refused(row: dict[str, Any], flags: tuple[object, ...], message: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ("dpo", "--model", base, "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "run", *flags)
    assert message in grpo(*arguments).one_line_error()
    assert not (tmp_path / "run").exists()


def test_adapters_alone_are_trained(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    config = config_of(base, pairs_file, tmp_path / "run")
    config = replace(config, lora=replace(config.lora, rank=4))
    dpo = DPO(build_learner(config, 4), config.loss, some_pairs(base, pairs_file, 8))
    before = {name: p.clone() for name, p in dpo.learner.model.named_parameters()}
    dpo.begin(None)
    margins = [dpo.update(range(8))["dpo/margin"] for _ in range(4)]
    assert margins[-1] > margins[0] + 0.01
    moved = {name for name, p in dpo.learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora" in name for name in moved)
