"""The stage runner, with stages that append to a text.

1. nothing runs twice without a reason; a changed configuration, input or output runs that stage again, and later ones
   only if what they read came out different
2. a stage that was stopped goes on where it can, begins anew where it cannot, and never goes on under another
   configuration
3. --from, --only; a plan says what a run would do, without doing it
4. the manifest is whole at any moment, and holds what a stage was made from
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.manifest import Manifest, Selection, Stage

ALL = Selection()


class Chain:
    """source.txt -> a -> b -> c; each stage writes what it reads and its own letter."""

    def __init__(self, folder: Path) -> None:
        self.out, self.source = folder / "out", folder / "source.txt"
        self.source.write_text("text")
        self.ran: list[str] = []
        self.said: list[str] = []
        self.stages = [
            self.stage("a", self.source),
            self.stage("b", self.out / "a" / "text"),
            self.stage("c", self.out / "b" / "text"),
        ]

    def stage(self, name: str, source: Path, run: Callable[[bool], object] | None = None) -> Stage:
        folder = self.out / name

        def append(resume: bool) -> None:
            self.ran.append(name + (" resumed" if resume else ""))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "text").write_text(source.read_text() + name)

        return Stage(
            name=name, config={"letter": name, "section": {"steps": 1}}, inputs=(source,), folder=folder,
            outputs=(folder / "text",), run=run or append,
        )  # fmt: skip

    def change(self, name: str, **fields: object) -> None:
        self.stages = [replace(s, **fields) if s.name == name else s for s in self.stages]  # type: ignore[arg-type]

    def run(self, selection: Selection = ALL) -> list[str]:
        """What ran, in order."""
        self.ran, self.said = [], []
        with Manifest.open(self.out, version="v1") as manifest:
            manifest.run(self.stages, selection, self.said.append)
        return self.ran


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    chain = Chain(tmp_path)
    assert chain.run() == ["a", "b", "c"]
    assert (chain.out / "c" / "text").read_text() == "textabc"
    return chain


def test_what_is_done_is_not_done_again(chain: Chain):
    assert chain.run() == []
    assert chain.said == ["1/3 a: up to date", "2/3 b: up to date", "3/3 c: up to date"]
    os.utime(chain.source)
    assert chain.run() == [], "contents count, not times"
    chain.out.rename(chain.out.with_name("moved"))
    moved = Chain(chain.out.parent)
    moved.out.rmdir() if moved.out.exists() else None
    chain.out.with_name("moved").rename(chain.out)
    assert moved.run() == []


def test_a_change_runs_the_stage_and_what_depends_on_it(chain: Chain):
    chain.source.write_text("TEXT")
    assert chain.run() == ["a", "b", "c"]
    assert "input changed: " in chain.said[0] and "2/3 b: runs, input changed: a/text" in chain.said
    chain.change("b", config={"letter": "b", "section": {"steps": 2}})
    assert chain.run() == ["b"], "b comes out as before, so nothing that reads it runs again"
    assert "2/3 b: runs, configuration changed: section.steps 1 -> 2" in chain.said
    (chain.out / "b" / "text").write_text("harmed")
    assert chain.run() == ["b"]
    assert "2/3 b: runs, output changed: b/text" in chain.said
    (chain.out / "c" / "text").unlink()
    assert chain.run() == ["c"]
    assert "3/3 c: runs, output is not there: c/text" in chain.said


def test_other_inputs_are_another_stage(chain: Chain):
    chain.change("c", inputs=(chain.out / "a" / "text",))
    assert chain.run() == ["c"]
    assert "3/3 c: runs, input is a/text, was b/text" in chain.said


def test_a_stopped_stage_goes_on_only_where_it_can(chain: Chain):
    whole = chain.stages[1].run

    def break_off(resume: bool) -> None:
        (chain.out / "b").mkdir(exist_ok=True)
        (chain.out / "b" / "half").write_text("half")
        raise KeyboardInterrupt

    for resumes, expected in ((False, "b"), (True, "b resumed")):
        chain.change("b", run=break_off, resumes=resumes, config={"letter": "b", "resumes": resumes})
        with pytest.raises(KeyboardInterrupt):
            chain.run()
        assert chain.ran == []
        chain.change("b", run=whole)
        assert chain.run() == [expected]
        assert (chain.out / "b" / "half").exists() is resumes, "what cannot be continued is removed"
    chain.change("b", run=break_off, config={"letter": "b", "steps": 3})
    with pytest.raises(KeyboardInterrupt):
        chain.run()
    chain.change("b", run=whole, config={"letter": "b", "steps": 4})
    assert chain.run() == ["b"], "not resumed: it was begun with another configuration"
    assert not (chain.out / "b" / "half").exists()


def test_a_killed_process_leaves_a_stage_that_goes_on(chain: Chain):
    path = chain.out / "manifest.json"
    records = json.loads(path.read_text())
    assert [record["status"] for record in records] == ["done"] * 3
    records[1] |= {"status": "running", "outputs": {}}  # as the file stands while b runs
    path.write_text(json.dumps(records))
    chain.change("b", resumes=True)
    assert chain.run() == ["b resumed"]
    assert "2/3 b: goes on, was interrupted" in chain.said


def test_a_failure_is_noted_and_raised(chain: Chain):
    chain.change("b", config={}, run=lambda resume: None)
    with pytest.raises(FileNotFoundError, match="stage b ended without writing b/text"):
        chain.run()
    record = json.loads((chain.out / "manifest.json").read_text())[1]
    assert record["status"] == "failed" and "b/text" in record["error"] and record["ended"]
    with pytest.raises(FileNotFoundError, match=r"needs .*b/text, which is not there"):
        chain.run(Selection(only=("c",)))


def test_stages_can_be_chosen(chain: Chain):
    assert chain.run(Selection(first="b")) == ["b", "c"]
    assert chain.run(Selection(only=("b",))) == ["b"]
    chain.source.write_text("TEXT")
    assert chain.run(Selection(only=("c",))) == ["c"], "stages before it are not looked at"
    with pytest.raises(ValueError, match="there is no stage 'd'; stages: a, b, c"):
        chain.run(Selection(first="d"))


def test_a_plan_does_nothing_and_says_what_would_be_done(chain: Chain):
    chain.change("b", config={"letter": "B"})
    planned = Manifest(chain.out).plan(chain.stages, ALL)
    assert [decision.describe() for _, decision in planned] == [
        "up to date",
        "runs, configuration changed: letter b -> B, section.steps 1 -> None",
        "runs, input is made anew: text",
    ]
    fresh = Manifest(chain.out.with_name("new")).plan(chain.stages, ALL)
    assert [decision.reason for _, decision in fresh] == ["never ran"] * 3
    assert not chain.out.with_name("new").exists()


def test_the_manifest_says_what_a_stage_was_made_from(chain: Chain):
    first, second, _ = json.loads((chain.out / "manifest.json").read_text())
    digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"  # sha256sum of "text"
    assert first["inputs"][str(chain.source)]["source.txt"][2] == digest
    assert second["inputs"]["a/text"]["text"][2] == first["outputs"]["a/text"]["text"][2]
    assert first["version"] == "v1" and first["seconds"] >= 0 and first["started"] <= first["ended"]


def test_two_processes_do_not_work_in_one_folder(chain: Chain):
    with Manifest.open(chain.out), pytest.raises(ValueError, match="another process is at work"):
        chain.run()
    (chain.out / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"is no manifest.*remove it"):
        chain.run()
