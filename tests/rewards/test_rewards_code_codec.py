"""Plain data across the wall: what arrives equals what left, what is no plain data arrives as something that is not."""

import os
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from rewards import code_codec
from rewards.code_codec import Decoder, Encoder, Link, dumps, loads


def there_and_back(value: Any) -> Any:
    return Decoder().decode(loads(dumps(Encoder().encode(value))))


VALUES = [
    None, True, False, 0, -1, 2**53, -(2**53), 10**400, 0.1, -0.0, 1e308, "", "a\0b\n\"\\",
    "\u00e9\u4e2d\U0001f600", "\ud800",
    [], [1, [2, [3]]], (), (1,), (1, (2,)), {}, {"a": 1, 2: (3,), None: []}, {(1, 2): "x"}, set(),
    {1, 2}, frozenset({1}),
    {frozenset({1}): {2}}, 1 + 2j, b"\0\xff", deque([1, 2]), Decimal("0.10"), Fraction(-1, 3), int, str, ValueError,
    {"t": 1}, {"o": [0]}, [{"r": [1, "x"]}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_arrive_equal_and_of_the_same_type(value: Any):
    arrived = there_and_back(value)
    assert arrived == value
    assert type(arrived) is type(value)
    assert repr(arrived) == repr(value)


def test_infinities_arrive_and_nan_stays_unequal():
    assert there_and_back([float("inf"), float("-inf")]) == [float("inf"), float("-inf")]
    assert there_and_back(float("nan")) != there_and_back(float("nan"))


class EqualToAll:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Int(EqualToAll, int):
    pass


class Str(EqualToAll, str):
    def __str__(self) -> str:
        return "other"


class List(EqualToAll, list):
    def __iter__(self) -> Any:
        return iter([9])


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Int(7), 7),
        (Str("x"), "x"),
        (List([1]), [1]),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
    ],
)
def test_subclasses_arrive_as_their_base_type(value: Any, plain: Any):
    arrived = there_and_back(value)
    assert type(arrived) is type(plain)
    assert arrived == plain and repr(arrived) == repr(plain)


def test_iterators_arrive_as_iterators():
    for value in (iter([1, 2]), (x for x in (1, 2)), range(1, 3), {1: 0, 2: 0}.keys()):
        assert list(there_and_back(value)) == [1, 2]


def test_other_objects_arrive_as_links_that_equal_nothing():
    arrived = there_and_back([EqualToAll()])
    assert type(arrived[0]) is Link
    assert arrived != [1]


def test_shared_classes_arrive_as_objects_cycles_included():
    class Node:
        def __init__(self, value: int, rest: Any) -> None:
            self.value, self.rest = value, rest

    chain: Any = None
    for value in range(5000):  # deeper than any recursion limit allows
        chain = Node(value, chain)
    wire = loads(dumps(Encoder(["Node"]).encode(chain)))
    arrived, values = Decoder({"Node": Node}).decode(wire), []
    while arrived:
        values.append(arrived.value)
        arrived = arrived.rest
    assert values == list(range(4999, -1, -1))

    loop = Node(1, None)
    loop.rest = loop
    arrived = Decoder({"Node": Node}).decode(Encoder(["Node"]).encode(loop))
    assert arrived.rest is arrived


def test_bounds_of_depth_and_length():
    deep: list[Any] = []
    for _ in range(code_codec.MAX_DEPTH + 2):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        Encoder().encode(deep)
    with pytest.raises(ValueError, match="items"):
        Encoder().encode(iter(range(code_codec.MAX_ITERATOR_ITEMS + 1)))


@pytest.mark.parametrize(
    "wire",
    [
        None, 5, [], [1], [1, 2, 3], [{"x": 1}, []], [{"i": "zz"}, []], [{"i": 1, "t": 2}, []], [{"o": 0}, []],
        [{"o": "x"}, []], [{"s": [[]]}, []], [{"d": [1]}, []], [{"b": "0"}, []], [{"F": ["0x1", "0x0"]}, []],
        [{"D": "x"}, []], [{"y": "print"}, []], [{"y": "nothing"}, []], [1, [["Missing", {}]]],
        [1, [["int", {"a": 1}]]],
    ],
    ids=repr,
)  # fmt: skip
def test_malformed_values_raise_what_the_tests_side_catches(wire: Any):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError, RecursionError, ArithmeticError, AttributeError)):
        Decoder().decode(wire)


def test_attributes_cannot_reach_the_class():
    class Node:
        pass

    with pytest.raises(ValueError, match="attribute"):
        Decoder({"Node": Node}).decode([{"o": 0}, [["Node", {"__class__": {"y": "int"}}]]])


def test_frames_are_bounded_both_ways(monkeypatch: pytest.MonkeyPatch):
    read_fd, write_fd = os.pipe()
    code_codec.send(write_fd, {"a": [1, "x"]})
    assert code_codec.receive(read_fd) == {"a": [1, "x"]}
    monkeypatch.setattr(code_codec, "MAX_FRAME_BYTES", 10)
    with pytest.raises(ValueError, match="over the limit"):
        code_codec.send(write_fd, "x" * 20)
    os.write(write_fd, (1 << 31).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="over the limit"):
        code_codec.receive(read_fd)
    os.close(write_fd)
    with pytest.raises(EOFError):
        code_codec.receive(read_fd)
    os.close(read_fd)
