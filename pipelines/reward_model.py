"""Reward models: a number for a completion, learned from pairs of which one was preferred.

    grpo reward-model --model sft --data pairs.jsonl --out runs/rm
    grpo zero --reward "0.5*reward_model(folder='runs/rm/model')" ...

The model with a head of one number, at the completion's last token, in place of the vocabulary (Bradley-Terry:
arXiv:2203.02155 eq. 1; DeepSeek-R1's helpful reward model, arXiv:2501.12948: 66,000 pairs, learning rate 6e-6, batch
256, one epoch). The folder is a checkpoint with two more files: `score.safetensors`, the head under the name
`score.weight`, as in transformers' sequence classifiers, and `reward_model.json` with what was measured on held-out
pairs and the mean that is taken off each reward.

Shapes: B sequences, P pairs, D hidden.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.optimizer import build_optimizer
from grpo.schedule import learning_rate
from models import CausalLM, SequenceLayout, from_pretrained
from models.auto import checkpoint_layers, write_checkpoint
from models.checkpoint import replace_folder, tensor_shapes
from pipelines.console import console
from pipelines.pairs import Pair, PairConfig, as_sample, learn_from_pairs, load_pairs
from pipelines.prompting import load_tokenizer
from pipelines.run_folder import open_run_folder
from pipelines.zero import device_of
from rewards import RewardFunction, Sample, reward

_HEAD, _MEASURED, _STATE = "score.safetensors", "reward_model.json", "state.pt"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PairConfig):
    """`grpo reward-model`: a model that scores completions, from pairs."""

    out: str = "runs/reward-model"
    """Run folder."""
    pairs_per_step: int = 256
    """Pairs in one optimizer step; the last step of an epoch has what is left."""
    lr: float = 6e-6
    """Peak learning rate of AdamW."""
    heldout_share: float = 0.05
    """Share of the pairs that is not learned from, the last of the data, on which accuracy is measured."""
    center_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 while learning (arXiv:2312.09244, there 0.01).
    Pairs say nothing about where 0 is; without it, the mean is taken off at the end all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.heldout_share < 1 or not self.center_coef >= 0:
            raise ValueError(
                f"need heldout_share between 0 and 1 and center_coef >= 0, got {self.heldout_share} and "
                f"{self.center_coef}"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On held-out pairs."""

    pairs: int
    accuracy: float
    """Share in which the chosen completion has the larger reward."""
    margin: float
    """Mean of chosen less rejected reward."""
    mean: float
    """Of all rewards as the head gives them; taken off wherever the model is used."""
    spread: float
    """Their standard deviation."""


class RewardModel:
    """A causal model and its head."""

    def __init__(self, model: CausalLM, mean: float = 0.0) -> None:
        weight = model.lm_head.weight
        self.model, self.mean = model, mean
        self.score = nn.Parameter(torch.zeros_like(weight[:1]))  # no preference to begin with

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[B] the reward of each sequence's last token, float32, `mean` taken off."""
        device = self.score.device
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences], device)
        ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=device)
        last_BD = self.model(ids_T, layout).hidden_TD.index_select(0, layout.offsets_B[1:].long() - 1)
        return F.linear(last_BD.float(), self.score.float()).squeeze(1) - self.mean

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of which the output head of the vocabulary is no part, unless it is tied to the embedding."""
        for name, parameter in self.model.named_parameters():
            if name == "lm_head.weight":
                parameter.requires_grad_(False)
            yield parameter
        yield self.score

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype, device: torch.device) -> "RewardModel":
        """Raises FileNotFoundError where the folder is no reward model."""
        for name in (_HEAD, _MEASURED):
            if not (Path(folder) / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: give the folder that `grpo reward-model` wrote")
        mean = json.loads((Path(folder) / _MEASURED).read_text())["mean"]
        made = cls(from_pretrained(folder, dtype=dtype, device=device), mean)
        made.score.data.copy_(load_file(str(Path(folder) / _HEAD))["score.weight"])
        return made

    def write(self, folder: Path) -> None:
        """Into an existing folder, without what was measured."""
        write_checkpoint(self.model, folder)
        save_file({"score.weight": self.score.detach().cpu().contiguous()}, str(folder / _HEAD))


class RewardLearner:
    """A reward model in training; `grpo.checkpoint.Saved`."""

    def __init__(self, model: RewardModel, config: RewardModelConfig, pairs: Sequence[Pair], total_steps: int) -> None:
        self.model, self.config, self.pairs, self.total_steps, self.step = model, config, pairs, total_steps, 0
        self.optimizer = build_optimizer(
            "adamw", model.parameters(), lr=config.lr, betas=(0.9, 0.999), decay=config.weight_decay
        )
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def device(self) -> torch.device:
        return self.model.score.device

    def update(self, places: Sequence[int]) -> dict[str, float]:
        """One optimizer step: -log sigmoid(r_chosen - r_rejected), averaged over the pairs. Raises FloatingPointError
        for a gradient that is not finite."""
        rewards = []
        for group in self._micro_batches([self.pairs[place] for place in places]):
            rewards_2P = self._rewards(group)
            loss = self._losses(rewards_2P).sum() / len(places)
            loss.backward()
            rewards.append(rewards_2P.detach())
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self.config.grad_clip).item()
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(f"step {self.step}: gradient norm {norm}; lower lr")
        lr = learning_rate(
            self.step, peak=self.config.lr, warmup_steps=self.config.warmup_steps, total_steps=self.total_steps,
            decay=self.config.lr_decay,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        rewards_2P = torch.cat(rewards, 1)
        margin_P = rewards_2P[0] - rewards_2P[1]
        return {
            "rm/loss": self._losses(rewards_2P).mean().item(), "rm/margin": margin_P.mean().item(),
            "rm/accuracy": (margin_P > 0).float().mean().item(), "rm/mean": rewards_2P.mean().item(),
            "optimizer/grad_norm": norm, "optimizer/lr": lr,
        }  # fmt: skip

    @torch.no_grad()
    def measure(self, pairs: Sequence[Pair]) -> Measured:
        rewards_2P = torch.cat([self._rewards(group) for group in self._micro_batches(pairs)], 1).double()
        margin_P = rewards_2P[0] - rewards_2P[1]
        return Measured(
            pairs=len(pairs), accuracy=(margin_P > 0).double().mean().item(), margin=margin_P.mean().item(),
            mean=rewards_2P.mean().item(), spread=rewards_2P.std().item(),
        )  # fmt: skip

    def _rewards(self, pairs: Sequence[Pair]) -> Tensor:
        """[2, P] of the chosen and the rejected completions."""
        return self.model([p.chosen.token_ids for p in pairs] + [p.rejected.token_ids for p in pairs]).view(2, -1)

    def _losses(self, rewards_2P: Tensor) -> Tensor:
        away_P = rewards_2P.sum(0).square()
        return -F.logsigmoid(rewards_2P[0] - rewards_2P[1]) + self.config.center_coef * away_P

    def _micro_batches(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """Whole pairs, of similar length together, at most `token_budget` tokens."""

        def size(pair: Pair) -> int:
            return len(pair.chosen.token_ids) + len(pair.rejected.token_ids)

        group: list[Pair] = []
        for pair in sorted(pairs, key=size, reverse=True):
            if group and sum(map(size, group)) + size(pair) > self.config.token_budget:
                yield group
                group = []
            group.append(pair)
        yield group

    def save(self, folder: Path) -> None:
        weights = [parameter.detach() for parameter in self.model.parameters()]
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "weights": weights}
        with (folder / _STATE).open("wb") as file:
            torch.save(state, file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, saved in zip(self.model.parameters(), state["weights"], strict=True):
            parameter.copy_(saved)

    def write_policy(self, folder: Path) -> None:
        self.model.write(folder)


def run_reward_model(config: RewardModelConfig) -> Path:
    """The whole of `grpo reward-model`; the folder of the reward model."""
    tokenizer = load_tokenizer(config.model)
    tensor_shapes(config.model)  # are the weights there?
    pairs = load_pairs(tokenizer, config)
    num_heldout = max(1, round(config.heldout_share * len(pairs)))
    if num_heldout == len(pairs):
        raise ValueError(f"{config.data} has {len(pairs)} pair: none is left to learn from beside the held-out ones")
    pairs, heldout = pairs[:-num_heldout], pairs[-num_heldout:]
    out = Path(config.out)
    open_run_folder(config, out)
    torch.set_num_threads(config.num_threads)
    model = from_pretrained(config.model, dtype=getattr(torch, config.dtype), device=device_of(config.device))
    if config.checkpoint_layers:
        checkpoint_layers(model)
    steps = config.num_steps(len(pairs))
    console.print(f"{len(pairs)} pairs, {len(heldout)} more held out; {config.pairs_per_step} a step: {steps} steps")
    learner = RewardLearner(RewardModel(model), config, pairs, steps)
    learn_from_pairs(learner, len(pairs), config, lambda kept: {}, learner.update, _line, "reward model")
    measured = learner.measure(heldout)
    with replace_folder(out / "model") as fresh:
        learner.write_policy(fresh)
        tokenizer.save_pretrained(str(fresh))
        (fresh / _MEASURED).write_text(json.dumps(asdict(measured), indent=2) + "\n")
    console.print(f"accuracy {measured.accuracy:.1%} on {measured.pairs} held-out pairs, margin {measured.margin:.2f}")
    return out / "model"


def _line(metrics: dict[str, float]) -> str:
    return f"loss {metrics['rm/loss']:.3f}  accuracy {metrics['rm/accuracy']:.0%}  margin {metrics['rm/margin']:.2f}"


def reward_model(
    folder: str,
    *,
    name: str = "reward_model",
    weight: float = 1.0,
    only_answer: bool = False,
    batch_size: int = 16,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> RewardFunction:
    """A reward from a folder of `grpo reward-model`. A completion that was cut off is scored without end-of-text.

    With `only_answer`, what stands behind the thinking is scored alone, as R1 does for helpfulness (arXiv:2501.12948
    section 2.3.4).
    """
    model = RewardModel.load(folder, dtype=getattr(torch, dtype), device=device_of(device))
    tokenizer: Any = load_tokenizer(folder)

    @torch.no_grad()
    def score(samples: list[Sample]) -> list[float]:
        texts = [sample.answer_part if only_answer else sample.completion for sample in samples]
        return model(
            [
                as_sample(sample.prompt, text, tokenizer, ended=not sample.truncated).token_ids
                for sample, text in zip(samples, texts, strict=True)
            ]
        ).tolist()

    return reward(name=name, weight=weight, batch=True, batch_size=batch_size)(score)
