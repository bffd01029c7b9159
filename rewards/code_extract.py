"""Finding the program in a completion. Text only: nothing is compiled or run here.

Covered: fenced blocks (three or more backticks or tildes) of python or of no named language; the last one counts, or
the last one that defines the entry point; completions of a prompt that ends inside a function (HumanEval, base models).
Not covered: indented code without a fence, notebooks, programs spread over several blocks.

Usage: `extract_code("Sure:\\n```python\\ndef f(): ...\\n```", entry_point="f").code`.
"""

import re
from dataclasses import dataclass
from typing import Literal

Style = Literal["chat", "completion"]

_LANGUAGES = frozenset(("", "python", "python3", "py", "py3", "python 3"))
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)")
_STOP_LINES = ("class ", "def ", "#", "@", "if ", "print(", "assert ", "```", "<|")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractedCode:
    """A program and where it came from."""

    code: str
    """The program; "" if there is none."""
    method: str
    """fence, open-fence (never closed), completion, or none and ambiguous for no program."""
    num_blocks: int = 0
    """Python blocks in the text."""


def extract_code(
    text: str, *, entry_point: str = "", is_ambiguity_refused: bool = False, style: Style = "chat", prompt: str = ""
) -> ExtractedCode:
    """Return the program in `text`.

    In style "completion", text without a fence continues `prompt`, up to the first line that starts something new at
    the margin. `is_ambiguity_refused`: two different blocks that define the entry point are no answer.
    """
    blocks, open_block = _fenced_blocks(text)
    if not blocks and open_block is not None:
        return ExtractedCode(code=open_block, method="open-fence", num_blocks=1)
    if not blocks:
        if style == "completion" and text.strip():
            return ExtractedCode(code=prompt + _until_margin(text), method="completion")
        return ExtractedCode(code="", method="none")
    defining = [block for block in blocks if _defines(block, entry_point)]
    if is_ambiguity_refused and len({block.strip() for block in defining}) > 1:
        return ExtractedCode(code="", method="ambiguous", num_blocks=len(blocks))
    return ExtractedCode(code=(defining or blocks)[-1], method="fence", num_blocks=len(blocks))


def _fenced_blocks(text: str) -> tuple[list[str], str | None]:
    """Closed python blocks in order, and the content of a block that the end of the text left open."""
    blocks: list[str] = []
    lines: list[str] = []
    fence = language = ""
    for line in text.splitlines():
        match = _FENCE.match(line)
        if not fence:
            if match:
                fence, language, lines = match[1], match[2].strip().lower(), []
        elif match and match[1].startswith(fence) and not match[2].strip():
            if language in _LANGUAGES:
                blocks.append("\n".join(lines) + "\n")
            fence = ""
        else:
            lines.append(line)
    is_open_python = bool(fence) and language in _LANGUAGES
    return blocks, "\n".join(lines) + "\n" if is_open_python else None


def _defines(block: str, entry_point: str) -> bool:
    name = entry_point.split("(")[0].split(".")[0].strip()
    return (
        bool(name)
        and re.search(rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", block, re.M) is not None
    )


def _until_margin(text: str) -> str:
    """The part of a completion that belongs to the function its prompt opened."""
    kept: list[str] = []
    for line in text.splitlines():
        if kept and any(line.startswith(stop) for stop in _STOP_LINES):
            break
        kept.append(line)
    return "\n".join(kept) + "\n"
