"""`grpo model info`: what it prints for presets, for a folder of ours, for another architecture, and for nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen2Config

from models.presets import DEEPSEEK_V3, MOONLIGHT_16B_A3B, PRESETS, TINY
from pipelines.cli import main
from pipelines.model_info import foreign_rows, info_rows


def test_deepseek_v3() -> None:
    rows = dict(info_rows(DEEPSEEK_V3))
    assert rows["parameters"] == "671,026,404,352 (671.03B)"
    assert rows["  active per token, no embedding"] == "36,625,603,584 (36.63B)"
    assert rows["  parameters, beside the above"] == "11,610,067,968 (11.61B)"
    assert rows["MLA head"] == "128 + 64 rotary, value 128"
    assert rows["router"] == "sigmoid, correction bias" and rows["  groups"] == "best 4 of 8"
    assert rows["KV cache per token, bf16"] == "70,272 B" and rows["  per 1k tokens"] == "68.62 MiB"
    # 2 * 36.6e9 for the matrices, 61 layers * 2 * 128 heads * 320 * 1024 for attention
    assert rows["FLOPs per token, context 1k"] == "78.37G forward, 235.10G training"
    assert rows["checkpoint, fp8 blocks"] == "641.29 GiB"


def test_rows_follow_the_configuration() -> None:
    def value(name: str, **changes) -> str:
        return dict(info_rows(replace(TINY, **changes)))[name]

    assert value("dense layers", first_k_dense_replace=1) == "1 of 2, width 128"
    assert "router" not in dict(info_rows(replace(TINY, first_k_dense_replace=2)))
    assert value("router", scoring_func="softmax", topk_method="greedy") == "softmax, no correction bias"
    assert value("  groups", n_group=4, topk_group=2) == "best 2 of 4"
    assert value("  weights", norm_topk_prob=False, routed_scaling_factor=2.5) == "as scored, times 2.5"
    assert value("  head", tie_word_embeddings=True) == "the embedding"
    assert value("FLOPs per token, context 8k") == "- (positions end at 2,048)"
    assert value("MTP modules") == "none"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_prints_a_preset(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "info", preset]) == 0
    printed = capsys.readouterr().out
    assert all(name.strip() in printed for name, _ in info_rows(PRESETS[preset]))


def test_a_folder_of_ours_counts_as_its_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOONLIGHT_16B_A3B.to_dict()))
    assert main(["model", "info", str(tmp_path)]) == 0
    assert "15,960,108,544" in capsys.readouterr().out


def test_another_architecture_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    layer = (32 * 32 + 32) + 2 * (16 * 32 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    rows = dict(foreign_rows(str(tmp_path)))
    assert rows["parameters"].startswith(f"{100 * 32 + 2 * layer + 32:,} ")
    assert rows["  head"] == "the embedding" and rows["key value heads"] == "2"
    assert main(["model", "info", str(tmp_path)]) == 0
    assert "Qwen2ForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "unknown model"), ("{", "not JSON"), ('{"model_type": "no_such_thing"}', "no_such_thing")],
)
def test_wrong_folders_exit_with_2(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["model", "info", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_no_model_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "info"]) == 2
    assert "a preset: tiny" in capsys.readouterr().err
