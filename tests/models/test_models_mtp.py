"""Multi-token prediction against transformers' MtpModel, its loss, and cached passes of several tokens at once.

Pinned: (1) hidden states and logits of every depth equal transformers', and its `generate(use_mtp=True)` runs on our
checkpoint; (2) loss and gradients over packed sequences equal those of transformers' modules, one sequence at a time;
(3) targets, weights and the mean; (4) embedding and head are on disk under each module's name and one in memory;
(5) several tokens decoded at once, after truncating each sequence by another length, equal whole sequences;
(6) pretraining trains and balances the modules.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3ForCausalLM as Reference
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from models import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LatentCache,
    SequenceLayout,
    hf_tensors,
    load_hf_tensors,
    load_pretrained,
    save_pretrained,
)
from models.mtp import mtp_loss, prediction_routers
from pipelines.supervised import SupervisedConfig, train_supervised
from pipelines.token_store import TokenStore
from tests.models.test_models_parity import CORNERS, relative_error, sharp_model

CONFIG = replace(CORNERS["v3_like"], num_nextn_predict_layers=2)


def reference_pair(model: DeepseekV3ForCausalLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """transformers' main model and its prediction modules, from our checkpoint.

    transformers 5.19 finds the modules by a class attribute that names layer 61, where the 671B model has them.
    """
    first, count = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    patterns = [rf"model\.layers\.{layer}\..*" for layer in range(first, first + count)]
    monkeypatch.setattr(Reference, "_keys_to_ignore_on_load_unexpected", patterns)
    save_pretrained(model, folder)
    load: Any = Reference
    main, report = load.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return main, MtpModel.from_pretrained(main)


def reference_hidden(main: Any, modules: Any, ids_T: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """[T - 1, D] hidden states of depth 0, 1, ... and the logits from which each depth drafts behind the last token."""
    recorded = []
    handles = [layer.register_forward_hook(lambda _, __, out: recorded.append(out[0])) for layer in modules.layers]
    hidden = main(ids_T[None, :-1], use_cache=False, output_hidden_states=True).hidden_states[-1]
    _, logits, _ = modules(
        input_ids=ids_T[None, 1:],
        last_hidden_states=hidden,
        attention_mask=None,
        position_ids=torch.arange(1, len(ids_T))[None],
        mtp_cache=MtpCache(config=main.config.get_mtp_config()),
    )
    for handle in handles:
        handle.remove()
    return [hidden[0], *recorded], list(logits[0])


def draft(model: DeepseekV3ForCausalLM, ids_T: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Our own: hidden states of each depth and the logits that it drafts from, continued greedily."""
    layout = SequenceLayout.from_lengths([len(ids_T) - 1])
    hidden_TD, ahead_T = model(ids_T[:-1], layout).hidden_TD, ids_T[1:]
    for module in model.model.prediction_modules():
        embedded_TD = model.model.embed_tokens(ahead_T)
        rope = model.model.rope(layout.positions_T, embedded_TD.dtype)
        hidden_TD, _ = module.predict(embedded_TD, hidden_TD, rope, layout)
        logits_V = model.lm_head(hidden_TD[-1])
        yield hidden_TD, logits_V
        ahead_T = torch.cat([ahead_T[1:], logits_V.argmax()[None]])


@pytest.mark.parametrize("corner", ["plain", "groups", "all_dense", "v3_like"])
@torch.no_grad()
def test_drafts_equal_transformers(corner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(replace(CORNERS[corner], num_nextn_predict_layers=2))
    main, modules = reference_pair(model, tmp_path / "checkpoint", monkeypatch)
    for seed, length in enumerate([2, 9, 30]):
        ids_T = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))
        expected_hidden, expected_logits = reference_hidden(main, modules, ids_T)
        for depth, (hidden_TD, logits_V) in enumerate(draft(model, ids_T), 1):
            assert (hidden_TD - expected_hidden[depth]).abs().max() < 2e-5, f"depth {depth}"
            assert (logits_V - expected_logits[depth - 1]).abs().max() < 5e-5, f"depth {depth}"
            assert logits_V.abs().max() > 3, "logits too flat to show an error"


def test_transformers_generates_with_our_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, _ = reference_pair(sharp_model(CONFIG), tmp_path / "checkpoint", monkeypatch)
    ids = torch.randint(4, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(main.generate(ids, **settings, use_mtp=True), main.generate(ids, **settings))


def test_loss_and_gradients_equal_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(CONFIG)
    main, modules = reference_pair(model, tmp_path / "checkpoint", monkeypatch)
    lengths = [17, 2, 40, 3, 1, 25]  # of 2 tokens nothing is left to predict, of 3 only depth 1
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    weights = [torch.rand(n, generator=generator) for n in lengths]

    layout, ids_T = SequenceLayout.from_lengths(lengths), torch.cat(sequences)
    output = model(ids_T, layout)
    loss, routing = mtp_loss(model, output, ids_T, layout, weight=0.3, target_weights_T=torch.cat(weights))
    loss.backward()
    assert routing.keys() == {3, 4} == prediction_routers(model).keys()
    assert [len(r.ids_TK) for r in routing.values()] == [15 + 38 + 1 + 23, 14 + 37 + 22], "tokens without target"

    total = torch.zeros(())
    for ids_T, weights_T in zip(sequences, weights, strict=True):
        if len(ids_T) > 2:
            hidden, _ = reference_hidden(main, modules, ids_T)
            for depth in (1, 2):
                logits_TV = main.lm_head(hidden[depth])[: len(ids_T) - depth - 1]
                losses_T = F.cross_entropy(logits_TV, ids_T[depth + 1 :], reduction="none")
                total = total + 0.3 / 2 * (losses_T * weights_T[depth + 1 :]).sum()
    total.backward()
    assert abs(loss.item() / total.item() - 1) < 1e-6
    expected = {f"main.{n}": p.grad for n, p in main.named_parameters()}
    renamed = {"mtp_block.": "", "post_norm": "shared_head.norm"}
    for name, parameter in modules.named_parameters():
        for old, new in renamed.items():
            name = name.replace(old, new)
        expected[f"modules.{name}"] = parameter.grad
    for name, parameter in model.named_parameters():
        key = f"main.{name}"
        for depth in (0, 1):
            key = key.replace(f"main.model.layers.{3 + depth}.", f"modules.layers.{depth}.")
        theirs = expected[key]
        assert parameter.grad is not None and theirs is not None, name
        assert relative_error(parameter.grad, theirs) < 1e-5, name


def test_loss_of_a_model_that_knows_nothing() -> None:
    """A zero head gives log V per token: the mean over targets, times the weight, whatever the number of depths."""
    model = sharp_model(CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight)
    layout, ids_T = SequenceLayout.from_lengths([7, 4, 1]), torch.arange(12)
    loss, _ = mtp_loss(model, model(ids_T, layout), ids_T, layout, weight=0.3)
    assert abs(loss.item() - 0.3 * math.log(97)) < 1e-6
    layout = SequenceLayout.from_lengths([2, 1])
    loss, routing = mtp_loss(model, model(ids_T[:3], layout), ids_T[:3], layout, weight=0.3)
    assert loss.item() == 0 and routing == {}, "no token has another two behind it"


def test_activation_checkpointing_and_chunks_change_nothing() -> None:
    model = sharp_model(CONFIG)
    layout, ids_T = SequenceLayout.from_lengths([20, 11]), torch.arange(31)
    gradients = []
    for checkpoint_layers in (False, True):
        model.model.checkpoint_layers = checkpoint_layers
        model.zero_grad()
        loss, _ = mtp_loss(model, model(ids_T, layout), ids_T, layout, weight=1.0)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_copies_on_disk_one_parameter_in_memory(tmp_path: Path) -> None:
    model = sharp_model(CONFIG)
    on_disk = dict(hf_tensors(model))
    for layer in (3, 4):
        assert torch.equal(on_disk[f"model.layers.{layer}.embed_tokens.weight"], model.model.embed_tokens.weight)
        assert torch.equal(on_disk[f"model.layers.{layer}.shared_head.head.weight"], model.lm_head.weight)
        assert f"model.layers.{layer}.shared_head.norm.weight" in on_disk
    assert not any("shared_head.head" in name for name, _ in model.named_parameters())
    save_pretrained(model, tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    name = "model.layers.4.shared_head.head.weight"
    other = ((n, t + 1 if n == name else t) for n, t in hf_tensors(model))
    with pytest.raises(ValueError, match=rf"{name} differs from"):
        load_hf_tensors(back, other, "other")


def decode_in_rounds(config: DeepseekV3Config, rounds: list[tuple[int, list[int]]], prompts: list[int]) -> None:
    """Each round decodes so many tokens of each sequence and then takes back all but these; compares every one."""
    model = sharp_model(config)
    total = [n + sum(max(kept) for _, kept in rounds) + max(m for m, _ in rounds) for n in prompts]
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 97, (n,), generator=generator) for n in total]
    whole = model(torch.cat(ids), SequenceLayout.from_lengths(total)).hidden_TD.split(total)
    cache = LatentCache(config, len(ids), max(total), dtype=torch.float32, device=torch.device("cpu"))
    model(torch.cat([x[:n] for x, n in zip(ids, prompts, strict=True)]), SequenceLayout.from_lengths(prompts), cache)
    done = list(prompts)
    for num_new, kept in rounds:
        # Garbage behind what is kept must leave no trace, so it differs from what comes there later.
        new = [x[n : n + num_new].clone() for x, n in zip(ids, done, strict=True)]
        for row, keep in zip(new, kept, strict=True):
            row[keep:] = (row[keep:] + 1) % 97
        hidden = model.decode(torch.stack(new), cache).hidden_TD.unflatten(0, (len(ids), num_new))
        for row, keep in enumerate(kept):
            expected = whole[row][done[row] : done[row] + keep]
            assert (hidden[row, :keep] - expected).abs().max() < 2e-5, f"sequence {row} behind {done[row]} tokens"
        done = [n + keep for n, keep in zip(done, kept, strict=True)]
        cache.truncate(torch.tensor(done))


@pytest.mark.parametrize("corner", ["plain", "v3_like", "yarn_uneven"])
@torch.no_grad()
def test_several_cached_tokens_equal_whole_sequences(corner: str) -> None:
    rounds = [(1, [1, 1, 1]), (3, [1, 3, 2]), (4, [4, 1, 1]), (3, [2, 3, 1]), (1, [1, 1, 1]), (5, [5, 4, 5])]
    decode_in_rounds(CORNERS[corner], rounds, prompts=[7, 1, 5])


def test_a_cache_cannot_be_truncated_to_more() -> None:
    cache = LatentCache(CONFIG, 2, 9, dtype=torch.float32, device=torch.device("cpu"))
    cache.advance(torch.tensor([3, 5]))
    with pytest.raises(AssertionError, match="cannot truncate"):
        cache.truncate(torch.tensor([3, 6]))


def test_pretraining_trains_and_balances_the_modules() -> None:
    model = DeepseekV3ForCausalLM(replace(CORNERS["plain"], num_nextn_predict_layers=1, initializer_range=0.3))
    model.init_weights(0)
    documents = [[4 + (i + j) % 11 for j in range(3 + i % 9)] for i in range(64)]
    layout, ids_T = SequenceLayout.from_lengths([22, 22]), torch.arange(44) % 11 + 4
    config = SupervisedConfig(
        steps=25, samples_per_step=16, warmup_steps=5, token_budget=64, lr=4e-3, weight_decay=0.01, balance_speed=1e-3,
        mtp_weight=0.3,
    )  # fmt: skip

    def drafts_loss() -> float:
        return mtp_loss(model, model(ids_T, layout), ids_T, layout, weight=1.0)[0].item()

    before = drafts_loss()
    train_supervised(model, TokenStore.of_texts(documents), config)
    assert drafts_loss() < 0.2 < 2 < before
    (router,) = prediction_routers(model).values()
    assert router.e_score_correction_bias.abs().max() > 5e-3, "25 steps of 1e-3, mostly in one direction"
    without = DeepseekV3ForCausalLM(CORNERS["plain"])
    with pytest.raises(ValueError, match=r"mtp_weight=0.3 for a model without prediction modules"):
        train_supervised(without, TokenStore.of_texts(documents), config)
