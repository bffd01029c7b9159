"""Sampled completions, before anything judges them, and the file that keeps them until the evaluation is finished.

log = SampleLog(Path("runs/eval/samples.jsonl"))
for drawn in sample_engines(pool, prompts, params, decode, done=log.keys()):
    log.append(drawn)
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rollout.stream import Key

NO_ROOM = "no_room"
"""Kind of failure: the model's context does not hold the prompt and as many tokens as a completion may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One completion, or why there is none."""

    prompt_id: str
    index: int
    """Position among the problem's completions."""
    text: str = ""
    """Without the end-of-text token, and without the stop string and what follows it."""
    token_ids: list[int] = field(default_factory=list)
    """Empty where a server sampled, which gives no ids."""
    tokens: int = 0
    """Sampled tokens, as the engine or the server counts them."""
    finish_reason: str = "error"
    """`stop`, `length` or `error`."""
    failure: str = ""
    """Kind of failure: `no_room`, `engine`, `timeout`, `connection`, `http_500`, ...; empty for a completion."""
    error: str = ""
    """What the engine or the server said."""
    retries: int = 0
    """Times that the server was busy and asked to come again."""

    @property
    def key(self) -> Key:
        return self.prompt_id, self.index


def no_room(prompt_id: str, num_completions: int, error: str) -> list[Drawn]:
    """What is known of the completions of a prompt that is too long."""
    return [Drawn(prompt_id=prompt_id, index=i, failure=NO_ROOM, error=error) for i in range(num_completions)]


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    ends = [at for string in stop if (at := text.find(string)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


class SampleLog:
    """A file of completions that grows as they come, so that a killed evaluation goes on where it was."""

    def __init__(self, path: Path) -> None:
        """Reads what an earlier process left; a last line that a kill cut off is removed from the file."""
        self._path = path
        self.drawn: dict[Key, Drawn] = {}
        """Everything in the file."""
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            with path.open("rb+") as file:
                file.truncate(len(whole))
            for line in whole.decode().splitlines():
                one = Drawn(**json.loads(line))
                self.drawn[one.key] = one

    def append(self, drawn: Sequence[Drawn]) -> None:
        """On the disk when it returns."""
        with self._path.open("a") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in drawn)
            file.flush()
            os.fsync(file.fileno())
        self.drawn |= {one.key: one for one in drawn}

    def drop_failed(self) -> int:
        """Forgets completions that failed for other reasons than a prompt that is too long; how many."""
        kept = [one for one in self.drawn.values() if one.failure in ("", NO_ROOM)]
        dropped = len(self.drawn) - len(kept)
        write_lines(self._path, [asdict(one) for one in kept])
        self.drawn = {one.key: one for one in kept}
        return dropped


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all; values that JSON does not know become text."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
