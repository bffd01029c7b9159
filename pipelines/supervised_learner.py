"""One model in supervised training: gradients, optimizer steps, held-out loss, and its state on disk.

Shapes: T tokens of a micro-batch, N trained ones among them, D hidden, E experts.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from grpo.learner_state import module_of
from grpo.optimizer import build_optimizer
from grpo.schedule import learning_rate
from models import CausalLM, DeepseekV3ForCausalLM
from models.auto import write_checkpoint
from models.balance import count_experts, load_metrics, update_correction_bias
from models.head import linear_cross_entropy
from models.moe import Router, Routing
from models.mtp import mtp_loss, prediction_routers
from pipelines.supervised_config import SupervisedConfig
from pipelines.token_store import TokenBatch, TokenStore

_STATE = "state.pt"


class SupervisedLearner:
    """The model and its optimizer. Weights of fewer than 32 bits have a copy in float32, on which the optimizer works
    and in which gradients are added up."""

    def __init__(self, model: CausalLM, config: SupervisedConfig, total_steps: int) -> None:
        """`total_steps` shapes the learning rate's decay. Raises ValueError for `mtp_weight` without modules."""
        self.model, self.config, self.total_steps, self.step = model, config, total_steps, 0
        self.routers: dict[int, Router] = {}
        depths = 0
        if isinstance(model, DeepseekV3ForCausalLM):
            depths = model.config.num_nextn_predict_layers
            self.routers = model.routers() | (prediction_routers(model) if config.mtp_weight else {})
        if config.mtp_weight and not depths:
            raise ValueError(
                f"mtp_weight={config.mtp_weight} for a model without prediction modules: leave it 0, or build the "
                "model with some (num_nextn_predict_layers in config.json)"
            )
        self._weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters: list[nn.Parameter] = [
            weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for weight in self._weights
        ]
        """What the optimizer moves: the trained weights, or their copies in float32."""
        self.optimizer = build_optimizer(
            "adamw", self.masters, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2),
            decay=config.weight_decay,
        )  # fmt: skip
        if config.decay_vectors:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = config.weight_decay
        self._best: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.lm_head.weight.device

    def update(self, store: TokenStore, places: Sequence[int]) -> dict[str, float]:
        """One optimizer step over these samples; what is to be logged of it. Raises FloatingPointError if the gradient
        is not finite; the weights are then as before."""
        loss, counts_LE = self.add_gradient(store, places)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.config.grad_clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step + 1}: gradient norm {norm}, loss {loss.item()}; lower lr")
        lr = self._step()
        if self.config.balance_speed:
            for layer, router in self.routers.items():
                update_correction_bias(router, counts_LE[layer], self.config.balance_speed)
        return {
            "loss/train": loss.item(), "optimizer/grad_norm": norm, "optimizer/lr": lr,
            "data/tokens": float(store.tokens_in(places)), "data/trained_tokens": float(store.trained_in(places)),
            "data/samples": float(len(places)),
        } | load_metrics({layer: counts_E.cpu() for layer, counts_E in counts_LE.items()})  # fmt: skip

    def add_gradient(self, store: TokenStore, places: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Adds the gradient of the mean loss over the trained tokens of these samples to that of `masters`; the loss,
        and the tokens [E] for each expert of each layer. On a GPU nothing is waited for."""
        trained = store.trained_in(places)
        if not trained:
            raise ValueError(f"the {len(places)} samples of step {self.step + 1} have no token to train")
        loss = torch.zeros((), device=self.device)
        counts_LE = {
            layer: torch.zeros(len(router.weight), device=self.device) for layer, router in self.routers.items()
        }
        for group in store.micro_batches(places, self.config.token_budget):
            batch_loss, routing = self._backward(store.batch(group, 1 / trained).to(self.device))
            loss += batch_loss
            for layer, counts_E in counts_LE.items():
                if layer in routing:  # samples may be too short for a prediction module
                    counts_E += count_experts(routing[layer])
        return loss, counts_LE

    def _backward(self, batch: TokenBatch) -> tuple[Tensor, dict[int, Routing]]:
        """Adds a micro-batch's gradient; its next-token loss and how each layer routed it."""
        model = self.model
        output = model(batch.ids_T, batch.layout)
        predictors_ND = output.hidden_TD.index_select(0, batch.predictors_N)
        loss = linear_cross_entropy(predictors_ND, model.lm_head.weight, batch.targets_N, batch.weights_N)
        routing = output.routing
        if not self.config.mtp_weight:
            loss.backward()
        else:
            assert isinstance(model, DeepseekV3ForCausalLM)
            target_weights_T = torch.zeros(len(batch.ids_T), device=self.device)
            target_weights_T.index_copy_(0, batch.predictors_N + 1, batch.weights_N)
            extra_loss, extra_routing = mtp_loss(
                model, output, batch.ids_T, batch.layout, weight=self.config.mtp_weight,
                target_weights_T=target_weights_T,
            )  # fmt: skip
            (loss + extra_loss).backward()
            routing = routing | extra_routing
        for weight, master in self._copied():
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        return loss.detach(), routing

    def _copied(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weights that have a copy, with it."""
        return [(w, m) for w, m in zip(self._weights, self.masters, strict=True) if w is not m]

    @torch.no_grad()
    def _step(self) -> float:
        """Moves the weights by the gradient, which is used up; the learning rate."""
        config = self.config
        lr = learning_rate(
            self.step, peak=config.lr, warmup_steps=config.warmup_steps, total_steps=self.total_steps,
            decay=config.lr_decay, final_share=config.final_lr_share,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for weight, master in self._copied():
            weight.copy_(master)
        self.step += 1
        return lr

    @torch.no_grad()
    def loss(self, store: TokenStore) -> float:
        """Nats per trained token over all samples."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        head_VD = self.model.lm_head.weight.detach()  # else the head's gradient would be computed along
        for group in store.micro_batches(range(len(store)), self.config.token_budget):
            batch = store.batch(group, 1.0).to(self.device)
            hidden_TD = self.model(batch.ids_T, batch.layout).hidden_TD
            predictors_ND = hidden_TD.index_select(0, batch.predictors_N)
            total += linear_cross_entropy(predictors_ND, head_VD, batch.targets_N, batch.weights_N)
        return total.item() / store.num_trained

    def remember(self) -> None:
        """Keeps the present weights, in main memory."""
        self._best = {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}

    def recall(self) -> None:
        """Puts the remembered weights back. There is no going on from them: the optimizer has moved on."""
        for name, tensor in self._tensors().items():
            tensor.copy_(self._best[name])

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes: trained weights, and the buffers that hold the routers' biases."""
        tensors = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return tensors | dict(module_of(self.model).named_buffers())

    def save(self, folder: Path) -> None:
        """Writes all that an exact continuation needs into an existing folder."""
        state = {
            "step": self.step, "weights": self._tensors(), "masters": [master for _, master in self._copied()],
            "optimizer": self.optimizer.state_dict(), "best": self._best,
        }  # fmt: skip
        with (folder / _STATE).open("wb") as file:  # torch's own writer would not say that the disk is full
            torch.save(state, file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """The opposite of `save`."""
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        self.step, self._best = state["step"], state["best"]
        for name, tensor in self._tensors().items():
            tensor.copy_(state["weights"][name])
        for (_, master), saved in zip(self._copied(), state["masters"], strict=True):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    def write_policy(self, folder: Path) -> None:
        """Writes the model as a Hugging Face checkpoint into an existing folder."""
        write_checkpoint(self.model, folder)
