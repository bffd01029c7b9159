"""From an exception to one message and an exit status; the traceback goes to a file.

0    done
1    ran, and failed its purpose: did not learn, gradients not finite, engines with other weights, a failed check
2    wrong usage or input
3    this machine: disk full, memory used up, port taken, no sandbox, engines that die
4    unexpected, probably a defect of this program
130  stopped by Ctrl-C
"""

import errno
import os
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path
from typing import Any

FAILED, WRONG_INPUT, MACHINE, UNEXPECTED, INTERRUPTED = 1, 2, 3, 4, 130
_OURS = ("grpo", "models", "pipelines", "rewards", "rollout")
_MACHINE_ERRNO = {
    errno.ENOSPC: "free space, or choose another --out",
    errno.EDQUOT: "free space within your quota, or choose another --out",
    errno.EFBIG: "raise the limit on file sizes: ulimit -f unlimited",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENOMEM: "end other programs",
    errno.EADDRINUSE: "end the program that has the port, or choose another --port",
}
_RUNTIME = {
    "SandboxError": "grpo doctor --quick shows which sandbox works",
    "ActorDiedError": "grpo doctor starts an engine apart; --verbose shows what it said",
    "RayActorError": "grpo doctor starts an engine apart; --verbose shows what it said",
    "OutOfMemoryError": "",
    "MemoryError": "",
}
"""Names of classes, so that neither torch nor Ray need be imported to tell; what to do."""
_LESS_MEMORY = {
    "learner.token_budget": "lower", "token_budget": "lower", "checkpoint_layers": "turn on",
    "engine.gpu_memory_share": "lower", "engine.max_num_seqs": "lower", "engine.kv_cache_gib": "lower",
}  # fmt: skip


def classify(error: BaseException) -> int:
    """The exit status."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _RUNTIME.keys() or (isinstance(error, OSError) and error.errno in _MACHINE_ERRNO):
        return MACHINE
    if isinstance(error, FloatingPointError) or names & {"SyncError", "NoRewardsError"}:
        return FAILED
    if isinstance(error, OSError) or (isinstance(error, ValueError) and not _is_from_library(error)):
        return WRONG_INPUT
    return UNEXPECTED


def _is_from_library(error: BaseException) -> bool:
    """Whether it was raised in a package that is not ours: then its message was not meant for our users."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_globals.get("__name__", "").split(".")[0] in _OURS:
        return False
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return any(Path(frames[-1].f_code.co_filename).is_relative_to(folder) for folder in folders)


def describe(error: BaseException, config: Any = None) -> str:
    """What, and what to do, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    names = [cls.__name__ for cls in type(error).__mro__]
    status = classify(error)
    if any(name in ("ActorDiedError", "RayActorError") for name in names):
        # Ray puts the whole traceback of the other process into the message; its last part is the cause.
        starts = [i for i, line in enumerate(lines) if "Error:" in line.split(" ")[0] + " " or "Error: " in line]
        text = f"an engine's process ended: {' '.join(lines[starts[-1] :] if starts else lines[:1])}"
    elif status == UNEXPECTED:
        text = f"unexpected {type(error).__name__}: {' '.join(lines)}"
    else:
        text = " ".join(lines) or type(error).__name__
    return text + _remedy(error, names, config, text)


def _remedy(error: BaseException, names: list[str], config: Any, text: str) -> str:
    if "OutOfMemoryError" in names or "MemoryError" in names:
        from pipelines.config import flat_fields

        fields = flat_fields(config) if config is not None else {}
        advice = [f"{do} {name} (now {fields[name]})" for name, do in _LESS_MEMORY.items() if name in fields]
        return f"; out of memory: {', '.join(advice) or 'end what else uses it'}"
    known = _MACHINE_ERRNO.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    known = known or next((_RUNTIME[name] for name in names if name in _RUNTIME), "")
    return f"; {known}" if known and "free space" not in text and "Remedy" not in text else ""


def report(error: BaseException, config: Any = None) -> int:
    """Prints one line, writes the traceback to a file where the error is not one of input; the exit status."""
    status, message = classify(error), describe(error, config)
    if status in (FAILED, MACHINE, UNEXPECTED) and (path := _write_traceback(error, config)):
        message += f"; traceback in {path}"
    print(f"grpo: error: {message}", file=sys.stderr)
    return status


def _write_traceback(error: BaseException, config: Any) -> Path | None:
    """error.log in the run's folder if it has begun, else a file for temporary ones; None if neither can be written."""
    text = "".join(traceback.format_exception(error)) + "\n"
    out = Path(getattr(config, "out", "") or os.devnull)
    if (out / "config.json").is_file():
        try:
            with (out / "error.log").open("a") as file:
                file.write(text)
            return out / "error.log"
        except OSError:  # a full disk, say: it may be another than that of temporary files
            pass
    try:
        with tempfile.NamedTemporaryFile("w", prefix="grpo-error-", suffix=".log", delete=False) as file:
            file.write(text)
        return Path(file.name)
    except OSError:
        return None
