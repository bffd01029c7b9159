"""Pretraining from text: trains a tokenizer and a model from nothing and writes a Hugging Face checkpoint.

    grpo pretrain --data corpus.jsonl --out base

Each line of the data is an object with the field `text`; every token of every document is trained on.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grpo.batch import MicroBatch, TrainingSample
from grpo.packing import pack
from grpo.schedule import learning_rate
from models import DeepseekV3ForCausalLM, build_model, find_config
from models.balance import count_experts, load_metrics, update_correction_bias
from models.checkpoint import replace_folder, write_checkpoint
from models.head import linear_cross_entropy
from models.moe import Routing
from models.mtp import mtp_loss, prediction_routers
from pipelines.config import write_config
from pipelines.console import console, progress_bar
from pipelines.data import Row, load_rows
from pipelines.templates import get_template
from pipelines.tokenizer import train_tokenizer

_TOKENIZER_DOCUMENTS = 5000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
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
    steps: int = 700
    """Optimizer steps."""
    documents_per_step: int = 128
    """Documents in one optimizer step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW, after the warm-up; falls as a cosine."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    balance_speed: float = 1e-3
    """Change per step of the router's correction bias, which keeps the experts evenly loaded; 0 leaves it alone."""
    mtp_weight: float = 0.0
    """Weight of the loss of the multi-token-prediction modules, for an architecture that has some; DeepSeek-V3: 0.3."""
    token_budget: int = 8192
    """Tokens in one micro-batch."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    num_threads: int = 1
    """CPU threads; a second one pays for larger models and on idle cores only."""
    seed: int = 0
    """Of the weights and of the order of documents."""

    def __post_init__(self) -> None:
        for name in ("steps", "documents_per_step", "token_budget", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


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
    model = build_model(sizes, seed=config.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = sum(map(len, documents))
    console.print(
        f"{len(documents):,} documents, {tokens:,} tokens, vocabulary {len(tokenizer)}; model of {parameters:,} "
        f"parameters, {model.config.n_routed_experts} routed experts a layer"
    )
    train(model, documents, config)
    return save_base(model, tokenizer, config)


def train(model: DeepseekV3ForCausalLM, documents: list[list[int]], config: PretrainConfig) -> None:
    """Next-token prediction with AdamW; the router's bias follows the load of each whole batch.

    Raises ValueError if `mtp_weight` and the model's prediction modules do not go together.
    """
    depths = model.config.num_nextn_predict_layers
    if config.mtp_weight < 0 or (config.mtp_weight > 0) != (depths > 0):
        raise ValueError(
            f"mtp_weight={config.mtp_weight} for an architecture with {depths} prediction modules: with modules it "
            "must be positive, without it must be 0 (num_nextn_predict_layers in config.json)"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    batches = document_batches(documents, config.documents_per_step, config.seed)
    routers = model.routers() | prediction_routers(model)
    started, tokens = time.perf_counter(), 0
    with progress_bar("pretraining", config.steps) as bar:
        for step in range(config.steps):
            samples = [
                TrainingSample(
                    token_ids=ids, loss_mask=[False] + [True] * (len(ids) - 1), sampling_logprobs=[0.0] * len(ids)
                )
                for ids in next(batches)
            ]
            counts_LE = {layer: torch.zeros(model.config.n_routed_experts) for layer in routers}
            loss = 0.0
            for batch in pack(samples, config.token_budget, "token"):
                batch_loss, routing = _backward(model, batch, config.mtp_weight)
                loss += batch_loss
                tokens += len(batch.ids_T)
                for layer, routed in routing.items():
                    counts_LE[layer] += count_experts(routed)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=config.lr, warmup_steps=config.warmup_steps, total_steps=config.steps, decay="cosine"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for layer, router in routers.items():
                update_correction_bias(router, counts_LE[layer], config.balance_speed)
            used = load_metrics(counts_LE)["moe/experts_used"] if counts_LE else 1.0
            rate = tokens / (time.perf_counter() - started)
            bar.advance(f"loss {loss:.3f}  experts in use {used:.0%}  {rate:,.0f} tokens/s")


def _backward(model: DeepseekV3ForCausalLM, batch: MicroBatch, mtp_weight: float) -> tuple[float, dict[int, Routing]]:
    """Adds a micro-batch's gradient; its next-token loss and how each layer routed it, prediction modules included."""
    output = model(batch.ids_T, batch.layout)
    predictors_ND = output.hidden_TD.index_select(0, batch.predictors_N)
    loss = linear_cross_entropy(predictors_ND, model.lm_head.weight, batch.targets_N, batch.weights_N)
    if not mtp_weight:
        loss.backward()
        return loss.item(), output.routing
    target_weights_T = torch.zeros(len(batch.ids_T)).index_copy(0, batch.predictors_N + 1, batch.weights_N)
    extra_loss, extra_routing = mtp_loss(
        model, output, batch.ids_T, batch.layout, weight=mtp_weight, target_weights_T=target_weights_T
    )
    (loss + extra_loss).backward()
    return loss.item(), output.routing | extra_routing


def document_batches(documents: list[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    """Endless batches; every document once per epoch, each epoch in its own order."""
    rng = random.Random(f"documents {seed}")
    if size > len(documents):
        raise ValueError(f"documents_per_step={size} exceeds the {len(documents)} documents of the data")
    while True:
        order = rng.sample(range(len(documents)), len(documents))
        for start in range(0, len(order) - size + 1, size):
            yield [documents[i] for i in order[start : start + size]]


def save_base(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig) -> Path:
    out = Path(config.out)
    with replace_folder(out) as fresh:
        write_checkpoint(model, fresh)
        tokenizer.save_pretrained(str(fresh))
        write_config(config, fresh / "pretrain.json")
    return out
