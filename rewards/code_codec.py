"""Plain data between the tests and the solution: tagged JSON in length-prefixed frames.

Runs on both sides of the wall, so it imports nothing of this project, and neither `json` nor `typing`, each of which
costs more than the interpreter's start. JSON values stand for themselves; everything else is an object with one key,
its tag.

Covered: numbers, text, bytes, the built-in containers and types, deque, Decimal, Fraction. Subclasses arrive as their
base type, so an int whose `__eq__` says yes to everything arrives as an int. Objects of classes that both sides know
(those of the task's own prelude, TreeNode for example) arrive as new objects with plain attributes, cycles included.
Any other object arrives as a reference that equals nothing. Frames, depth and the length of iterators are bounded.
Not covered: aliasing (a list that holds another twice arrives as two), functions, object identity.

Usage: `send(fd, Encoder().encode(value))`, `Decoder().decode(receive(fd))`.
"""

from __future__ import annotations

import builtins
import os
from _collections import deque  # type: ignore[import-not-found]  # `collections` without its Python half

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable
    from typing import Any

MAX_FRAME_BYTES = 16 << 20
MAX_DEPTH = 150
MAX_ITERATOR_ITEMS = 200_000
_MAX_JSON_INT = 1 << 53
_BASES = (bool, int, float, str, list, tuple, dict, set, frozenset, complex, bytes, bytearray, deque)
_BASE_TYPES = frozenset(_BASES)
_VIEWS = (range, type({}.keys()), type({}.values()), type({}.items()))

try:
    import _json

    class _Options:
        """What `_json.make_scanner` asks of a decoder."""

        strict = False
        object_hook = object_pairs_hook = None
        parse_float, parse_int, parse_constant = float, int, float

    def _refuse(value: object) -> None:
        raise TypeError(f"not JSON: {type(value).__name__}")

    _scan: Callable[[str, int], tuple[Any, int]] = _json.make_scanner(_Options)  # type: ignore[arg-type]
    _quote = _json.encode_basestring_ascii
    _write = _json.make_encoder(None, _refuse, _quote, None, ":", ",", False, False, True)

    def dumps(value: object) -> str:
        """Wire form as ASCII text."""
        return "".join(_write(value, 0))

    def loads(text: str) -> Any:
        """The way back; ValueError for what is no JSON."""
        try:
            return _scan(text, 0)[0]
        except StopIteration as error:
            raise ValueError(f"not JSON at {error.value}") from None

    assert loads(dumps(["x", 1, 2.5, None])) == ["x", 1, 2.5, None]
except (ImportError, AttributeError, TypeError):  # another Python keeps these elsewhere
    from json import dumps, loads  # type: ignore[assignment]


class Link:
    """An object that stays on the other side: its number there (-1 if it was not kept) and the name of its type."""

    __slots__ = ("handle", "type_name")

    def __init__(self, handle: int, type_name: str) -> None:
        self.handle = handle
        self.type_name = type_name


class Encoder:
    """Turns one value into wire form; `classes` travel as data, `keep` turns what remains into a `Link` or None."""

    def __init__(
        self, classes: Iterable[str] = (), keep: Callable[[Any], Link | None] = lambda value: Link(-1, "object")
    ) -> None:
        self._classes = frozenset(classes)
        self._keep = keep
        self._numbers: dict[int, int] = {}
        self._objects: list[Any] = []

    def encode(self, value: Any) -> list[Any]:
        """Return [wire form of the value, [[class name, attributes], ...]]."""
        encoded = self._plain(value, 0)
        attributes: list[Any] = []
        for thing in self._objects:  # grows while attributes name further objects
            state = {str(name): self._plain(item, 1) for name, item in _state(thing).items()}
            attributes.append([type(thing).__name__, state])
        return [encoded, attributes]

    def _plain(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is float or kind is str:
            return value
        if kind is int:
            return value if -_MAX_JSON_INT < value < _MAX_JSON_INT else {"i": hex(value)}
        if depth > MAX_DEPTH:
            raise ValueError(f"a value is nested deeper than {MAX_DEPTH} levels")
        if kind not in _BASE_TYPES:
            return self._other(value, kind, depth)
        depth += 1
        if kind is list:
            return [self._plain(item, depth) for item in value]
        if kind is tuple:
            return {"t": [self._plain(item, depth) for item in value]}
        if kind is dict:
            return {"d": [[self._plain(key, depth), self._plain(item, depth)] for key, item in value.items()]}
        if kind is set or kind is frozenset:
            return {"s" if kind is set else "z": [self._plain(item, depth) for item in value]}
        if kind is complex:
            return {"c": [value.real, value.imag]}
        if kind is deque:
            return {"q": [self._plain(item, depth) for item in value]}
        return {"b": value.hex()}

    def _other(self, value: Any, kind: type, depth: int) -> Any:
        if kind.__name__ in self._classes:
            if id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._objects)
                self._objects.append(value)
            return {"o": self._numbers[id(value)]}
        for base in _BASES:
            if base in kind.__mro__:
                return self._plain(_flat(value, base), depth + 1)
        if hasattr(kind, "__next__") or kind in _VIEWS:
            items = []
            for item in value:
                items.append(self._plain(item, depth + 1))
                if len(items) > MAX_ITERATOR_ITEMS:
                    raise ValueError(f"an iterator gave more than {MAX_ITERATOR_ITEMS} items")
            return {"g": items}
        module = kind.__module__
        if module == "decimal" and kind.__name__ == "Decimal":
            return {"D": str(value)}
        if module == "fractions" and kind.__name__ == "Fraction":
            return {"F": [hex(value.numerator), hex(value.denominator)]}
        if module == "numpy":
            return self._plain(value.tolist(), depth + 1)
        if kind is type and module == "builtins" and getattr(builtins, value.__name__, None) is value:
            return {"y": value.__name__}
        link = self._keep(value)
        if link is None:
            raise TypeError(f"a {kind.__name__} cannot be sent to the solution, only plain data can")
        return {"r": [link.handle, link.type_name[:80]]}


def _flat(value: Any, base: type) -> Any:
    """The content of a subclass instance as its base type, past any method the subclass overrides."""
    if base is int:
        return int.__add__(value, 0)
    if base is float:
        return float.__add__(value, 0.0)
    if base is str:
        return "".join(str.__iter__(value))
    if base is complex:
        return complex.__add__(value, 0)
    if base is dict:
        return dict(dict.items(value))
    return base(base.__iter__(value))  # type: ignore[attr-defined]


def _state(thing: Any) -> dict[str, Any]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | getattr(thing, "__dict__", {})


class Decoder:
    """The way back; `classes` are those that arrive as objects, `fetch` turns a `Link` into what stands for it."""

    def __init__(
        self, classes: dict[str, type] | None = None, fetch: Callable[[Link], Any] = lambda link: link
    ) -> None:
        self._classes = classes or {}
        self._fetch = fetch
        self._objects: list[Any] = []

    def decode(self, wire: Any) -> Any:
        """Return the value; ValueError, TypeError, KeyError, RecursionError or OverflowError if it is malformed."""
        value, attributes = wire
        self._objects = [object.__new__(self._classes[name]) for name, _ in attributes]
        for thing, (_, state) in zip(self._objects, attributes, strict=True):
            for name, item in state.items():
                if name.startswith("__"):
                    raise ValueError(f"an attribute named {name[:80]}")
                object.__setattr__(thing, name, self._plain(item))
        return self._plain(value)

    def _plain(self, wire: Any) -> Any:
        if isinstance(wire, list):
            return [self._plain(item) for item in wire]
        if not isinstance(wire, dict):
            return wire
        ((tag, content),) = wire.items()
        if tag == "i":
            return int(content, 16)
        if tag == "d":
            return {self._plain(key): self._plain(item) for key, item in content}
        if tag == "o":
            return self._objects[content]
        if tag == "r":
            return self._fetch(Link(int(content[0]), str(content[1])))
        if tag == "c":
            return complex(float(content[0]), float(content[1]))
        if tag == "b":
            return bytes.fromhex(content)
        if tag == "y":
            kind = getattr(builtins, content)
            if not isinstance(kind, type):
                raise TypeError(f"{content[:80]} is no type")
            return kind
        if tag == "D":
            from decimal import Decimal  # rare, and costs a program's start 5 ms

            return Decimal(content)
        if tag == "F":
            from fractions import Fraction

            return Fraction(int(content[0], 16), int(content[1], 16))
        make = {"t": tuple, "s": set, "z": frozenset, "q": deque, "g": iter}[tag]
        return make([self._plain(item) for item in content])


def send(fd: int, message: Any) -> None:
    """Write one frame; ValueError if it is too large."""
    payload = dumps(message).encode("ascii")
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    view = memoryview(len(payload).to_bytes(4, "big") + payload)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> Any:
    """Read one frame; EOFError at the end, ValueError or RecursionError for what is no message."""
    num_bytes = int.from_bytes(_read(fd, 4), "big")
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
    return loads(_read(fd, num_bytes).decode("ascii"))


def _read(fd: int, num_bytes: int) -> bytes:
    chunks: list[bytes] = []
    while num_bytes:
        chunk = os.read(fd, min(num_bytes, 1 << 20))
        if not chunk:
            raise EOFError("the other side ended")
        chunks.append(chunk)
        num_bytes -= len(chunk)
    return b"".join(chunks)
