"""Choosing and proving an isolation tier; the pool of sandboxes that graders take from.

`open_sandbox("auto")` tries bubblewrap, then unshare; each must pass a self-test, on this machine and under this user,
before it is used. What was refused and why is part of `description`, which callers print: no tier is left silently.
Running without isolation needs the caller's word, `allow_unsafe_code=True`.

Covered, by the self-test: number of processes, memory, network, host files, environment, identity, the host's
processes, the system call filter, writing outside /tmp and how much into it, the end of a daemon.
Not covered: what `rewards.sandbox_launch` and `rewards.sandbox_process` say they do not cover.

Usage: `with open_sandbox() as sandbox: print(sandbox.description)`.
"""

import os
import py_compile
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Self

from rewards.sandbox_confine import INSTALLED_FILTER
from rewards.sandbox_launch import Command, Plan, bubblewrap_command, rlimits_command, unshare_command
from rewards.sandbox_limits import Limits, SandboxError
from rewards.sandbox_process import Launcher, Nursery
from rewards.sandbox_seccomp import build_filter
from rewards.sandbox_selftest import self_test

_MODULES = ("code_codec", "code_proxy", "code_suite", "sandbox_confine")
_RUNNERS = ("code_solution_side", "code_test_side", "sandbox_probe")


class Tier(StrEnum):
    """How programs are kept apart from the host, best first."""

    BUBBLEWRAP = "bubblewrap"
    UNSHARE = "unshare"
    RLIMITS = "rlimits"

    def is_isolated(self) -> bool:
        """True where programs see neither the host's files nor its network nor its processes."""
        return self is not Tier.RLIMITS


_COMMANDS: dict[Tier, Command] = {
    Tier.BUBBLEWRAP: bubblewrap_command,
    Tier.UNSHARE: unshare_command,
    Tier.RLIMITS: rlimits_command,
}
_TOOLS: dict[Tier, tuple[str, ...]] = {
    Tier.BUBBLEWRAP: ("bwrap", "prlimit", "setpriv"),
    Tier.UNSHARE: ("unshare", "prlimit", "setpriv", "mount", "umount", "pivot_root", "chroot"),
    Tier.RLIMITS: ("prlimit",),
}
_REMEDY = "install bubblewrap (apt-get install bubblewrap), or name a remote sandbox by its URL"


class Sandbox:
    """A pool of one tier: `num_waiting` solutions' sides wait ready to run, tests' sides are started on demand."""

    def __init__(self, tier: Tier, plan: Plan, launcher: Launcher, description: str, num_waiting: int) -> None:
        self.tier = tier
        self.description = description
        """One line for the user: tier, identity, filter, and what was refused before."""
        self.limits = plan.limits
        self.solutions = Nursery(lambda: launcher.start("code_solution_side"), num_waiting)
        self.tests = Nursery(lambda: launcher.start_with_socket("code_test_side"), 0)
        self._folder = plan.runner_dir.parent

    def close(self) -> None:
        """Kill what waits and remove the pool's files."""
        self.solutions.close()
        self.tests.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_sandbox(
    tier: str = "auto",
    *,
    limits: Limits | None = None,
    packages: Path | None = None,
    allow_unsafe_code: bool = False,
    num_waiting: int = 2,
) -> Sandbox:
    """Open a pool of the tier named, or of the best that works; SandboxError says what fails and what to do."""
    if tier != "auto" and tier not in list(Tier):
        raise ValueError(f"sandbox must be auto, {', '.join(Tier)} or a URL, got {tier!r}")
    if tier == Tier.RLIMITS and not allow_unsafe_code:
        raise SandboxError(f"the rlimits tier does not isolate; {_REMEDY}, or allow it with --allow-unsafe-code")
    wanted = [Tier.BUBBLEWRAP, Tier.UNSHARE, *([Tier.RLIMITS] if allow_unsafe_code else [])]
    refused: list[str] = []
    for candidate in wanted if tier == "auto" else [Tier(tier)]:
        folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        try:
            opened = _open(candidate, folder, limits or Limits(), packages, num_waiting, refused)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if opened is not None:
            return opened
        shutil.rmtree(folder, ignore_errors=True)
    raise SandboxError(f"no sandbox works here: {'; '.join(refused)}. Remedy: {_REMEDY}")


def _open(
    tier: Tier, folder: Path, limits: Limits, packages: Path | None, num_waiting: int, refused: list[str]
) -> Sandbox | None:
    """Return the pool, or None with the reason added to `refused`."""
    search_path = f"{os.defpath}:/usr/sbin:/sbin"
    missing = [tool for tool in _TOOLS[tier] if shutil.which(tool, path=search_path) is None]
    if missing:
        refused.append(f"{tier} refused: {', '.join(missing)} not found")
        return None
    plan = Plan(limits=limits, runner_dir=folder / "runner", packages=packages)
    _compile_runners(plan.runner_dir)
    (folder / "root").mkdir()
    program = build_filter(strict=not tier.is_isolated())
    filter_path = folder / "filter.bpf" if tier is Tier.BUBBLEWRAP else plan.runner_dir / INSTALLED_FILTER
    if program is not None:
        filter_path.write_bytes(program)
    launch_filter = filter_path if tier is Tier.BUBBLEWRAP and program is not None else None
    launcher = Launcher(_COMMANDS[tier], plan, filter_path=launch_filter, is_isolated=tier.is_isolated())
    problems = self_test(launcher, is_isolated=tier.is_isolated(), has_filter=program is not None)
    if problems:
        refused.append(f"{tier} refused: {', '.join(problems)}")
        return None
    parts = [
        f"code sandbox: {tier}" if tier.is_isolated() else f"code sandbox: {tier}, UNSAFE, host files are readable"
    ]
    if tier.is_isolated():
        parts.append("a host uid per program" if os.getuid() == 0 else "a user namespace")
    parts.append("seccomp filter" if program is not None else "no seccomp filter for this machine")
    description = "; ".join([", ".join(parts), *refused])
    return Sandbox(tier, plan, launcher, description, num_waiting)


def _compile_runners(folder: Path) -> None:
    """Lay out what runs inside: compiled, so that no sandbox spends its time on that."""
    here = Path(__file__).parent
    package = folder / "rewards"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in _RUNNERS:
        _compile(here / f"{name}.py", folder / f"{name}.pyc")
    for name in _MODULES:
        _compile(here / f"{name}.py", package / f"{name}.pyc")
    _compile(package / "__init__.py", package / "__init__.pyc")
    (package / "__init__.py").unlink()
    for path in (folder, package, *folder.rglob("*.pyc")):
        path.chmod(0o755)  # a sandbox has another uid, whatever the umask here


def _compile(source: Path, target: Path) -> None:
    py_compile.compile(
        str(source), cfile=str(target), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
