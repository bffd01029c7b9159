"""Inside the solution's sandbox: run the program under test and answer calls to it.

Everything after the first `exec` is the program's: it may read, patch or forge whatever is in this process. That is
why nothing here is believed: no expected value enters, replies are data, and the verdict is made elsewhere.

Kind "functions": run the program once, then answer one call after another.
Kind "stdin": compile the program once, then run it in a forked child for each case, standard input from a file.

Usage: `python code_solution_side.pyc READ_FD WRITE_FD`, started by `rewards.sandbox_process`.
"""

from __future__ import annotations

import builtins
import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, _FOLDER)  # in the sandbox, `rewards` holds the codec only

from rewards.code_codec import Decoder, Encoder, Link, dumps, receive, send  # noqa: E402
from rewards.sandbox_confine import install_filter  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

_MAX_ERROR_CHARS, _MAX_NAMES = 300, 4000


class _Program:
    """The running program, the objects that calls have left here, and the entry expressions already evaluated."""

    def __init__(self, namespace: dict[str, Any], classes: list[str]) -> None:
        self._namespace = namespace
        self._classes = {name: namespace[name] for name in classes if isinstance(namespace.get(name), type)}
        self._kept: list[Any] = []
        self._targets: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        decode = Decoder(self._classes, lambda link: self._kept[link.handle]).decode
        if "get" in request:
            return {"v": self._encode(getattr(decode(request["get"]), request["name"]))}
        if "set" in request:
            setattr(decode(request["set"]), request["name"], decode(request["value"]))
            return {"v": self._encode(None)}
        arguments, keywords = decode(request["arguments"])
        value = self._target(request["call"], decode)(*arguments, **keywords)
        after = self._encode((arguments, keywords)) if request["copy_back"] else None
        return {"v": self._encode(value), "a": None if after == request["arguments"] else after}

    def _target(self, call: Any, decode: Callable[[Any], Any]) -> Any:
        if not isinstance(call, str):
            return decode(call)
        if call not in self._targets:
            self._targets[call] = eval(call, self._namespace)  # the task's own entry point, "Solution().add" say
        return self._targets[call]

    def _encode(self, value: Any) -> list[Any]:
        return Encoder(self._classes, self._keep).encode(value)

    def _keep(self, value: Any) -> Link:
        self._kept.append(value)
        return Link(len(self._kept) - 1, type(value).__name__)


def _describe(error: BaseException, phase: str) -> dict[str, Any]:
    try:
        message = str(error)[:_MAX_ERROR_CHARS]
    except BaseException:  # the program's own __str__
        message = ""
    return {"e": type(error).__name__, "m": message, "phase": phase}


def _new_namespace(name: str) -> dict[str, Any]:
    """The namespace of a module that is registered, as dataclasses and typing expect."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def _boot(boot: dict[str, Any]) -> tuple[_Program | None, dict[str, Any]]:
    """Run the program once; return it and the first reply."""
    namespace = _new_namespace("solution")
    phase = "prelude"
    try:
        exec(compile(boot["prelude"], "prelude.py", "exec", dont_inherit=True), namespace)
        for name in boot["forget"]:
            namespace.pop(name, None)
        phase = "compile"
        code = compile(boot["code"], "solution.py", "exec", dont_inherit=True)
        install_filter(_FOLDER)
        phase = "import"
        exec(code, namespace)
        program = _Program(namespace, boot["classes"])
        return program, {"names": [name for name in namespace if type(name) is str][:_MAX_NAMES]}
    except BaseException as error:
        return None, _describe(error, phase)


def _answer(program: _Program, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return program.answer(request)
    except BaseException as error:
        return _describe(error, "call")


def _serve_functions(read_fd: int, write_fd: int, boot: dict[str, Any]) -> None:
    own_pid = os.getpid()
    program, reply = _boot(boot)
    while os.getpid() == own_pid:  # else it is a child that the program forked
        try:
            send(write_fd, reply)
        except ValueError as error:  # too large
            send(write_fd, _describe(error, "call"))
        if program is None:
            return
        reply = _answer(program, receive(read_fd))
    os._exit(0)


def replay(boot: dict[str, Any], requests: list[dict[str, Any]], marker: str) -> None:
    """Answer requests that are known beforehand, a line on standard output each (for a remote sandbox)."""
    write = open(os.dup(1), "w", encoding="ascii").write  # noqa: SIM115  # the program may close or replace sys.stdout
    program, reply = _boot(boot)
    for request in [*requests, None]:
        write(f"\n{marker}{dumps(reply)}\n")
        write.__self__.flush()
        if program is None or request is None:
            return
        reply = _answer(program, request)


def _serve_cases(read_fd: int, write_fd: int, boot: dict[str, Any]) -> tuple[CodeType, list[int]] | None:
    """Return in the child of each case, with what `_become_program` needs; in the parent on a program that is none."""
    try:
        code = compile(boot["code"], "solution.py", "exec", dont_inherit=True)
    except BaseException as error:
        send(write_fd, _describe(error, "compile"))
        return None
    send(write_fd, {"names": []})
    while True:
        text = receive(read_fd)
        with open("stdin", "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        files = [os.open("stdin", os.O_RDONLY)]
        files += [os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            os.close(read_fd)
            os.close(write_fd)
            return code, files
        _, status = os.waitpid(child, 0)
        out, error_text = _content(files[1], boot["max_output_bytes"] + 1), _content(files[2], 1 << 16)
        for fd in files:
            os.close(fd)
        send(write_fd, {"out": out, "status": os.waitstatus_to_exitcode(status), "err": error_text[-600:]})


def _become_program(code: CodeType, files: list[int]) -> None:
    for number, fd in enumerate(files):
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = ["solution.py"]
    namespace = _new_namespace("__main__")
    install_filter(_FOLDER)
    exec(code, namespace)


def _content(fd: int, max_bytes: int) -> str:
    return os.pread(fd, max_bytes, 0).decode("utf-8", "replace")


def main() -> None:
    """Say that the interpreter is up, read the program, serve until the other side closes."""
    read_fd, write_fd = int(sys.argv[1]), int(sys.argv[2])
    packages = os.path.join(os.path.dirname(_FOLDER), "packages")
    if os.path.isdir(packages):
        sys.path.append(packages)
    builtins.exit = builtins.quit = sys.exit  # `site` would bring them, at four times the start-up time
    os.write(write_fd, b"R")
    try:
        boot = receive(read_fd)
        if boot["kind"] == "functions":
            _serve_functions(read_fd, write_fd, boot)
            return
        child = _serve_cases(read_fd, write_fd, boot)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    if child is not None:  # outside the `try`, so that it ends as an interpreter does: errors, threads, exit functions
        _become_program(*child)


if __name__ == "__main__":
    main()
