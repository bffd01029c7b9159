"""Prompt templates: how a question becomes the text that the model continues.

prompt = TEMPLATES["r1"].format("What is 2 + 2?")
"""

from dataclasses import dataclass

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
"""The instruction of DeepSeek-R1-Zero (arXiv:2501.12948, table 1)."""


@dataclass(frozen=True)
class Template:
    """A constant opening, then what stands before and after the question."""

    preamble: str
    before: str
    after: str

    def format(self, question: str) -> str:
        return f"{self.preamble}{self.before}{question}{self.after}"


TEMPLATES = {
    "r1": Template(R1_PREAMBLE, " User: ", " Assistant:"),
    "plain": Template("", "Question: ", "\nAnswer:"),
}


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
