"""What holds of the model whatever its weights: invariances, routing replay, load balancing, recomputation.

Shapes: T packed tokens, E experts, K experts per token.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import DeepseekV3ForCausalLM, SequenceLayout, load_pretrained, save_pretrained
from models.balance import load_metrics, sequence_balance_loss, update_correction_bias
from models.moe import Router, Routing
from tests.models.test_models_parity import BASE, CORNERS, relative_error, sharp_model

LENGTHS = [9, 1, 14]


def packed_ids(lengths: list[int], seed: int = 0) -> tuple[Tensor, SequenceLayout]:
    ids_T = torch.randint(0, BASE.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids_T, SequenceLayout.from_lengths(lengths)


@pytest.mark.parametrize("corner", ["v3_like", "v2_groups"])
def test_a_token_changes_nothing_before_it_nor_in_other_sequences(corner: str) -> None:
    model = sharp_model(CORNERS[corner])
    ids_T, layout = packed_ids(LENGTHS)
    with torch.no_grad():
        hidden_TD = model(ids_T, layout).hidden_TD
        for changed in range(len(ids_T)):
            other_T = ids_T.clone()
            other_T[changed] = (other_T[changed] + 1) % BASE.vocab_size
            difference_T = (model(other_T, layout).hidden_TD - hidden_TD).abs().amax(-1)
            end = next(offset for offset in layout.offsets if offset > changed)
            untouched_T = torch.cat([difference_T[:changed], difference_T[end:]])
            assert untouched_T.max().item() < 1e-6
            assert difference_T[changed:end].min().item() > 1e-3, "a later token of the sequence did not notice"


@pytest.mark.parametrize("corner", ["v3_like", "yarn_uneven", "no_shared"])
def test_packed_equals_separate(corner: str) -> None:
    """Hidden states, gradients and routing do not depend on what else is in the pack, or where a sequence stands."""
    packed, separate = sharp_model(CORNERS[corner]), sharp_model(CORNERS[corner])
    ids_T, layout = packed_ids(LENGTHS)
    weights_TD = torch.randn(len(ids_T), BASE.hidden_size, generator=torch.Generator().manual_seed(1))
    out = packed(ids_T, layout)
    (out.hidden_TD * weights_TD).sum().backward()
    for start, length in zip(layout.offsets, LENGTHS, strict=False):
        rows = slice(start, start + length)
        alone = separate(ids_T[rows], SequenceLayout.from_lengths([length]))
        assert (alone.hidden_TD - out.hidden_TD[rows]).abs().max() < 1e-5
        for layer, ids_TK in alone.expert_ids.items():
            assert torch.equal(ids_TK.sort(-1).values, out.expert_ids[layer][rows].sort(-1).values)
        (alone.hidden_TD * weights_TD[rows]).sum().backward()
    for (name, ours), theirs in zip(packed.model.named_parameters(), separate.model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-5, name


@pytest.mark.parametrize("corner", ["plain", "groups", "v3_like", "v2_lite"])
def test_replaying_its_own_routing_changes_nothing(corner: str) -> None:
    model = sharp_model(CORNERS[corner])
    ids_T, layout = packed_ids(LENGTHS)
    out = model(ids_T, layout)
    again = model(ids_T, layout, replay=out.expert_ids)
    assert out.expert_ids and torch.equal(again.hidden_TD, out.hidden_TD)
    compact = {layer: ids_TK.to(torch.uint8).flip(1) for layer, ids_TK in out.expert_ids.items()}  # as vLLM records
    assert (model(ids_T, layout, replay=compact).hidden_TD - out.hidden_TD).abs().max() < 1e-5


def test_replayed_foreign_routing_reaches_the_gate() -> None:
    """Experts 0 to 2 are dictated everywhere: only they are used, and with sigmoid scores only their gates learn."""
    model = sharp_model(BASE)
    ids_T, layout = packed_ids(LENGTHS)
    dictated_TK = torch.stack([torch.randperm(3)[:2] for _ in ids_T])
    out = model(ids_T, layout, replay=dict.fromkeys(model.routers(), dictated_TK))
    assert all(torch.equal(ids_TK, dictated_TK) for ids_TK in out.expert_ids.values())
    assert (out.hidden_TD - model(ids_T, layout).hidden_TD).abs().max() > 0.1
    out.hidden_TD.square().sum().mul(0.5).sub(out.hidden_TD.sum()).backward()
    for router in model.routers().values():
        assert router.weight.grad is not None
        norms_E = router.weight.grad.norm(dim=1)
        assert norms_E[:3].min() > 1e-4 and not norms_E[3:].any()


def test_replay_of_some_layers_leaves_the_others_free() -> None:
    model = sharp_model(BASE)
    ids_T, layout = packed_ids(LENGTHS)
    own = model(ids_T, layout)
    dictated_TK = torch.tensor([[0, 1]]).expand(len(ids_T), -1)
    out = model(ids_T, layout, replay={2: dictated_TK})
    assert torch.equal(out.expert_ids[2], dictated_TK)
    assert all(torch.equal(out.expert_ids[layer], own.expert_ids[layer]) for layer in (0, 1))


def routing(ids: list[list[int]], scores: list[list[float]]) -> Routing:
    ids_TK = torch.tensor(ids)
    return Routing(ids_TK=ids_TK, chosen_TK=ids_TK, scores_TE=torch.tensor(scores, requires_grad=True))


def loop_balance_loss(routed: Routing, lengths: list[int]) -> Tensor:
    """Equations 17 to 20 of arXiv:2412.19437, one sequence and expert at a time; alpha is 1."""
    top_k, num_experts = routed.ids_TK.shape[1], routed.scores_TE.shape[1]
    losses, start = [], 0
    for length in lengths:
        loss = torch.zeros(())
        for expert in range(num_experts):
            chosen, share = 0, torch.zeros(())
            for token in range(start, start + length):
                chosen += routed.ids_TK[token].tolist().count(expert)
                share = share + routed.scores_TE[token, expert] / routed.scores_TE[token].sum()
            fraction = num_experts / (top_k * length) * chosen
            loss = loss + fraction * share / length
        losses.append(loss)
        start += length
    return torch.stack(losses).mean()


def test_balance_loss_is_1_when_balanced_and_larger_otherwise() -> None:
    even = [[0, 1], [2, 3], [1, 2], [3, 0]]
    flat = [[0.5] * 4] * 4
    layout = SequenceLayout.from_lengths([4])
    assert sequence_balance_loss(routing(even, flat), layout).item() == pytest.approx(1, abs=1e-6)
    # Two experts take everything: f = (2, 2, 0, 0), P = (0.4, 0.4, 0.1, 0.1).
    skewed = routing([[0, 1]] * 4, [[0.8, 0.8, 0.2, 0.2]] * 4)
    assert sequence_balance_loss(skewed, layout).item() == pytest.approx(1.6, abs=1e-6)
    # Balanced over the pack, not inside each sequence: the loss must see that.
    halves = routing([[0, 1]] * 2 + [[2, 3]] * 2, [[0.8, 0.8, 0.2, 0.2]] * 2 + [[0.2, 0.2, 0.8, 0.8]] * 2)
    assert sequence_balance_loss(halves, SequenceLayout.from_lengths([2, 2])).item() == pytest.approx(1.6, abs=1e-6)
    assert sequence_balance_loss(halves, layout).item() == pytest.approx(1, abs=1e-6)


def test_balance_loss_equals_the_paper_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(sum(LENGTHS), 8, generator=generator)
    ids_TK = scores_TE.topk(3).indices
    ours, plain = (
        Routing(ids_TK=ids_TK, chosen_TK=ids_TK, scores_TE=scores_TE.clone().requires_grad_()) for _ in range(2)
    )
    loss = sequence_balance_loss(ours, SequenceLayout.from_lengths(LENGTHS))
    expected = loop_balance_loss(plain, LENGTHS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss > 1.01
    (grad,) = torch.autograd.grad(loss, ours.scores_TE)
    (expected_grad,) = torch.autograd.grad(expected, plain.scores_TE)
    assert relative_error(grad, expected_grad) < 1e-5


def test_the_balance_loss_of_a_model_flattens_its_routing() -> None:
    model = sharp_model(BASE)
    ids_T, layout = packed_ids([40, 25])
    optimizer = torch.optim.Adam([router.weight for router in model.routers().values()], lr=1e-2)
    losses = []
    for _ in range(20):
        routed = model(ids_T, layout).routing.values()
        loss = torch.stack([sequence_balance_loss(layer, layout) for layer in routed]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] - 1 < 0.5 * (losses[0] - 1), losses


@pytest.mark.parametrize("groups", [1, 4])
def test_bias_updates_even_the_load_of_a_skewed_router(groups: int) -> None:
    """1,500 steps at the speed of pretraining; selection changes, scores and so mixing weights do not."""
    config = replace(BASE, n_routed_experts=16, n_group=groups, topk_group=max(1, groups // 2), num_experts_per_tok=4)
    torch.manual_seed(0)
    router = Router(config)
    tokens_TD = torch.randn(1024, BASE.hidden_size)
    tokens_TD[:, 0] = 1  # a constant input, through which the gate prefers some experts to all others
    with torch.no_grad():
        router.weight.normal_(0, 0.05)
        router.weight[:, 0] = torch.linspace(-0.5, 0.5, 16)

    def counts() -> Tensor:
        return torch.bincount(router(tokens_TD)[0].ids_TK.flatten(), minlength=16)

    def violation() -> float:
        return load_metrics({0: counts()})["moe/max_violation"]

    before, scores_TE = violation(), router(tokens_TD)[0].scores_TE
    for _ in range(1500):
        update_correction_bias(router, counts(), 1e-3)
    assert before > 0.5 and violation() < 0.1, (before, violation())
    assert torch.equal(router(tokens_TD)[0].scores_TE, scores_TE)


def test_bias_moves_by_speed_against_the_load() -> None:
    router = Router(BASE)
    counts_E = torch.tensor([8, 0, 4, 4, 4, 4, 4, 4])
    update_correction_bias(router, counts_E, 0.25)
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert router.e_score_correction_bias.dtype == torch.float32 and not list(router.parameters())[1:]


def test_load_metrics_by_hand() -> None:
    layers = {1: torch.tensor([4, 4, 4, 4]), 3: torch.tensor([30, 9, 1, 0])}
    # Layer 3: mean load 10, so 30 is 3 times it; 1 is exactly a tenth, not more; entropy of (0.75, 0.225, 0.025).
    entropy = -(0.75 * math.log(0.75) + 0.225 * math.log(0.225) + 0.025 * math.log(0.025)) / math.log(4)
    assert load_metrics(layers) == pytest.approx(
        {
            "moe/max_violation": 2.0,
            "moe/experts_used": 6 / 8,
            "moe/dead_experts": 1.0,
            "moe/load_entropy": (1 + entropy) / 2,
        },
        abs=1e-6,
    )
    assert load_metrics({}) == {}


@pytest.mark.parametrize("corner", ["v3_like", "all_dense"])
def test_recomputing_layers_saves_memory_and_changes_nothing(corner: str) -> None:
    ids_T, layout = packed_ids([60, 35])
    weights_TD = torch.randn(len(ids_T), BASE.hidden_size, generator=torch.Generator().manual_seed(1))
    losses, gradients, kept_bytes = [], [], []
    for recompute in (False, True):
        model = sharp_model(CORNERS[corner])
        model.model.checkpoint_layers = recompute
        saved: dict[int, int] = {}

        def remember(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = (model(ids_T, layout).hidden_TD * weights_TD).sum()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept_bytes.append(sum(size for pointer, size in saved.items() if pointer not in parameters))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.model.named_parameters()})
    assert torch.equal(losses[0], losses[1])
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        assert grad is not None and other is not None and torch.equal(grad, other), name
    assert kept_bytes[1] < 0.25 * kept_bytes[0], kept_bytes


def test_tied_embeddings_are_one_parameter(tmp_path) -> None:
    """Its gradient is checked against transformers in test_models_parity.py, corners `tied`."""
    model = sharp_model(CORNERS["tied"])
    save_pretrained(model, tmp_path / "saved")
    for tied in (model, load_pretrained(tmp_path / "saved")):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert "lm_head.weight" not in dict(tied.named_parameters())
    loose = DeepseekV3ForCausalLM(replace(CORNERS["tied"], tie_word_embeddings=False))
    loose.load_state_dict(model.state_dict())
    ids_T, layout = packed_ids(LENGTHS)
    for each in (model, loose):
        each.lm_head(each(ids_T, layout).hidden_TD).square().sum().backward()
    both = [loose.lm_head.weight.grad, loose.model.embed_tokens.weight.grad, model.lm_head.weight.grad]
    head, embedding, tied_grad = (grad for grad in both if grad is not None)
    assert relative_error(tied_grad, head + embedding) < 1e-6
    assert min(head.norm(), embedding.norm()) > 1e-3 * tied_grad.norm(), "one of the two parts hides in the other"
