"""vLLM's weight-transfer backend `in_process`: tensors are handed over by reference within one process.

On CPU, vLLM keeps expert matrices in a prepacked form that a reload would overwrite with unpacked ones; the backend
makes it pack them again.
"""

from dataclasses import dataclass
from typing import Any

import torch

BACKEND = "in_process"


def _take_expert_kernels(model: Any) -> dict[Any, Any]:
    """vLLM's method of each expert layer -> its kernel object, which is taken from it.

    On CPU experts are packed only where no kernel object exists yet; with one, a reload would copy unpacked weights
    over packed ones, and the outputs would be silently wrong.
    """
    methods: set[Any] = {getattr(module, "quant_method", None) for module in model.modules()}
    kernels = {method: method.moe_kernel for method in methods if hasattr(method, "moe_kernel")}
    for method in kernels:
        method.moe_kernel = None
    return kernels


def register_backend() -> None:
    """Makes the backend `in_process` known to vLLM, once per process."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        tensors: dict[str, torch.Tensor]

    class InProcessTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass  # there is no connection to open

        loading = False

        def start_weight_update(self) -> None:
            if self.loading:
                # An earlier update failed half way. vLLM goes on counting where that one stopped, and would call a
                # layer complete that got some tensors then and some now; ending it clears the counts.
                finalize_layerwise_reload(self.model, self.model_config)
            self.loading = True
            self.kernels = _take_expert_kernels(self.model) if self.device.type == "cpu" else {}
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            load_weights: Any = self.model.load_weights  # a method, which nn.Module's typing takes for a submodule
            load_weights(update_info.tensors.items())

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            for method, kernel in self.kernels.items():
                if method.moe_kernel is None:  # its experts were not among what came, and are packed still
                    method.moe_kernel = kernel
            self.loading = False

        def shutdown(self) -> None:
            pass

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            """vLLM 0.25.1 has it abstract."""
            raise NotImplementedError("weights are sent by rollout.weight_source.deliver")

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
