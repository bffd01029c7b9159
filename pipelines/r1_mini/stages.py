"""The steps that arms are made of, each from checkpoint folder to checkpoint folder, in this process, on one thread."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.batch import TrainingSample
from grpo.learner_config import LearnerConfig
from grpo.metrics import read_metrics
from grpo.samples import score_groups
from grpo.trainer import TrainerConfig
from models import CausalLM, build_model, from_pretrained
from models.auto import write_checkpoint
from models.checkpoint import replace_folder
from models.config import DeepseekV3Config
from pipelines.console import console
from pipelines.data import NumberedRow
from pipelines.distill import OnPolicyConfig, run_on_policy
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token
from pipelines.supervised import SupervisedConfig, train_supervised
from pipelines.tasks import countdown_mini, get_task, ledger, variables
from pipelines.templates import R1_PREAMBLE
from pipelines.tokenizer import train_tokenizer
from pipelines.zero import ZeroConfig, run_zero
from rollout.engine import EngineConfig
from rollout.pool import build_pool
from rollout.sample import SamplingParams

ENGINE = EngineConfig(kind="native", transport="local", max_model_len=256)
"""The native engine: five times faster than vLLM at this size, which spends its time on requests."""
VOCABULARY = 640
Row = dict[str, Any]
Pair = tuple[str, str]
"""Prompt and completion."""


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_json_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_rows(
    task: str, count: int, seed: int, exclude: frozenset[Any] = frozenset(), *, corpus: bool = False
) -> list[Row]:
    """Problems outside `exclude`; those of a corpus of variables are mostly of the depths that are worked out."""
    if task == "countdown-mini":
        return countdown_mini.make_rows(count, seed, exclude)
    if task == "ledger":
        return ledger.make_rows(count, seed, exclude)
    return variables.make_rows(count, seed, exclude, variables.CORPUS_DEPTHS if corpus else variables.TRAINING_DEPTHS)


def problem(task: str, row: Row) -> Any:
    """What is held out: the problem, not its wording."""
    return countdown_mini.problem(row) if task == "countdown-mini" else row["question"]


def documents(task: str, rows: list[Row], rng: random.Random) -> list[Pair]:
    texts = {"countdown-mini": countdown_mini, "ledger": ledger, "variables": variables}[task].documents(rows, rng)
    split = (text.rpartition(" Assistant:") for text in texts)
    return [(before + middle, after) for before, middle, after in split]


def training_samples(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[TrainingSample]:
    """Loss on the completion and one end-of-text token."""
    prompts, completions = (
        tokenizer([pair[side] for pair in pairs], add_special_tokens=False)["input_ids"] for side in (0, 1)
    )
    return [
        TrainingSample(
            token_ids=[*prompt, *completion, stop_token(tokenizer)],
            loss_mask=[False] * len(prompt) + [True] * (len(completion) + 1),
            sampling_logprobs=[0.0] * (len(prompt) + len(completion) + 1),
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def save(model: CausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> Path:
    with replace_folder(out) as fresh:
        write_checkpoint(model, fresh)
        tokenizer.save_pretrained(str(fresh))
    return out


def pretrain(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, architecture: DeepseekV3Config, out: Path, *,
    documents_per_step: int, lr: float, seed: int,
) -> Path:  # fmt: skip
    """A base model that reads every document once and learns what stands behind the question: random questions teach
    nothing, and their noise slows the rest down by a factor of several."""
    end, padding = stop_token(tokenizer), tokenizer.pad_token_id
    assert isinstance(padding, int)
    model = build_model(architecture.with_vocabulary(len(tokenizer), bos=None, eos=end, pad=padding), seed=seed)
    config = SupervisedConfig(
        steps=len(pairs) // documents_per_step, samples_per_step=documents_per_step, lr=lr,
        warmup_steps=min(50, len(pairs) // documents_per_step // 2), weight_decay=0.01, final_lr_share=0.05,
        balance_speed=1e-3, seed=seed, device="cpu",
    )  # fmt: skip
    train_supervised(model, training_samples(pairs, tokenizer), config, title="pretraining")
    return save(model, tokenizer, out)


def new_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerBase:
    """Of the first documents: every number and operation of the tasks is one token."""
    return train_tokenizer([prompt + completion for prompt, completion in pairs[:5000]], VOCABULARY, [R1_PREAMBLE])


def supervise(model: Path, pairs: Sequence[Pair], out: Path, *, epochs: float, lr: float, seed: int) -> int:
    """SFT; the tokens trained on, each as often as it was."""
    tokenizer, policy = load_tokenizer(str(model)), from_pretrained(model)
    config = SupervisedConfig(
        epochs=epochs, samples_per_step=min(64, len(pairs)), lr=lr, seed=seed, device="cpu",
    )  # fmt: skip
    samples = training_samples(pairs, tokenizer)
    train_supervised(policy, samples, config, title="SFT")
    save(policy, tokenizer, out)
    return round(epochs * sum(sample.num_trained for sample in samples))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What RL and on-policy distillation share."""

    task: str
    data: Path
    steps: int
    lr: float
    group: int
    seed: int

    def fields(self, model: Path, out: Path) -> dict[str, Any]:
        trainer = TrainerConfig(
            steps=self.steps, prompts_per_step=self.group, completions_per_prompt=self.group,
            max_tokens=get_task(self.task).max_tokens, save_every=self.steps, log_groups_every=0, probe_every=25,
            seed=self.seed,
        )  # fmt: skip
        return {
            "model": str(model), "task": self.task, "data": str(self.data), "out": str(out), "device": "cpu",
            "trainer": trainer, "learner": LearnerConfig(lr=self.lr), "engine": ENGINE,
        }  # fmt: skip


def reinforce(loop: Loop, model: Path, out: Path, reward: tuple[str, ...] = ()) -> Path:
    """GRPO from `model`; the trained model."""
    return run_zero(ZeroConfig(**loop.fields(model, out), reward=reward))


def distill_on_policy(loop: Loop, model: Path, teacher: Path, out: Path) -> Path:
    """Full-vocabulary reverse KL to the teacher on the student's own samples; the trained student."""
    return run_on_policy(OnPolicyConfig(**loop.fields(model, out), teacher=str(teacher), divergence="whole"))


def curve(run: Path, task: str) -> dict[str, list[float]]:
    """Per step: accuracy, words of thought, sampled tokens, of what was sampled in training."""
    rows = read_metrics(run)
    names = {
        "accuracy": f"reward/{get_task(task).accuracy}", "thinking": "reward/thinking_length",
        "tokens": "completion/tokens", "format": "reward/r1_format",
    }  # fmt: skip
    return {name: [round(row[key], 4) for row in rows] for name, key in names.items()}


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One completion and what the rewards say of it."""

    row: Row
    prompt: str
    completion: str
    tokens: int
    right: bool
    truncated: bool
    metrics: dict[str, float]
    answer: str

    @property
    def words(self) -> list[str]:
        """Of the thought."""
        return self.completion.partition("<think>")[2].partition("</think>")[0].split()


def sample(
    model: Path, task_name: str, rows: Sequence[Row], *, count: int, seed: int, temperature: float = 1.0,
    prefill: str = "",
) -> list[list[Sampled]]:  # fmt: skip
    """`count` completions of each row's problem, judged by the task's rewards."""
    task, tokenizer = get_task(task_name), load_tokenizer(str(model))
    numbered = [NumberedRow(number=number, row=row) for number, row in enumerate(rows, 1)]
    prompts = build_prompts(
        numbered, task, tokenizer, max_tokens=ENGINE.max_model_len, report=console.print, prefill=prefill
    )
    params = SamplingParams(
        num_completions=count, max_tokens=task.max_tokens, temperature=temperature,
        stop_token_id=stop_token(tokenizer), seed=seed,
    )  # fmt: skip
    pool, rubric, decode = build_pool(ENGINE, str(model)), build_rubric((), task), decoder(tokenizer)
    try:
        groups = {group.prompt.id: group for group in pool.generate(prompts, params)}
    finally:
        pool.close()
    ordered = [groups[prompt.id] for prompt in prompts]
    result = []
    for group, scores in zip(ordered, score_groups(ordered, rubric, decode, step=0), strict=True):
        texts = decode([completion.token_ids for completion in group.completions])
        result.append(
            [
                Sampled(
                    row=dict(group.prompt.row), prompt=group.prompt.text, completion=text,
                    tokens=len(completion.token_ids), right=score.metrics[task.accuracy] >= 1,
                    truncated=completion.finish_reason.value == "length", metrics=dict(score.metrics),
                    answer=str(score.info[task.accuracy]["extracted"]),
                )
                for text, completion, score in zip(texts, group.completions, scores, strict=True)
            ]
        )  # fmt: skip
    return result


def is_true_thought(task: str, sampled: Sampled) -> bool:
    """Whether a thought is complete and every word of it is right: it can be read and checked."""
    if task == "ledger":
        return sampled.words == [str(state) for state in sampled.row["states"]]
    if task == "variables":
        return sampled.words == sampled.row["thought"]
    return countdown_mini.is_true_thought(sampled.words, sampled.row)


def summarise(task: str, groups: Sequence[Sequence[Sampled]]) -> dict[str, Any]:
    """Of one completion per problem, or with several: also the majority's accuracy."""
    flat = [one for group in groups for one in group]
    full = [one.right for one in flat if is_true_thought(task, one) or len(one.words) >= full_length(task, one.row)]
    summary: dict[str, Any] = {
        "problems": len(groups),
        "samples": len(flat),
        "accuracy": fmean(one.right for one in flat),
        "thinking": fmean(len(one.words) for one in flat),
        "format": fmean(one.metrics["r1_format"] for one in flat),
        "true_thought": fmean(is_true_thought(task, one) for one in flat),
        "truncated": fmean(one.truncated for one in flat),
        "full_share": len(full) / len(flat),
        "full_accuracy": fmean(full) if full else 0.0,
    }
    if task == "countdown-mini":
        summary["attempts"] = fmean(one.words.count("no") + one.words.count("yes") for one in flat)
    if task == "variables":
        depths = sorted({one.row["depth"] for one in flat})
        summary["by_depth"] = {d: fmean(one.right for one in flat if one.row["depth"] == d) for d in depths}
    if len(groups[0]) > 1:
        votes = [Counter(one.answer for one in group).most_common(1)[0][0] for group in groups]
        summary["majority"] = fmean(
            any(one.right for one in group if one.answer == vote) for group, vote in zip(groups, votes, strict=True)
        )
    return summary


def full_length(task: str, row: Row) -> int:
    """Words of a whole thought; of a search that did not stop early there is no such number."""
    if task == "ledger":
        return len(row["states"])
    return len(row["thought"]) if task == "variables" else 10**9
