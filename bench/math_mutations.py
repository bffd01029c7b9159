"""Answers made from other answers: perturbed golds that are wrong, and hostile strings for fuzzing.

This file knows nothing of the grader. Usage: `perturbed(r"\\frac{1}{2}", random.Random(0))` gives `\\frac{2}{2}`, say.
"""

import random
import re

_NUMBER = re.compile(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d.]*\d)")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
_GRAMMAR = r"""
\frac \sqrt \sqrt[3] { } ( ) [ ] \{ \} | , ; : = < > \leq \cup \cap \pm + - * / ^ _ ! % ' & \\ 0 1 2 9 10 3.5 1e9 pi
0.\overline{3} x y e i \pi \infty \sin \log \log_ \sum_{k=1}^{n} \prod_{k=1}^{99} \binom \begin{pmatrix} \end{pmatrix}
\text{ \text{cm} \mathbb{R} \in ^\circ \boxed{ \bmod \lfloor \rfloor \left \right . and or $ 999999999 9^9^9 1000000!
\frac{1}{0} f(x) W A cm percent _5 \ldots
"""
_PIECES = _GRAMMAR.split()


def perturbed(gold: str, rng: random.Random) -> str | None:
    """A wrong answer close to `gold`: a number one higher, a sign changed, an item dropped, a letter changed."""
    makers = [_number_plus_one, _sign_changed, _item_dropped, _letter_changed, _bracket_changed]
    rng.shuffle(makers)
    for make in makers:
        wrong = make(gold, rng)
        if wrong is not None and wrong != gold:
            return wrong
    return None


def _number_plus_one(gold: str, rng: random.Random) -> str | None:
    matches = list(_NUMBER.finditer(gold))
    if not matches:
        return None
    match = rng.choice(matches)
    whole, dot, places = match.group().partition(".")
    changed = f"{whole}{dot}{int(places[:1] or 0) // 9}{places[1:]}7" if dot else str(int(whole) + 1)
    return gold[: match.start()] + changed + gold[match.end() :]


def _sign_changed(gold: str, rng: random.Random) -> str | None:
    if not re.fullmatch(r"-?[0-9.,]*[1-9][0-9.,]*|-?\\d?frac\{\d+\}\{\d+\}|-?\d+\\sqrt\{\d+\}", gold):
        return None
    return gold[1:] if gold.startswith("-") else f"-{gold}"


def _item_dropped(gold: str, rng: random.Random) -> str | None:
    if "\\begin" in gold or not re.search(r",\s|[)\]}],|\d,\d{1,2}(?!\d)", gold) or re.search(r"\d,\\?!?\d{3}", gold):
        return None
    place = gold.rindex(",")
    closer = re.search(r"\s*(?:\\right)?\s*(?:\\\}|[)\]])\s*$", gold[place:])
    return gold[:place] + (closer.group() if closer else "")


def _letter_changed(gold: str, rng: random.Random) -> str | None:
    hidden = _COMMAND.sub(lambda match: " " * len(match.group()), gold)
    places = [match.start() for match in re.finditer(r"[A-Za-z]", hidden)]
    if not places or "\\begin" in gold or "\\text" in gold or "\\mbox" in gold or "dfrac" in hidden:
        return None
    place = rng.choice(places)
    letter = rng.choice([letter for letter in "qvwzkuQVWZ" if letter.lower() != gold[place].lower()])
    return gold[:place] + letter + gold[place + 1 :]


def _bracket_changed(gold: str, rng: random.Random) -> str | None:
    for left, right in (("[", "("), ("(", "[")):
        if gold.startswith(left) and gold.count(",") == 1 and gold.endswith((")", "]")) and "\\infty" not in gold[:9]:
            return right + gold[1:]
    return None


def hostile(seeds: list[str], rng: random.Random) -> str:
    """A random or mutated answer: pieces of grammar, edits of a real answer, or noise."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choice(_PIECES) + rng.choice(("", "", " ")) for _ in range(rng.randrange(1, 30)))
    if kind == 1:
        piece = rng.choice(_PIECES)
        return piece * rng.randrange(1, 200) + rng.choice(seeds)
    text = list(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(text) + 1)
        edit = rng.randrange(4)
        if edit == 0:
            text[place:place] = rng.choice(_PIECES)
        elif edit == 1 and text:
            del text[place : place + rng.randrange(1, 4)]
        elif edit == 2:
            text[place:place] = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x2500), rng.randrange(0x11000))))
        else:
            text = text[place:] + text[:place]
    return "".join(text)
