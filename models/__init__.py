"""The DeepSeek-V3 model, its parts and its checkpoints. Imports nothing else of this project.

from models import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout, load_pretrained, save_pretrained
"""

from models.cache import LatentCache
from models.checkpoint import hf_tensors, load_hf_tensors, load_pretrained, save_pretrained
from models.config import DeepseekV3Config, RopeParameters
from models.packing import SequenceLayout
from models.transformer import DeepseekV3ForCausalLM, ModelOutput

__all__ = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "LatentCache",
    "ModelOutput",
    "RopeParameters",
    "SequenceLayout",
    "hf_tensors",
    "load_hf_tensors",
    "load_pretrained",
    "save_pretrained",
]
