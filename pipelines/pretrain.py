"""Pretraining from text: trains a tokenizer and a model from nothing and writes a Hugging Face checkpoint.

    grpo pretrain --data corpus.jsonl --out base
    grpo pretrain --data corpus.jsonl --out base --architecture mini --vocab-size 16384 --dtype bfloat16 \
        --epochs 1 --steps 0 --tokens-per-step 524288 --token-budget 65536 --heldout-share 0.002 --save-every 500

Each line of the data is an object with the field `text`; every token of every document is trained on. The run folder
holds config.json, tokenizer/, metrics.jsonl, tensorboard/, checkpoints/ if asked, and at the end model/.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from models import CausalLM, DeepseekV3ForCausalLM
from models.auto import checkpoint_layers
from models.checkpoint import replace_folder
from pipelines.console import console
from pipelines.data import Row, load_rows
from pipelines.prompting import load_tokenizer, stop_token
from pipelines.run_folder import open_run_folder
from pipelines.students import build_student, describe, longest_sequence, write_student
from pipelines.supervised import train_supervised
from pipelines.supervised_config import SupervisedConfig
from pipelines.templates import get_template
from pipelines.token_store import TokenStore
from pipelines.tokenizer import encode_texts, train_tokenizer

_TOKENIZER_DOCUMENTS = 5000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(SupervisedConfig):
    """`grpo pretrain`: a base model from text."""

    data: str
    """File or hub id; each row has a field `text`."""
    split: str = "train"
    """Split of a hub data set."""
    out: str
    """Run folder; the checkpoint is its model/."""
    architecture: str = "tiny"
    """A named size, or a folder whose config.json gives the sizes, of our model or of a dense one of transformers."""
    tokenizer: str = ""
    """Folder of a tokenizer to take, so that models can share one; empty to train one on the text."""
    vocab_size: int = 512
    """Largest vocabulary of a trained tokenizer."""
    single_token_templates: tuple[str, ...] = ()
    """Prompt templates whose constant opening becomes one token of a trained tokenizer's vocabulary."""
    max_length: int = 0
    """Tokens after which a document is cut, the rest being another one; 0 for as many as the model has positions and a
    micro-batch takes."""
    heldout_share: float = 0.0
    """Share of the documents that is kept for the held-out loss."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    steps: int = 700
    samples_per_step: int = 128
    lr: float = 4e-3
    warmup_steps: int = 50
    final_lr_share: float = 0.05
    weight_decay: float = 0.01
    decay_vectors: bool = True
    balance_speed: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share must be at least 0 and below 1, got {self.heldout_share}")
        if not 0 <= self.max_length <= self.token_budget:
            raise ValueError(f"max_length={self.max_length} must be between 0 and token_budget={self.token_budget}")


def check_text(row: Row) -> str | None:
    return None if isinstance(row.get("text"), str) and row["text"] else "field 'text' is missing or empty"


def run_pretrain(config: PretrainConfig) -> Path:
    """The whole of `grpo pretrain`; the folder of the checkpoint."""
    torch.set_num_threads(config.num_threads)
    rows = load_rows(
        config.data, split=config.split, check=check_text, max_bad_share=config.max_bad_share, report=console.print
    )
    texts = [row.row["text"] for row in rows]
    out = Path(config.out)
    open_run_folder(config, out)
    tokenizer = base_tokenizer(config, texts, out / "tokenizer")
    model = build_student(
        config.architecture, tokenizer, seed=config.seed, dtype=config.torch_dtype, device=config.torch_device
    )
    check_predictors(model, config)
    if config.checkpoint_layers:
        checkpoint_layers(model)
    longest = config.max_length or longest_sequence(model, config.token_budget)
    documents, heldout = text_stores(texts, tokenizer, longest, config.heldout_share, config.seed)
    console.print(
        f"{len(texts):,} documents in {len(documents) + len(heldout):,} pieces, {len(documents.ids_W):,} tokens to "
        f"train, {len(heldout.ids_W):,} held out, vocabulary {len(tokenizer)}; {describe(model)}",
        soft_wrap=True,
    )
    train_supervised(model, documents, config, heldout=heldout, run_dir=out, title="pretraining")
    return write_student(model, tokenizer, out / "model")


def base_tokenizer(config: PretrainConfig, texts: Sequence[str], folder: Path) -> PreTrainedTokenizerBase:
    """The one given, the one of the run to be resumed, or a new one, which is kept in `folder`."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    if not folder.exists():
        phrases = [get_template(name).preamble for name in config.single_token_templates]
        trained = train_tokenizer(texts[:_TOKENIZER_DOCUMENTS], config.vocab_size, phrases)
        with replace_folder(folder) as fresh:
            trained.save_pretrained(str(fresh))
    return load_tokenizer(str(folder))


def check_predictors(model: CausalLM, config: PretrainConfig) -> None:
    """Raises ValueError if prediction modules would stay as random as they are."""
    depths = model.config.num_nextn_predict_layers if isinstance(model, DeepseekV3ForCausalLM) else 0
    if depths and not config.mtp_weight:
        raise ValueError(
            f"mtp_weight=0 for {config.architecture} with {depths} prediction modules, which would stay random: "
            "DeepSeek-V3 took 0.3; or build a model without them (num_nextn_predict_layers in config.json)"
        )


def text_stores(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int, heldout_share: float, seed: int
) -> tuple[TokenStore, TokenStore]:
    """Training and held-out documents, each ending with end-of-text, cut into pieces of `longest` tokens."""
    end = np.array([stop_token(tokenizer)], np.int32)
    documents = [np.concatenate([ids, end]) for ids in encode_texts(tokenizer, texts)]
    held = set(random.Random(f"heldout {seed}").sample(range(len(documents)), round(heldout_share * len(documents))))
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for place, ids in enumerate(documents):
        parts[place in held].extend(ids[start : start + longest] for start in range(0, len(ids), longest))
    # A piece of one token has nothing to train.
    training, heldout = (TokenStore.of_texts([piece for piece in pieces if len(piece) > 1]) for pieces in parts)
    return training, heldout
