r"""Reading a whole answer: expressions with relations, lists, sets, intervals and matrices around them.

This file decides what commas, brackets and connectors mean; expressions are read by math_terms.py. Nothing is
evaluated here. What is not read raises `Refused` with the reason; a bare word becomes a text node.

Usage: `parse(r"\{1, 2\}")` gives a set node with two numbers.
"""

import re
from functools import lru_cache

from rewards.math_nodes import INFINITY, Node, Refused
from rewards.math_terms import TermParser
from rewards.math_text import MAX_CHARS, clean, has_control_characters, words
from rewards.math_tokens import tokenize

_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",), "<(": (")>",)}
_MATRICES = ("pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array")
_ALIGNED = ("cases", "aligned", "gathered")
_SET_OPERATORS = ("union", "inter", "minus")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_BRACKETED_COMMA = re.compile(r"[(\[{][^()\[\]{}]*,")
_GLUED_JOIN = re.compile(r"(?<=[0-9)\]}])(or|and)(?=[A-Za-z(0-9\\{-])")
_PHRASE = re.compile(r"[A-Za-z' -]+")
_LONG_WORD = re.compile(r"(?<![A-Za-z])(?!(?:and|sin|cos|tan|log|sec|csc|cot)(?![a-z]))[A-Za-z]{3,}")
_CALL = re.compile(r"(?<![A-Za-z\\])(?:([fghFGHPQ])|\\([Pp]hi|[Pp]si))'*\s*\(")
_NAMED_SETS = {"allrealnumbers": "R", "realnumbers": "R", "allreals": "R", "allintegers": "Z", "integers": "Z"}
_EMPTY = frozenset(("emptyset", "nosolution", "nosolutions", "norealsolution", "norealsolutions", "none"))


class AnswerParser(TermParser):
    """A `TermParser` that also reads what may stand around expressions."""

    def answer(self) -> Node:
        """Everything up to the end of the text."""
        while self.token.kind == "rel" and self.token.text in ("=", "~"):
            self.position += 1
        node = self.infix(self.items("end"), "end")
        if self.token.kind != "end":
            self.refuse("the end expected")
        return node

    def items(self, *closers: str, first: Node | None = None) -> Node:
        """Items separated by commas, semicolons, and, or; what they make together depends on the separators."""
        groups: list[list[Node]] = [[]]
        joins: set[str] = set()
        while first is not None or not (self.token.kind == "end" or self.is_op(*closers)):
            groups[-1].append(first or self.relation())
            first = None
            separated = False
            while self.token.kind == "join" or self.is_op(",", ";", "&", "..."):
                token = self.advance()
                if token.text == "...":
                    self.refuse("an unfinished list")
                if token.text == ";":
                    groups.append([])
                joins.add(token.text)
                separated = True
            if not separated:
                break
        groups = [group for group in groups if group]
        if not groups:
            self.refuse("an expression expected")
        if len(groups) > 1 and "," in joins and any(len(group) > 1 for group in groups):
            return Node("list", tuple(Node("tuple", tuple(group), "()") for group in groups))
        parts = [node for group in groups for node in group]
        if len(parts) == 1:
            return parts[0]
        if joins in ({"and"}, {"or"}) and all(_is_condition(part) for part in parts):
            return Node(joins.pop(), tuple(parts))
        return Node("list", tuple(part for node in parts for part in (node.args if node.kind == "list" else (node,))))

    def relation(self) -> Node:
        """Members joined by =, <, \\in and so on; a leading or trailing comparison sign is refused."""
        members, operators = [self.sets()], []
        while self.token.kind == "rel":
            operators.append(self.advance().text)
            members.append(self.sets())
        return Node("rel", tuple(members), tuple(operators)) if operators else members[0]

    def sets(self) -> Node:
        """Ratios joined by \\cup, \\cap and \\setminus, from the left."""
        node = self.ratio()
        while self.is_op(*_SET_OPERATORS):
            operator = self.advance().text
            node = Node(operator, (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        if self.token.kind == "word":
            return self.phrase()
        parts = [self.sum()]
        while self.is_op(":") and not self.bars_closed:
            self.advance()
            parts.append(self.sum())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def phrase(self) -> Node:
        """Words where an expression could stand: a name before `=`, or a whole answer of words."""
        pieces = [self.advance().text]
        if self.is_op("_") and pieces[0].isalnum():
            return self.based(pieces[0])
        while self.token.kind in ("word", "name"):
            pieces.append(self.advance().text)
        plain = words(" ".join(pieces))
        squeezed = plain.replace(" ", "")
        if squeezed in _EMPTY:
            return Node("set", ())
        if squeezed in ("infinity", "infinite"):
            return INFINITY
        if squeezed in _NAMED_SETS:
            return Node("const", (), _NAMED_SETS[squeezed])
        return Node("text", (), plain)

    def bracketed(self) -> Node:
        self.deeper()
        before, self.bars_closed = self.bars_closed, False
        token = self.advance()
        if token.kind == "field":
            node = self.field(token.text)
        elif token.kind == "begin":
            node = self.matrix(token.text)
        else:
            node = self.brackets(token.text)
        self.bars_closed = before
        self.depth -= 1
        return node

    def field(self, name: str) -> Node:
        if name not in ("R", "Z", "N", "Q", "C"):
            return Node("sym", (), name)
        if self.is_op("^"):
            self.advance()
            if not self.accept("+", "*", "-"):
                self.group_or_token()
            return Node("sym", (), f"part of {name}")
        return Node("const", (), name)

    def brackets(self, opener: str) -> Node:
        closers = _CLOSERS[opener]
        if opener == "\\{":
            if self.accept("\\}"):
                return Node("set", ())
            return self.braces()
        node = self.infix(self.items(*closers), *closers)
        closer = self.token.text
        if not self.accept(*closers):
            self.refuse(f"{closers[0]!r} expected")
        if opener == "{":
            return Node("set", node.args) if node.kind == "list" else node
        shape = ("(" if opener == "<(" else opener) + (")" if opener == "<(" else closer)
        if node.kind == "list":
            return _rows(node, shape) or Node("tuple", node.args, shape)
        if node.kind in ("rel", "and", "or", "tuple", "text"):
            return node if opener in "([" else Node("tuple", (node,), shape)
        return node if shape in ("()", "[]") else Node("tuple", (node,), shape)

    def infix(self, left: Node, *closers: str) -> Node:
        """Read `a \\over b` and `n \\choose k`, which split the group they stand in."""
        if self.token.kind != "command" or self.token.text not in ("choose", "over"):
            return left
        is_fraction = self.advance().text == "over"
        parts = (left, self.items(*closers))
        return Node("div", parts) if is_fraction else Node("func", parts, "binom")

    def braces(self) -> Node:
        """A set by its elements, or by a condition behind a bar or colon."""
        self.bars_closed = True
        first = self.relation()
        if self.accept("|", ":"):
            self.bars_closed = False
            condition = self.items("\\}")
            self.expect("\\}")
            if first.kind == "rel" and first.value == ("in",):
                first = first.args[0]
            if condition.kind == "list":
                condition = Node("and", condition.args)
            return Node("setof", (first, condition))
        self.bars_closed = False
        node = self.items("\\}", first=first)
        self.expect("\\}")
        return Node("set", node.args if node.kind == "list" else (node,))

    def matrix(self, environment: str) -> Node:
        if environment not in _MATRICES and environment not in _ALIGNED:
            self.refuse(f"the environment {environment} is not read,")
        rows: list[list[Node]] = [[]]
        while self.token.kind != "end":
            if self.token.kind == "command" and self.token.text in ("hline", "cline"):
                self.advance()
            rows[-1].append(self.relation())
            if self.accept("\\\\"):
                rows.append([])
            elif not self.accept("&"):
                break
            if self.token.kind not in ("name", "num", "func", "command", "op", "begin"):
                break
        if self.token.kind != "end" or self.token.text != environment:
            self.refuse(f"the end of the {environment} expected")
        self.advance()
        rows = [row for row in rows if row]
        if environment in _ALIGNED:
            return self.aligned(environment, rows)
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            self.refuse("rows of one length expected")
        return Node("matrix", tuple(node for row in rows for node in row), (len(rows), len(rows[0])))

    def aligned(self, environment: str, rows: list[list[Node]]) -> Node:
        """A system of equations, one a row, as a list."""
        if any(len(row) != 1 for row in rows):
            self.refuse(f"columns of {environment}")
        return Node("list", tuple(row[0] for row in rows)) if len(rows) > 1 else rows[0][0]


def _rows(node: Node, shape: str) -> Node | None:
    """Read `[[1, 2], [3, 4]]` as a matrix."""
    rows = node.args
    same = all(row.kind == "tuple" and row.value == "[]" and len(row.args) == len(rows[0].args) for row in rows)
    if shape != "[]" or not same:
        return None
    return Node("matrix", tuple(entry for row in rows for entry in row.args), (len(rows), len(rows[0].args)))


def _is_condition(node: Node) -> bool:
    return node.kind == "rel" and any(operator in ("<", ">", "<=", ">=", "!=") for operator in node.value)


def called_names(text: str) -> frozenset[str]:
    """Names that stand before a parenthesis like functions: they are calls where gold and prediction both have them."""
    return frozenset(match[1] or match[2] for match in _CALL.finditer(text))


def has_thousands(text: str) -> bool:
    """Whether `text` has a comma that may separate thousands."""
    return _THOUSANDS.search(text) is not None


@lru_cache(maxsize=4096)
def parse(text: str, thousands: bool = True, calls: frozenset[str] = frozenset()) -> Node | Refused:
    """Read an answer; the reason as `Refused`, returned and not raised, where it is not one.

    With `thousands`, 1,234 is one number where commas cannot separate items of brackets.
    """
    if len(text) > MAX_CHARS:
        return Refused(f"longer than {MAX_CHARS} characters")
    if has_control_characters(text):
        return Refused("control characters")
    plain = _GLUED_JOIN.sub(r" \1 ", clean(text))
    if thousands and (not _BRACKETED_COMMA.search(plain) or ", " in plain):
        plain = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), plain)
    if _PHRASE.fullmatch(plain) and len(_LONG_WORD.findall(plain)) >= 2:
        plain = f"\\text{{{plain}}}"
    try:
        return AnswerParser(tokenize(plain), calls).answer()
    except Refused as reason:
        return Refused(str(reason))
    except RecursionError:
        return Refused("nested too deep")
