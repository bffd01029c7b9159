"""Which experts vLLM's router chose for each token of a request.

On CUDA vLLM records them itself (`enable_return_routed_experts`). On CPU it does not, in any version: there a hook on
each router keeps what the passes of the model chose, which needs the engine core in this process.

Shapes: T tokens of a request or of one pass, L layers with experts, K experts per token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import DeepseekV3Config
from rollout.router_replay import pack_ids, unrecorded
from rollout.vllm_versions import has


def recording_options(config: DeepseekV3Config, vllm_version: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` with which it records on CUDA; none on CPU or for a model without experts."""
    if not torch.cuda.is_available() or not expert_layers(config):
        return {}
    options: dict[str, Any] = {"enable_return_routed_experts": True}
    if has("records_in_v2", vllm_version):
        options["enable_prefix_caching"] = True  # the V2 runner refuses to record without it
    return options


def expert_layers(config: DeepseekV3Config) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


class ExpertRecorder:
    """Gives each finished request's experts as `Completion.expert_ids`; on CPU it holds them until asked."""

    def __init__(self, llm: Any, config: DeepseekV3Config) -> None:
        """`llm` is a `vllm.LLM` started with `recording_options`; on CPU its routers are hooked here."""
        self._config = config
        self._layers = expert_layers(config)
        self._passes: dict[str, list[tuple[int, np.ndarray]]] = {}
        """Request -> (position of the first row, [T, L, K]) of each pass, on CPU."""
        self._current: dict[int, Tensor] = {}
        """Layer -> [T, K] of the pass that is running."""
        if self._layers and not torch.cuda.is_available():
            llm.collective_rpc(self._attach)

    def take(self, output: Any) -> np.ndarray | None:
        """The experts of a finished request, [prompt + completion - 1, L, K]; None where there are none. Ask once."""
        if not self._layers:
            return None
        completion = output.outputs[0]
        num_rows = len(output.prompt_token_ids) + len(completion.token_ids) - 1
        if torch.cuda.is_available():
            return self._from_vllm(completion.routed_experts, num_rows)
        return self._assemble(self._passes.pop(output.request_id, []), num_rows)

    def forget(self, request_id: str) -> None:
        """Drops what is held of a request that will not be asked for: one that was aborted."""
        self._passes.pop(request_id, None)

    def _from_vllm(self, recorded: np.ndarray | None, num_rows: int) -> np.ndarray:
        """From vLLM's [T, all layers, K], where dense layers, and tokens it lost, are zeros."""
        chunks = [] if recorded is None else [(0, recorded[:, self._layers])]
        ids_TLK = self._assemble(chunks, num_rows)
        if self._config.num_experts_per_tok > 1:
            ids_TLK[(ids_TLK == 0).all(axis=-1)] = np.iinfo(ids_TLK.dtype).max
        return ids_TLK

    def _assemble(self, chunks: Sequence[tuple[int, np.ndarray]], num_rows: int) -> np.ndarray:
        """The last pass of a token wins; a token without any stays unrecorded."""
        config = self._config
        ids_TLK = unrecorded(num_rows, len(self._layers), config.num_experts_per_tok, config.n_routed_experts)
        for first, chunk_TLK in chunks:
            kept = chunk_TLK[: max(0, num_rows - first)]  # an asynchronous engine may run the last sampled token, too
            ids_TLK[first : first + len(kept)] = kept
        return ids_TLK

    def _attach(self, worker: Any) -> None:
        """Runs in the worker: hooks its routers, and each pass of the model to hand out the rows."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        runner = worker.model_runner
        hooked = [module for module in runner.model.modules() if isinstance(module, MoERunner)]
        found: list[int] = [module.layer_id for module in hooked]
        assert sorted(found) == self._layers, f"vLLM has experts in layers {found}, the config in {self._layers}"
        for module in hooked:
            module.router.set_capture_fn(partial(self._remember, module.layer_id))
        execute_model = runner.execute_model

        def execute_and_record(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self._current.clear()
            result = execute_model(scheduled, *args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                self._hand_out(runner.input_batch, scheduled.num_scheduled_tokens)
            return result

        runner.execute_model = execute_and_record

    def _remember(self, layer: int, ids_TK: Tensor) -> None:
        self._current[layer] = ids_TK.clone()

    def _hand_out(self, batch: Any, num_tokens: dict[str, int]) -> None:
        """Rows of a pass lie in the order of the batch's requests; vLLM appends `-` and 8 characters to their ids."""
        ids_TLK = pack_ids(self._current, self._config.n_routed_experts)
        assert ids_TLK is not None
        row = 0
        starts = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
        for request, first in zip(batch.req_ids, starts, strict=True):
            end = row + num_tokens.get(request, 0)
            self._passes.setdefault(request.rpartition("-")[0], []).append((first, ids_TLK[row:end]))
            row = end
