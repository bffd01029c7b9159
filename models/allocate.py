"""Models made where they are to live, in their final dtype; never a float32 copy in main memory first.

model = build_model(find_config("16b-a3b"), seed=0, dtype=torch.bfloat16, device="cuda")
"""

import torch
from torch import nn

from models.config import DeepseekV3Config
from models.rope import RotaryTable, inverse_frequencies
from models.transformer import DeepseekV3ForCausalLM


def build_model(
    config: DeepseekV3Config, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DeepseekV3ForCausalLM:
    """A model with fresh weights from `seed` (`init_weights`); the numbers drawn depend on the kind of device."""
    model = skeleton(config)
    allocate(model, dtype, torch.device(device))
    model.init_weights(seed)
    return model


def skeleton(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """Shapes and names without memory."""
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config)


def allocate(model: DeepseekV3ForCausalLM, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a skeleton its memory, to be filled by a checkpoint or `init_weights`; parameters that were one stay one.

    The router's correction bias stays float32.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=device))
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
        if isinstance(module, RotaryTable):  # no checkpoint holds its frequencies
            rope = model.config.rope_parameters
            module.inverse_frequencies_R = inverse_frequencies(model.config.qk_rope_head_dim, rope).to(device)
        else:
            assert not module._non_persistent_buffers_set, f"{type(module).__name__} has a buffer that nothing fills"
