"""Traces: written and read back equal, a torn file mended, checkpoints told apart."""

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import traces as module
from pipelines.traces import (
    Source,
    Trace,
    append_traces,
    checkpoint_hash,
    iter_traces,
    read_traces,
    resume_traces,
    write_traces,
)

SOURCE = Source(model="base", weights="00ff", temperature=1.0, max_tokens=512, seed=3)


def trace(number: int, completion: str = " 4 ") -> Trace:
    return Trace(
        id=f"sums-1/{number}", prompt_id="sums-1", task="sums", template="r1", question="2+2?", prompt="Q: 2+2? A:",
        completion=completion, finish_reason="stop", tokens=3, reward=1.1, metrics={"exact": 1.0},
        row={"question": "2+2?", "answer": "4", "states": [2, None]}, source=SOURCE,
    )  # fmt: skip


AWKWARD = ["", "a\nb\r\n", "\u2028 \x85 \x0b", "\N{GRINNING FACE} \xe9 \u4e2d", '"\\', "\x00"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_what_is_written_is_read(tmp_path, name):
    written = [trace(i, text) for i, text in enumerate(AWKWARD)]
    assert write_traces(tmp_path / name, written) == len(AWKWARD)
    assert read_traces(tmp_path / name) == written
    first = (tmp_path / name).read_bytes()
    write_traces(tmp_path / name, written)
    assert (tmp_path / name).read_bytes() == first


def test_unscored_traces_have_no_reward(tmp_path):
    write_traces(tmp_path / "t.jsonl", [replace(trace(0), reward=None)])
    assert read_traces(tmp_path / "t.jsonl")[0].reward is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "[", "line 2: no trace: "),
        ('"completion"', '"completions"', "line 2: a trace needs the field 'completion'"),
        ('"tokens": 3', '"tokens": "3"', "line 2: no trace: tokens: Input should be a valid integer, got '3'"),
        ('"seed": 3', '"sed": 3', "line 2: a trace needs the field 'seed'"),
    ],
)
def test_errors_name_the_line(tmp_path, old, new, message):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{trace(0).to_json()}\n{trace(1).to_json().replace(old, new, 1)}\n")
    with pytest.raises(ValueError) as caught:
        read_traces(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_ids_are_unique_and_there_are_some(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(path, [trace(0), trace(0)])
    with pytest.raises(ValueError, match="'sums-1/0' stands there twice"):
        read_traces(path)
    write_traces(path, [])
    with pytest.raises(ValueError, match="has no traces"):
        read_traces(path)
    with pytest.raises(FileNotFoundError):
        read_traces(tmp_path / "missing.jsonl")


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: not a whole gzip file"):
        read_traces(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(path, [trace(0)])

    def broken():
        yield trace(1)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_traces(path, broken())
    assert read_traces(path) == [trace(0)]


@pytest.mark.parametrize("torn", ["", '{"id": "sums-1/2", "prom', "x" * 200_000])
def test_a_killed_run_goes_on(tmp_path, torn):
    path = tmp_path / "sub" / "t.jsonl"
    assert resume_traces(path) == []
    append_traces(path, [trace(0)])
    append_traces(path, [trace(1)])
    with path.open("a") as file:
        file.write(torn)
    assert resume_traces(path) == [trace(0), trace(1)]
    append_traces(path, [trace(2)])
    assert list(iter_traces(path)) == [trace(0), trace(1), trace(2)]


def test_a_first_line_cut_off_leaves_nothing(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id"')
    assert resume_traces(path) == [] and path.stat().st_size == 0


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    tensors = {name: torch.arange(5000.0) + i for i, name in enumerate(("a", "b", "c"))}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def change_weight(folder: Path, name: str, at: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] += 1
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("whole_bytes", [1 << 30, 0])
def test_checkpoints_are_told_apart(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(module, "_WHOLE_BYTES", whole_bytes)
    if not whole_bytes:  # every file counts as large: they have headers
        monkeypatch.setattr(module, "_SMALL_FILES", ())
    folder = checkpoint(tmp_path / "one")
    first = checkpoint_hash(folder)
    copy = shutil.copytree(folder, tmp_path / "two")
    assert checkpoint_hash(copy) == first and len(first) == 16
    (copy / "training.json").write_text("{}")
    assert checkpoint_hash(copy) == first
    for at in (0, 2500, 4999):
        other = shutil.copytree(folder, tmp_path / f"changed{at}")
        change_weight(other, "b", at)
        assert checkpoint_hash(other) != first


def test_configuration_and_tokenizer_count(tmp_path):
    folder = checkpoint(tmp_path / "one")
    hashes = [checkpoint_hash(folder)]
    (folder / "config.json").write_text('{"x": 1}')
    hashes.append(checkpoint_hash(folder))
    (folder / "tokenizer.json").write_text("{}")
    hashes.append(checkpoint_hash(folder))
    assert len(set(hashes)) == 3


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        checkpoint_hash(tmp_path)
