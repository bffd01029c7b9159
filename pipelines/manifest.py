"""The stages of a run folder, and which of them must run: `manifest.json` remembers what each was made from.

    stages = [Stage(name="base", config=config, inputs=(corpus,), folder=base, outputs=(base,), run=make_base), ...]
    with Manifest.open(out) as manifest:
        manifest.run(stages, Selection(first="sampling"))

A stage is left alone if it is done, its configuration and the contents of its inputs are those it was made with, and
what it wrote is whole. Otherwise it runs again, and so do later stages whose inputs come out different. A stage that
was stopped in the middle, under the same configuration and inputs, is asked to go on where it was.

Contents are compared by hash. A file is read again only if its size or time of change is not the one remembered.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipelines.config import describe_error

Say = Callable[[str], None]
Files = dict[str, tuple[int, int, str]]
"""Name below the path -> size in bytes, time of change in ns, hash of the content."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a chain."""

    name: str
    config: dict[str, Any]
    """All that decides the result beside the inputs, as plain JSON values; no paths that the run folder decides."""
    inputs: tuple[Path, ...] = ()
    """Files and folders that are read, in order; outputs of stages before it among them."""
    folder: Path
    """What the stage alone writes into."""
    outputs: tuple[Path, ...]
    """Files and folders in it that later stages read; the rest may be thrown away."""
    run: Callable[[bool], Any]
    """Writes `folder`; True asks it to go on with what an interrupted run has left there."""
    resumes: bool = False
    """Whether `run` can go on. Where not, what an interrupted run has left is removed first."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which stages the user wants."""

    first: str = ""
    """Run this one and all after it, done or not."""
    only: tuple[str, ...] = ()
    """Look at these alone."""

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name that is no stage."""
        for name in (*([self.first] if self.first else []), *self.only):
            if name not in names:
                raise ValueError(f"there is no stage {name!r}; stages: {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the manifest knows of a stage."""

    name: str
    status: Literal["running", "stopped", "failed", "done"]
    """`running` after the process was killed, too; `stopped` by the user."""
    config: dict[str, Any]
    inputs: dict[str, Files]
    """Path -> the files there when the stage began."""
    outputs: dict[str, Files] = field(default_factory=dict)
    """The same of what a stage that is done has written."""
    version: str = ""
    """Of the code: commit, or release."""
    started: str = ""
    """UTC."""
    ended: str = ""
    seconds: float = 0.0
    """Of work, resumed runs together."""
    error: str = ""
    """Why it failed."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done with a stage."""

    action: Literal["skip", "run", "resume"]
    reason: str
    """In the user's words."""

    def describe(self) -> str:
        return {"skip": "", "run": "runs, ", "resume": "goes on, "}[self.action] + self.reason


class Manifest:
    """`manifest.json` of one run folder; written whole or not at all."""

    def __init__(self, folder: Path, version: str = "") -> None:
        """Reads what is there. Raises ValueError for a file that is no manifest."""
        self.folder, self.version = folder, version
        self.path = folder / "manifest.json"
        self.records: dict[str, Record] = {}
        if self.path.exists():
            try:
                records = TypeAdapter(list[Record]).validate_json(self.path.read_bytes())
            except ValidationError as error:
                raise ValueError(f"{self.path} is no manifest: {describe_error(error)}; remove it") from None
            self.records = {record.name: record for record in records}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, version: str = "") -> Iterator["Manifest"]:
        """The manifest, of which no other process has a hold within the block. Raises ValueError if one has."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is at work in {folder}; wait for it, or choose another --out"
                ) from None
            yield cls(folder, version)

    def decide(self, stage: Stage, *, forced: bool = False, fresh: frozenset[Path] = frozenset()) -> Decision:
        """Whether the stage must run, and why; `fresh` are paths that will be made anew before."""
        record = self.records.get(stage.name)
        if record is None:
            return Decision(action="run", reason="never ran")
        if forced:
            return Decision(action="run", reason="asked for")
        changed = _changed_keys(record.config, stage.config)
        if changed:
            return Decision(action="run", reason=f"configuration changed: {', '.join(changed)}")
        if later := [path.name for path in stage.inputs if path in fresh]:
            return Decision(action="run", reason=f"input is made anew: {', '.join(later)}")
        if reason := self._difference(stage.inputs, record.inputs):
            return Decision(action="run", reason=f"input {reason}")
        if record.status != "done":
            how = "failed" if record.status == "failed" else "was interrupted"
            goes_on = stage.resumes and stage.folder.exists()
            return Decision(action="resume" if goes_on else "run", reason=how)
        if reason := self._difference(stage.outputs, record.outputs):
            return Decision(action="run", reason=f"output {reason}")
        return Decision(action="skip", reason="up to date")

    def _difference(self, paths: Sequence[Path], known: dict[str, Files]) -> str:
        """What is not as it was, empty if nothing."""
        names = [self._name(path) for path in paths]
        if names != list(known):
            return f"is {', '.join(names) or 'none'}, was {', '.join(known) or 'none'}"
        for name, path in zip(names, paths, strict=True):
            now = hash_files(path, known[name])
            if {file: entry[2] for file, entry in now.items()} != {file: e[2] for file, e in known[name].items()}:
                return f"changed: {name}" if now else f"is not there: {name}"
        return ""

    def plan(self, stages: Sequence[Stage], selection: Selection) -> list[tuple[Stage, Decision]]:
        """What `run` would do, as far as it can be known before: later stages may turn out to be up to date."""
        names = [stage.name for stage in stages]
        selection.check(names)
        first = names.index(selection.first) if selection.first else len(names)
        fresh: set[Path] = set()
        planned = []
        for place, stage in enumerate(stages):
            if selection.only and stage.name not in selection.only:
                decision = Decision(action="skip", reason="not asked for")
            else:
                forced = place >= first or stage.name in selection.only
                decision = self.decide(stage, forced=forced, fresh=frozenset(fresh))
            if decision.action != "skip":
                fresh.update(stage.outputs)
            planned.append((stage, decision))
        return planned

    def run(self, stages: Sequence[Stage], selection: Selection, say: Say = print) -> None:
        """Runs what must run, in order. Raises FileNotFoundError for an input that is missing, and what a stage raises,
        after noting it."""
        names = [stage.name for stage in stages]
        selection.check(names)
        first = names.index(selection.first) if selection.first else len(names)
        for place, stage in enumerate(stages):
            title = f"{place + 1}/{len(stages)} {stage.name}"
            if selection.only and stage.name not in selection.only:
                continue
            for path in stage.inputs:
                if not path.exists():
                    raise FileNotFoundError(
                        f"stage {stage.name} needs {path}, which is not there; run the stages before"
                    )
            decision = self.decide(stage, forced=place >= first or stage.name in selection.only)
            say(f"{title}: {decision.describe()}")
            if decision.action != "skip":
                self._run(stage, resume=decision.action == "resume")

    def _run(self, stage: Stage, *, resume: bool) -> None:
        if not resume:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(stage.folder)
        record = self._begin(stage, resume)
        began = time.monotonic()
        try:
            stage.run(resume)
            outputs = {self._name(path): hash_files(path) for path in stage.outputs}
            if missing := [name for name, files in outputs.items() if not files]:
                raise FileNotFoundError(f"stage {stage.name} ended without writing {', '.join(missing)}")
            record = replace(record, status="done", outputs=outputs)
        except BaseException as error:  # noted, and raised again
            status = "failed" if isinstance(error, Exception) else "stopped"
            record = replace(record, status=status, error=str(error) or repr(error))
            raise
        finally:
            seconds = round(record.seconds + time.monotonic() - began, 3)
            self._write(replace(record, seconds=seconds, ended=_now()))

    def _begin(self, stage: Stage, resume: bool) -> Record:
        before = self.records.get(stage.name)
        inputs = {self._name(path): hash_files(path, self._known(path)) for path in stage.inputs}
        record = Record(
            name=stage.name, status="running", config=stage.config, inputs=inputs, version=self.version, started=_now(),
            seconds=before.seconds if before and resume else 0.0,
        )  # fmt: skip
        self._write(record)
        return record

    def _known(self, path: Path) -> Files:
        """What is known of the files of a path that an earlier stage has written."""
        name = self._name(path)
        return next((record.outputs[name] for record in self.records.values() if name in record.outputs), {})

    def _name(self, path: Path) -> str:
        """Relative to the run folder where it is inside, so that the folder may be moved."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def _write(self, record: Record) -> None:
        self.records[record.name] = record
        fresh = self.path.with_name(f".{self.path.name}.new")
        with fresh.open("w") as file:
            json.dump([asdict(record) for record in self.records.values()], file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def hash_files(path: Path, known: Files | None = None) -> Files:
    """Every file at or below the path, by name; {} where nothing is. Hidden files do not count."""
    found: Files = {}
    paths = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    for file in paths:
        name = file.relative_to(path).as_posix() if file != path else file.name
        if not file.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        stat = file.stat()
        size, changed, digest = (known or {}).get(name, (-1, -1, ""))
        if (size, changed) != (stat.st_size, stat.st_mtime_ns):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        found[name] = (stat.st_size, stat.st_mtime_ns, digest)
    return found


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`trainer.steps 10 -> 20` for every key whose value is another."""
    old_flat, new_flat = _flatten(json.loads(json.dumps(old))), _flatten(json.loads(json.dumps(new)))
    names = [name for name in {**old_flat, **new_flat} if old_flat.get(name) != new_flat.get(name)]
    return [f"{name} {old_flat.get(name)} -> {new_flat.get(name)}" for name in names]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
