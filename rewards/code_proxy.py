"""The solution as its tests see it: functions to call, objects to look into; runs inside the tests' sandbox.

Nothing that comes from the other side is trusted: see `rewards.code_test_side` for what is covered.

Usage: `Function(Solution(read_fd, write_fd), "add")(1, 2)`.
"""

from __future__ import annotations

import builtins

from rewards.code_codec import Decoder, Encoder, Link, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NOT_MAPPED = ("StopIteration", "StopAsyncIteration")
_COPY_BACK = (list, dict, set, bytearray)


class SolutionError(Exception):
    """The solution raised something that has no equivalent here."""


class SolutionEnded(BaseException):
    """The solution's process ended, or broke the protocol. Not an Exception: tests that expect one must not see it."""


class Solution:
    """The other sandbox, as the tests see it."""

    def __init__(self, read_fd: int, write_fd: int, *, is_collecting: bool) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._is_collecting = is_collecting
        self.classes: dict[str, type] = {}
        self.ended: str | None = None
        """Why there is no solution any more."""
        self.raised: tuple[BaseException, str] | None = None
        """The last exception that the solution raised, and the name of its type there."""

    def boot(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Send the program; return its names, or the error that importing it raised."""
        fields = ("code", "prelude", "forget")
        message = {name: spec[name] for name in fields} | {"kind": "functions", "classes": sorted(self.classes)}
        return self._exchange(message)

    def ask(self, **request: Any) -> Any:
        """Send one request; return the decoded reply, or raise what the solution raised."""
        reply = self._exchange(request)
        if "e" in reply:
            self._raise(str(reply["e"]), str(reply.get("m")))
        return reply

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.ended:
            raise SolutionEnded(self.ended)
        try:
            send(self._write_fd, request)
            reply = receive(self._read_fd)
            if not isinstance(reply, dict):
                raise ValueError(f"a reply is an object, got {type(reply).__name__}")
            return reply
        except (EOFError, BrokenPipeError):
            self.ended = "the solution's process ended"
        except (ValueError, RecursionError) as error:
            self.ended = f"the solution's process sent no message: {error}"
        raise SolutionEnded(self.ended) from None

    def _raise(self, name: str, message: str) -> None:
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or name in _NOT_MAPPED:
            kind = SolutionError
        try:
            error = kind(message)
        except TypeError:  # UnicodeDecodeError and others that ask for more
            error = SolutionError(message)
        self.raised = (error, name)
        raise error

    def encode(self, value: Any) -> list[Any]:
        return Encoder(self.classes, _link_of).encode(value)

    def decode(self, wire: Any) -> Any:
        try:
            return Decoder(self.classes, lambda link: Remote(self, link)).decode(wire)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError) as error:
            self.ended = f"the solution's process sent a malformed value: {error}"
        raise SolutionEnded(self.ended)

    def call(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call a function of the solution, and repeat here what it did to the lists and dicts it was given."""
        copy_back = any(isinstance(item, _COPY_BACK) for item in (*arguments, *keywords.values()))
        encoded = self.encode((arguments, keywords))
        reply = self.ask(call=target, arguments=encoded, copy_back=copy_back)
        after = reply.get("a")
        if copy_back and after is not None:
            changed, changed_keywords = self.decode(after)
            for old, new in zip(arguments, changed, strict=False):
                _overwrite(old, new)
            for name, old in keywords.items():
                _overwrite(old, changed_keywords.get(name))
        return self.value_of(reply)

    def value_of(self, reply: dict[str, Any]) -> Any:
        """The value in a reply. While collecting there is none: that is this side's decision, never the reply's."""
        return Unknown() if self._is_collecting else self.decode(reply.get("v"))


def _overwrite(old: Any, new: Any) -> None:
    if type(old) is not type(new):
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


class Function:
    """A function or class of the solution, by the expression that names it there."""

    def __init__(self, solution: Solution, expression: str) -> None:
        self._solution, self._expression = solution, expression

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._solution.call(self._expression, arguments, keywords)

    def __getattr__(self, name: str) -> Function:
        if name.startswith("__"):
            raise AttributeError(name)
        return Function(self._solution, f"{self._expression}.{name}")


class Remote:
    """An object that the solution made and that is no plain data; it equals nothing but itself."""

    def __init__(self, solution: Solution, link: Link) -> None:
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_link", link)

    def __repr__(self) -> str:
        return f"<{self._link.type_name} of the solution>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        reply = self._solution.ask(get=self._solution.encode(self), name=name)
        return self._solution.value_of(reply)

    def __setattr__(self, name: str, value: Any) -> None:
        self._solution.ask(set=self._solution.encode(self), name=name, value=self._solution.encode(value))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._solution.call(self._solution.encode(self), arguments, keywords)


def _link_of(value: Any) -> Link | None:
    return object.__getattribute__(value, "_link") if isinstance(value, Remote) else None


class Unknown:
    """An answer that is not there yet: any use of it succeeds, so that the tests go on to their next call.

    Only a remote sandbox answers so, in a first run whose verdict is thrown away (see `rewards.code_remote`).
    """

    def _itself(self, *arguments: Any, **keywords: Any) -> Unknown:
        return self

    def _true(self, *arguments: Any) -> bool:
        return True

    def _zero(self, *arguments: Any) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())

    def __float__(self) -> float:
        return 0.0

    __call__ = __getattr__ = __getitem__ = __neg__ = __abs__ = __round__ = _itself
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _itself
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __and__ = __or__ = __xor__ = _itself
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = _true  # type: ignore[assignment]
    __len__ = __int__ = __index__ = __hash__ = _zero
