"""The folder of a stage's run: config.json when it begins, metrics and checkpoints on the way, model/ at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config import flat_fields, read_config, write_config


def open_run_folder(config: Any, out: Path, free: Sequence[str] = ("out", "resume")) -> None:
    """Creates the folder with its config.json, or checks that a run to be resumed has the same configuration but for
    the fields `free`. Raises ValueError or FileNotFoundError with the remedy."""
    if not config.out:
        raise ValueError("no run folder given: add --out")
    saved = out / "config.json"
    if not config.resume:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds something already; continue a run with --resume, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, saved)
        return
    check_resumed(config, out, free)


def check_resumed(config: Any, out: Path, free: Sequence[str]) -> None:
    """Raises FileNotFoundError where there is no run to resume, ValueError if it was started with another configuration
    but for the fields `free`; `mesh.` stands for all fields of a section."""
    saved = out / "config.json"
    if not saved.exists():
        raise FileNotFoundError(f"{out} holds no run to resume (no config.json); start it without --resume")
    started, asked = flat_fields(read_config(type(config), saved, default=config)), flat_fields(config)
    sections = tuple(name for name in free if name.endswith("."))
    changed = [n for n in asked if n not in free and not n.startswith(sections) and asked[n] != started[n]]
    if changed:
        raise ValueError(
            f"{out} was started with another {', '.join(changed)}; resume it with the configuration in {saved}"
        )
