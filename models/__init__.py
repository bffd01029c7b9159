"""The DeepSeek-V3 model, its parts and its checkpoints, and other causal models behind the same interface.

Imports nothing else of this project.

    model = models.from_pretrained("checkpoint_dir", dtype=torch.float32, device="cpu")
    logits_BSV = model.logits(tokens_BS)
    models.save_pretrained(model, "out_dir")
"""

from models.allocate import build_model
from models.auto import (
    TransformersCausalLM,
    from_pretrained,
    hf_tensors,
    load_hf_tensors,
    save_pretrained,
)
from models.cache import LatentCache
from models.causal_lm import CausalLM
from models.checkpoint import load_pretrained
from models.config import DeepseekV3Config, RopeParameters
from models.packing import SequenceLayout
from models.presets import PRESETS, find_config
from models.transformer import DeepseekV3ForCausalLM, ModelOutput, Replay

__all__ = [
    "PRESETS",
    "CausalLM",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "LatentCache",
    "ModelOutput",
    "Replay",
    "RopeParameters",
    "SequenceLayout",
    "TransformersCausalLM",
    "build_model",
    "find_config",
    "from_pretrained",
    "hf_tensors",
    "load_hf_tensors",
    "load_pretrained",
    "save_pretrained",
]
