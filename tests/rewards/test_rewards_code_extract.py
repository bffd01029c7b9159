"""Where the program is found in a completion."""

import pytest

from rewards.code_extract import extract_code

F = "def f():\n    return 1\n"
G = "def f():\n    return 2\n"


def fence(code: str, language: str = "python", marks: str = "```") -> str:
    return f"{marks}{language}\n{code}{marks}\n"


@pytest.mark.parametrize(
    ("text", "code", "method"),
    [
        (f"Sure:\n{fence(F)}Done.", F, "fence"),
        (fence(F, ""), F, "fence"),
        (fence(F, "Python3 "), F, "fence"),
        (fence(F, "py", "~~~~"), F, "fence"),
        (fence(F) + fence(G), G, "fence"),
        (fence(F) + fence("f()\n"), F, "fence"),
        (fence(F) + fence("$ ls\n", "bash"), F, "fence"),
        (fence("int main() {}\n", "cpp"), "", "none"),
        (f"```python\n{F}", F, "open-fence"),
        (f"{fence(F)}and then\n```python\ndef f(", F, "fence"),
        ("no code here, only `f()`", "", "none"),
        ("", "", "none"),
        (fence('s = """\n  text\n"""\n' + F), 's = """\n  text\n"""\n' + F, "fence"),
        ("````python\nx = '```'\n```\n````\n", "x = '```'\n```\n", "fence"),
        ("```\n" * 3, "", "fence"),
    ],
)
def test_last_block_that_defines_the_entry_point_counts(text: str, code: str, method: str):
    found = extract_code(text, entry_point="f")
    assert (found.code.strip(), found.method if code else found.code.strip() or method) == (code.strip(), method)


def test_two_different_definitions_may_be_refused():
    assert extract_code(fence(F) + fence(G), entry_point="f", is_ambiguity_refused=True).method == "ambiguous"
    assert extract_code(fence(F) + fence(F), entry_point="f", is_ambiguity_refused=True).code == F
    assert extract_code(fence(F) + fence("f()\n"), entry_point="f", is_ambiguity_refused=True).code == F


def test_entry_point_may_be_a_method():
    solution = "class Solution:\n    def f(self): return 1\n"
    assert extract_code(fence(solution) + fence("x = 1\n"), entry_point="Solution().f").code == solution


def test_completion_style_continues_the_prompt_up_to_the_margin():
    prompt = "def f():\n"
    text = "    x = 1\n\n    return x\n\nprint(f())\nassert f() == 1\n"
    found = extract_code(text, style="completion", prompt=prompt)
    assert (found.code, found.method) == (prompt + "    x = 1\n\n    return x\n\n", "completion")
    assert extract_code(fence(F), style="completion", prompt=prompt).code == F


def test_long_hostile_text_takes_no_time():
    text = "```" * 200_000 + "\n" + "`" * 200_000 + "\n" + " " * 200_000 + "```\n" * 50_000
    extract_code(text, entry_point="f" * 1000)
