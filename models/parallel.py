"""The ranks of one training job: how a model is divided among them, and the few exchanges that training needs.

Every rank computes on its own share of a batch. FSDP2 shards parameters, gradients and optimizer state and adds the
ranks' gradients up, never averages them: loss weights already are shares of the global batch. The experts of a layer
may be divided among ranks instead, which exchange tokens (expert_parallel.py).

    mesh = join(MeshConfig(ranks=8, expert_ranks=4), torch.device("cuda"))     # in every process of the job
    model = mesh.shard(model)

`ALONE` stands for the one rank of a job without process group, and does nothing.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import register_dataclass

from models.expert_parallel import ExpertExchange
from models.moe import RoutedExperts
from models.transformer import ModelOutput

c10d: Any = torch.distributed  # the stubs leave out what is used of these two
foreach_mul_: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")
Model = TypeVar("Model")

# FSDP finds the tensors in a module's output, whose gradients announce its backward pass, only in what pytree knows.
register_dataclass(ModelOutput)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ranks the learner has, and what they share: ranks = replicas x shards x expert_ranks."""

    ranks: int = 1
    """Processes that train together, one per GPU."""
    replicas: int = 1
    """Copies of the sharded model; within a copy parameters are gathered, between copies only gradients are added."""
    expert_ranks: int = 1
    """Ranks among which each layer's experts are divided; the other weights are sharded over them as well."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Sharded weights are gathered and used in it, gradients added in float32; None for the weights' own dtype."""

    def __post_init__(self) -> None:
        if min(self.ranks, self.replicas, self.expert_ranks) < 1 or self.ranks % (self.replicas * self.expert_ranks):
            raise ValueError(
                f"ranks={self.ranks} must be a multiple of replicas={self.replicas} x expert_ranks={self.expert_ranks}"
            )

    @property
    def shards(self) -> int:
        return self.ranks // (self.replicas * self.expert_ranks)


class Alone:
    """The one rank of a job without process group."""

    rank, size = 0, 1
    compute_dtype: torch.dtype | None = None
    """To which weights are rounded when they are gathered; None for their own."""

    def shard(self, model: Model) -> Model:
        """The model with its parameters divided among the ranks, in place."""
        return model

    def scatter(self, parts: Sequence[T] | None) -> T:
        """This rank's of rank 0's parts, one for each rank; the other ranks give None. Tensors come on the CPU."""
        assert parts is not None
        return parts[0]

    def gather(self, part: T) -> list[T]:
        """Every rank's part on rank 0, nothing elsewhere. Tensors come on the CPU."""
        return [part]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        return tensor


ALONE = Alone()


class Mesh(Alone):
    """The ranks of the default process group, arranged as replicas x shards x expert ranks, the last innermost."""

    def __init__(self, config: MeshConfig, device: torch.device, store: Any) -> None:
        """`store` reaches all ranks and waits for none."""
        self.config, self.store = config, store
        self.rank, self.size = c10d.get_rank(), c10d.get_world_size()
        inner = config.shards * config.expert_ranks
        self._dense = _data_axes(init_device_mesh(device.type, (config.replicas, inner), mesh_dim_names=_DATA_AXES))
        sizes = (config.replicas, config.shards, config.expert_ranks)
        experts = init_device_mesh(device.type, sizes, mesh_dim_names=(*_DATA_AXES, "expert"))
        self._expert_data, self._expert = _data_axes(experts), experts["expert"]
        self.compute_dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
        # Inputs stay as they are: the experts' mixing weights are float32 for a reason.
        self._policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=None if self.compute_dtype is None else torch.float32,
            cast_forward_inputs=False,
        )

    def shard(self, model: Model) -> Model:
        """Layer by layer, so that a layer at a time is gathered; embedding, norm and head stay gathered from the
        forward to the backward pass, because the loss uses the head beside the model's own forward pass.

        Raises ValueError if the experts cannot be divided evenly.
        """
        assert isinstance(model, nn.Module)
        for layer in _layers(model):
            for module in layer.modules():
                if isinstance(module, RoutedExperts) and self.config.expert_ranks > 1:
                    self._divide_experts(module)
            fully_shard(layer, mesh=self._dense, mp_policy=self._policy)
        fully_shard(model, mesh=self._dense, mp_policy=self._policy, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return model

    def _divide_experts(self, experts: RoutedExperts) -> None:
        """Whole experts to the ranks; each matrix then by its rows to the ranks that hold the same experts."""
        count, width = experts.num_experts, min(experts.down_proj.shape[1:])
        if count % self.config.expert_ranks or width % self.config.shards:
            raise ValueError(
                f"{count} experts with matrices of {width} rows cannot be divided among "
                f"expert_ranks={self.config.expert_ranks} x {self.config.shards} shards"
            )
        for name, weight in list(experts.named_parameters()):
            local = distribute_tensor(weight.detach(), self._expert, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(local, requires_grad=weight.requires_grad))
        experts.exchange = ExpertExchange(self._expert.get_group())
        fully_shard(
            experts, mesh=self._expert_data, mp_policy=self._policy, shard_placement_fn=lambda parameter: Shard(1)
        )

    def scatter(self, parts: Sequence[T] | None) -> T:
        received: list[Any] = [None]
        c10d.scatter_object_list(received, None if parts is None else [_packed(part) for part in parts])
        return _unpacked(received[0])

    def gather(self, part: T) -> list[T]:
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        c10d.gather_object(_packed(part), gathered)
        return [_unpacked(one) for one in gathered or ()]

    def broadcast(self, value: T) -> T:
        values = [value]
        c10d.broadcast_object_list(values)
        return values[0]

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        c10d.all_reduce(total)
        return total


_DATA_AXES = ("replica", "shard")
TIMEOUT = timedelta(minutes=30)
"""Longest wait of a rank for the others, within one exchange."""
_JOIN_TIMEOUT = timedelta(minutes=10)


def join(config: MeshConfig, device: torch.device) -> Alone:
    """Joins the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, as torchrun and `accelerate launch`
    set them; `ALONE` for a single rank that computes in its weights' dtype.

    The variables are taken away, so that processes started from here are of no job. Raises ValueError if not
    `config.ranks` processes were started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.ranks:
        raise ValueError(f"ranks={config.ranks}, but {started} processes were started; give both the same number")
    if started > 1:
        store, rank, _ = next(c10d.rendezvous("env://", timeout=_JOIN_TIMEOUT))
    elif config.compute_dtype is None:
        return ALONE
    else:
        store, rank = c10d.HashStore(), 0
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    group = c10d.PrefixStore("group", store)
    c10d.init_process_group(backend, store=group, rank=rank, world_size=started, timeout=TIMEOUT)
    return Mesh(config, device, store)


def leave() -> None:
    """Ends what `join` began; nothing for `ALONE`."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def _data_axes(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which FSDP works."""
    return mesh[_DATA_AXES] if mesh["replica"].size() > 1 else mesh["shard"]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: the decoder layers, in our model and in those of transformers."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)  # from another rank of this job


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A sharded tensor, rounded to `dtype`, gathered on every rank; collective. Others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    rounded: Any = tensor.detach().to(dtype or tensor.dtype)
    return rounded.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def release(model: object) -> None:
    """Gives up what a sharded model still holds gathered after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Optimizer groups of parameters that are sharded alike: fused kernels take no others together."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [{"params": group} for group in groups.values()]


def gradient_norm(parameters: Iterable[nn.Parameter], mesh: Alone = ALONE) -> Tensor:
    """The norm of the whole model's gradient, every element counted once, on every rank.

    Equal to `torch.nn.utils.get_total_norm` of the unsharded gradients, which cannot add those on different meshes.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if mesh is ALONE:
        return torch.nn.utils.get_total_norm(grads)
    squares = [local(grad).float().square().sum(dtype=torch.float64) / _copies(grad) for grad in grads]
    return mesh.sum(torch.stack(squares).sum()).sqrt().float()


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scales all gradients, whose norm together is `norm`, down to the norm `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    foreach_mul_([local(parameter.grad) for parameter in parameters if parameter.grad is not None], scale)


def _copies(tensor: Tensor) -> int:
    """How many ranks hold each element."""
    if not isinstance(tensor, DTensor):
        return c10d.get_world_size()
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return torch.Size([size for placement, size in sizes if isinstance(placement, Replicate)]).numel()
