"""Pretraining from text: trains a tokenizer and a model from nothing and writes a Hugging Face checkpoint.

    grpo pretrain --data corpus.jsonl --out base

Each line of the data is an object with the field `text`; every token of every document is trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from models import DeepseekV3ForCausalLM, build_model, find_config
from models.checkpoint import replace_folder, write_checkpoint
from pipelines.config import write_config
from pipelines.console import console
from pipelines.data import Row, load_rows
from pipelines.supervised import train_supervised
from pipelines.supervised_config import SupervisedConfig
from pipelines.templates import get_template
from pipelines.token_store import TokenStore
from pipelines.tokenizer import train_tokenizer

_TOKENIZER_DOCUMENTS = 5000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(SupervisedConfig):
    """`grpo pretrain`: a base model from text."""

    data: str
    """File or hub id; each row has a field `text`."""
    split: str = "train"
    """Split of a hub data set."""
    out: str
    """Folder of the new checkpoint."""
    architecture: str = "tiny"
    """A named size, or a folder whose config.json gives the sizes."""
    vocab_size: int = 512
    """Largest vocabulary of the tokenizer."""
    single_token_templates: tuple[str, ...] = ()
    """Prompt templates whose constant opening becomes one token of the vocabulary."""
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


def check_text(row: Row) -> str | None:
    return None if isinstance(row.get("text"), str) and row["text"] else "field 'text' is missing or empty"


def run_pretrain(config: PretrainConfig) -> Path:
    """The whole of `grpo pretrain`; the folder of the checkpoint."""
    if not config.out:
        raise ValueError("no folder given for the checkpoint: add --out")
    if Path(config.out).exists():
        raise ValueError(f"{config.out} exists already; choose another --out")
    torch.set_num_threads(config.num_threads)
    rows = load_rows(
        config.data, split=config.split, check=check_text, max_bad_share=config.max_bad_share, report=console.print
    )
    texts = [row.row["text"] for row in rows]
    phrases = [get_template(name).preamble for name in config.single_token_templates]
    tokenizer = train_tokenizer(texts[:_TOKENIZER_DOCUMENTS], config.vocab_size, phrases)
    end = tokenizer.eos_token_id
    documents = [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert isinstance(end, int) and isinstance(tokenizer.pad_token_id, int)
    sizes = find_config(config.architecture)
    sizes = sizes.with_vocabulary(len(tokenizer), bos=None, eos=end, pad=tokenizer.pad_token_id)
    depths = sizes.num_nextn_predict_layers
    if depths and not config.mtp_weight:
        raise ValueError(
            f"{config.architecture} has {depths} prediction modules, which would keep their random weights: set "
            "mtp_weight, DeepSeek-V3 took 0.3, or build a model without (num_nextn_predict_layers in config.json)"
        )
    model = build_model(sizes, seed=config.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = sum(map(len, documents))
    console.print(
        f"{len(documents):,} documents, {tokens:,} tokens, vocabulary {len(tokenizer)}; model of {parameters:,} "
        f"parameters, {model.config.n_routed_experts} routed experts a layer"
    )
    train_supervised(model, TokenStore.of_texts(documents), config, title="pretraining")
    return save_base(model, tokenizer, config)


def save_base(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig) -> Path:
    out = Path(config.out)
    with replace_folder(out) as fresh:
        write_checkpoint(model, fresh)
        tokenizer.save_pretrained(str(fresh))
        write_config(config, fresh / "pretrain.json")
    return out
