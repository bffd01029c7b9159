"""Models for supervised stages: from a checkpoint, or of an architecture with fresh weights, ours or a dense one.

model = build_student("tiny", tokenizer, seed=0, dtype=torch.float32, device=torch.device("cpu"))
write_student(model, tokenizer, Path("run/model"))
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from models import CausalLM, TransformersCausalLM, build_model, find_config
from models.auto import read_model_type, write_checkpoint
from models.checkpoint import replace_folder
from models.config import MODEL_TYPES
from models.presets import PRESETS
from pipelines.prompting import stop_token


def foreign_config(folder: str) -> Any:
    """The configuration of an architecture of transformers; ValueError naming the folder if it knows none there."""
    from transformers import AutoConfig  # takes seconds to import

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def build_student(
    architecture: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """A model of a preset's sizes or of those in a folder's config.json, with the tokenizer's vocabulary and weights
    from `seed`. Raises ValueError for what is neither, or an architecture that is not covered."""
    assert isinstance(tokenizer.pad_token_id, int | None)
    path = Path(architecture) / "config.json"
    if architecture in PRESETS or not path.is_file() or read_model_type(path) in MODEL_TYPES:
        sizes = find_config(architecture)
        end, pad = stop_token(tokenizer), tokenizer.pad_token_id
        sizes = sizes.with_vocabulary(len(tokenizer), bos=None, eos=end, pad=end if pad is None else pad)
        return build_model(sizes, seed=seed, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM  # takes seconds to import

    config = foreign_config(architecture)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, stop_token(tokenizer), tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return TransformersCausalLM(reference.to(device))


def longest_sequence(model: CausalLM, token_budget: int) -> int:
    """What the model has positions for, and a micro-batch takes."""
    config: Any = model.config
    return min(getattr(config, "max_position_embeddings", None) or token_budget, token_budget)


def describe(model: CausalLM) -> str:
    """Its size in words."""
    config: Any = model.config
    experts = getattr(config, "n_routed_experts", 0)
    size = f"model of {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    return f"{size}, {experts} routed experts a layer" if experts else size


def write_student(model: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes a Hugging Face checkpoint with its tokenizer; an existing folder is replaced whole, or not at all."""
    with replace_folder(folder) as fresh:
        write_checkpoint(model, fresh)
        tokenizer.save_pretrained(str(fresh))
    return folder
