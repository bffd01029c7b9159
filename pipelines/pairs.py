"""Pairs of a better and a worse completion: their rows, and the loop that learns from them.

Each row has `prompt`, `chosen` and `rejected`: exact texts, the prompt as the model sees it; or lists of messages
({"role": ..., "content": ...}), which the tokenizer's chat template puts into text.

    pairs = load_pairs("pairs.jsonl", tokenizer, config)
    finished = learn_from_pairs(learner, num_pairs, config, step, state, show, "DPO")
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo.batch import TrainingSample
from grpo.checkpoint import Saved, load_checkpoint, save_checkpoint
from grpo.interruption import interruption
from grpo.metrics import MetricsLogger
from grpo.schedule import Decay
from pipelines.console import console, progress_bar
from pipelines.data import Row, load_rows
from pipelines.prompting import stop_token


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """What `grpo dpo` and `grpo reward-model` have in common."""

    model: str
    """Folder of the checkpoint to begin with."""
    data: str
    """File or hub id; each row has `prompt`, `chosen` and `rejected`, texts or messages."""
    split: str = "train"
    """Split of a hub data set."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    max_length: int = 2048
    """Longest prompt plus completion, in tokens; pairs with a longer one are left out."""
    out: str
    """Run folder."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, gradients and optimizer state."""
    checkpoint_layers: bool = False
    """Compute each layer's activations again in the backward pass: a third more work, far less memory."""
    num_threads: int = 1
    """CPU threads."""
    token_budget: int = 8192
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""
    epochs: int = 1
    """How often each pair is learned from."""
    pairs_per_step: int
    """Pairs in one optimizer step; the last step of an epoch has what is left."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises."""
    lr_decay: Decay = "cosine"
    """What the learning rate does after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, of matrices only."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    seed: int = 0
    """Of the order of pairs, and of fresh weights."""

    def __post_init__(self) -> None:
        for name in ("max_length", "num_threads", "epochs", "pairs_per_step", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.token_budget < 2 * self.max_length:
            raise ValueError(
                f"token_budget={self.token_budget} may not hold a pair of max_length={self.max_length} each; raise the "
                "first or lower the second"
            )

    def num_steps(self, num_pairs: int) -> int:
        return self.epochs * -(-num_pairs // self.pairs_per_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two completions of one prompt, each with the end-of-text token; loss on the completion."""

    chosen: TrainingSample
    rejected: TrainingSample


def check_pair(row: Row) -> str | None:
    """None if the row is usable, else why not."""
    for name in ("prompt", "chosen", "rejected"):
        value = row.get(name)
        if not value or not isinstance(value, str | list):
            return f"field {name!r} is missing, empty, or neither text nor messages"
        if isinstance(value, list) and not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
            return f"field {name!r}: each message needs 'role' and 'content'"
    kinds = {type(row[name]) for name in ("prompt", "chosen", "rejected")}
    if len(kinds) > 1:
        return "prompt, chosen and rejected must be all texts or all messages"
    return "chosen and rejected are equal" if row["chosen"] == row["rejected"] else None


def load_pairs(tokenizer: PreTrainedTokenizerBase, config: PairConfig) -> list[Pair]:
    """All pairs that fit into `max_length`, in the data's order. Raises ValueError if none does, and for messages where
    the tokenizer has no chat template."""
    rows = load_rows(
        config.data, split=config.split, check=check_pair, max_bad_share=config.max_bad_share, report=console.print
    )
    pairs = []
    for row in rows:
        chosen, rejected = (as_sample(row.row["prompt"], row.row[name], tokenizer) for name in ("chosen", "rejected"))
        if max(len(chosen.token_ids), len(rejected.token_ids)) <= config.max_length:
            pairs.append(Pair(chosen=chosen, rejected=rejected))
    if len(pairs) < len(rows):
        console.print(f"{len(rows) - len(pairs)} of {len(rows)} pairs are longer than {config.max_length}: left out")
    if not pairs:
        raise ValueError(f"no pair of {config.data} fits into max_length={config.max_length}; raise it")
    return pairs


def as_sample(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True
) -> TrainingSample:
    """One completion in tokens, from texts or messages; `ended` adds the end-of-text token to a text."""
    end = [stop_token(tokenizer)] if ended else []
    if not isinstance(prompt, str):
        prompt, completion = _in_template(prompt, completion, tokenizer)
        end = []  # the template's own
    before, behind = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, completion))
    behind += end
    return TrainingSample(
        token_ids=before + behind,
        loss_mask=[False] * len(before) + [True] * len(behind),
        sampling_logprobs=[0.0] * (len(before) + len(behind)),
    )


def _in_template(prompt: list[Any], completion: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the data has messages and the tokenizer no chat template; give texts, or put a chat_template into "
            "tokenizer_config.json"
        )
    template: Any = tokenizer.apply_chat_template
    opening = template(prompt, tokenize=False, add_generation_prompt=True)
    whole = template(prompt + completion, tokenize=False)
    if not whole.startswith(opening):
        raise ValueError(
            f"the chat template writes a prompt otherwise once an answer follows ({opening[-60:]!r}); give texts"
        )
    return opening, whole.removeprefix(opening)


def places_of(step: int, num_pairs: int, config: PairConfig) -> list[int]:
    """Which pairs a step learns from: each once per epoch, each epoch in its own order."""
    per_epoch = config.num_steps(num_pairs) // config.epochs
    epoch, within = divmod(step, per_epoch)
    order = random.Random(f"pairs {config.seed} {epoch}").sample(range(num_pairs), num_pairs)
    return order[within * config.pairs_per_step : (within + 1) * config.pairs_per_step]


def learn_from_pairs(
    learner: Saved,
    num_pairs: int,
    config: PairConfig,
    begin: Callable[[dict[str, Any] | None], dict[str, Any]],
    update: Callable[[Sequence[int]], dict[str, float]],
    line: Callable[[dict[str, float]], str],
    title: str,
) -> None:
    """Optimizer steps until all epochs are done, with metrics.jsonl and checkpoints in the run folder.

    `begin` is called once, with what the checkpoint holds beside the learner or None, and says what checkpoints will
    hold; `update` takes the step that learns from the pairs at these places. Raises SystemExit after Ctrl-C, when the
    step under way has been finished and saved.
    """
    out, total = Path(config.out), config.num_steps(num_pairs)
    first, kept = load_checkpoint(out, learner, console.print)
    state = begin(kept)
    logger = MetricsLogger(out, first)
    try:
        with interruption(console.print) as asked, progress_bar(title, total) as bar:
            if first:
                bar.advance("resumed", steps=first)
            for step in range(first, total):
                metrics = update(places_of(step, num_pairs, config))
                logger.log(step, metrics)
                bar.advance(line(metrics))
                if asked.is_set() or (step + 1) % config.save_every == 0 or step + 1 == total:
                    save_checkpoint(out, learner, step + 1, state)
                if asked.is_set() and step + 1 < total:
                    console.print(f"stopped and saved after {step + 1} of {total} steps; --resume continues")
                    raise SystemExit(130)
    finally:
        logger.close()
