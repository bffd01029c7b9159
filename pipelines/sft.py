"""Supervised fine-tuning: R1's cold start, SFT on sampled traces, and the way into a smaller student.

    grpo sft --model base/model --data traces.jsonl --out runs/sft
    grpo sft --architecture tiny --tokenizer teacher --data traces.jsonl --out runs/student

The loss is on what the model is to say and on one end-of-text token (sft_data.py). The run folder holds config.json,
metrics.jsonl, tensorboard/, checkpoints/ if asked, and at the end model/.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from models import CausalLM, from_pretrained
from models.auto import checkpoint_layers
from models.lora import LoRAConfig, add_lora
from pipelines.console import console
from pipelines.data import Row, load_rows
from pipelines.prompting import load_tokenizer
from pipelines.run_folder import open_run_folder
from pipelines.sft_data import EncodedRows, check_row, encode_rows
from pipelines.students import build_student, describe, longest_sequence, write_student
from pipelines.supervised import train_supervised
from pipelines.supervised_config import SupervisedConfig
from pipelines.templates import get_template
from pipelines.token_store import TokenStore


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """`grpo sft`: supervised fine-tuning of a checkpoint, or of fresh weights."""

    data: str
    """File or hub id; rows have `prompt` and `completion`, or `question` and `completion`, or `messages`."""
    split: str = "train"
    """Split of a hub data set."""
    out: str
    """Run folder; the checkpoint is its model/."""
    model: str = ""
    """Folder of the checkpoint to begin with, in Hugging Face form."""
    architecture: str = ""
    """In place of `model`: a named size, or a folder whose config.json gives the sizes, with fresh weights."""
    tokenizer: str = ""
    """Folder of the tokenizer; that of `model` if empty."""
    template: str = "r1"
    """Prompt template for rows with `question`, and the chat template of a tokenizer that has none."""
    max_length: int = 0
    """Tokens of the longest sample; longer ones are left out. 0 for as many as the model has positions and a
    micro-batch takes."""
    heldout: str | None = None
    """File or hub id of the rows for the held-out loss."""
    heldout_share: float = 0.05
    """Without `heldout`: share of the prompts whose samples are kept for the held-out loss."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters in place of the whole model, if `lora.rank` is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        get_template(self.template)
        if self.model and self.architecture:
            raise ValueError("--model is a checkpoint, --architecture has fresh weights: give one of them")
        if self.architecture and not self.tokenizer:
            raise ValueError("--architecture needs --tokenizer, the folder of one: the teacher's, for a student")
        if self.architecture and self.lora.rank:
            raise ValueError("adapters on random weights learn nothing: leave out --lora.rank, or give --model")
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share must be at least 0 and below 1, got {self.heldout_share}")
        if not 0 <= self.max_length <= self.token_budget:
            raise ValueError(f"max_length={self.max_length} must be between 0 and token_budget={self.token_budget}")


def run_sft(config: SFTConfig) -> Path:
    """The whole of `grpo sft`; the folder of the checkpoint."""
    torch.set_num_threads(config.num_threads)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = get_template(config.template).chat_template
    rows, others = _rows(config, config.data), _rows(config, config.heldout) if config.heldout else []
    model = start_model(config, tokenizer)
    longest = config.max_length or longest_sequence(model, config.token_budget)
    training, heldout = sample_stores(rows, others, config, tokenizer, longest)
    out = Path(config.out)
    open_run_folder(config, out)
    console.print(
        f"{len(training):,} samples with {training.num_trained:,} of {len(training.ids_W):,} tokens to train, "
        f"{len(heldout):,} samples held out; {describe(model)}",
        soft_wrap=True,
    )
    result = train_supervised(model, training, config, heldout=heldout, run_dir=out, title="fine-tuning")
    if result.stopped_early:
        console.print(f"no better held-out loss in {config.patience} evaluations: stopped after {result.steps} steps")
    return write_student(model, tokenizer, out / "model")


def _rows(config: SFTConfig, source: str) -> list[Row]:
    rows = load_rows(
        source, split=config.split, check=check_row, max_bad_share=config.max_bad_share, report=console.print
    )
    return [row.row for row in rows]


def start_model(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    """The checkpoint, with adapters if asked, or fresh weights; where and in the dtype in which it is to be trained."""
    dtype, device = config.torch_dtype, config.torch_device
    if config.architecture:
        model = build_student(config.architecture, tokenizer, seed=config.seed, dtype=dtype, device=device)
    else:
        model = from_pretrained(config.model, dtype=dtype, device=device, quantize=config.lora.quantize_base)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {config.tokenizer} has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "take the model's own"
        )
    if config.checkpoint_layers:
        checkpoint_layers(model)
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.seed)
    return model


def sample_stores(
    rows: Sequence[Row], heldout: Sequence[Row], config: SFTConfig, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[TokenStore, TokenStore]:
    """Training and held-out samples. Without rows of their own, the latter are those of some of the prompts, so that no
    prompt is on both sides."""
    template = get_template(config.template)

    def encoded(some: Sequence[Row]) -> EncodedRows:
        result = encode_rows(some, template, tokenizer, max_length=longest)
        if result.num_dropped:
            count = result.num_dropped + len(result.store)
            console.print(f"{result.num_dropped} of {count} samples are longer than {longest} tokens: left out")
        return result

    training = encoded(rows)
    if heldout:
        return training.store, encoded(heldout).store
    prompts = sorted(set(training.prompts))
    count = min(round(config.heldout_share * len(prompts)) or int(config.heldout_share > 0), len(prompts) - 1)
    held = set(random.Random(f"heldout {config.seed}").sample(prompts, count))
    sides: tuple[list[int], list[int]] = ([], [])
    for place, prompt in enumerate(training.prompts):
        sides[prompt in held].append(place)
    return training.store.part(sides[0]), training.store.part(sides[1])
