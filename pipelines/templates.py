"""Prompt templates: how a question becomes the text that the model continues.

prompt = TEMPLATES["r1"].format("What is 2 + 2?")
prompt = TEMPLATES["r1"].format("What is 2 + 2?", [Example("1 + 1?", " <think> ... </answer>")])
"""

from collections.abc import Sequence
from dataclasses import dataclass

R1_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
"""The instruction of DeepSeek-R1-Zero (arXiv:2501.12948, table 1)."""


@dataclass(frozen=True)
class Example:
    """A worked example for few-shot prompts."""

    question: str
    completion: str
    """What stands behind the template's end, in the form that the task's rewards judge right."""


@dataclass(frozen=True)
class Template:
    """A constant opening, then what stands before and after the question."""

    preamble: str
    before: str
    after: str

    def format(self, question: str, examples: Sequence[Example] = ()) -> str:
        """The prompt; worked examples stand before the question in the same form, a blank line behind each."""
        shown = "".join(f"{self.before}{one.question}{self.after}{one.completion}\n\n" for one in examples)
        return f"{self.preamble}{shown}{self.before}{question}{self.after}"

    @property
    def chat_template(self) -> str:
        """The same for whole conversations, in Jinja, as tokenizers keep it: a question of the user gives `format`'s
        text, an answer stands behind it with one space and is closed by end-of-text."""
        return _CHAT_TEMPLATE.format(preamble=repr(self.preamble), before=repr(self.before), after=repr(self.after))


_CHAT_TEMPLATE = (
    "{{{{- {preamble} }}}}"
    "{{%- for message in messages %}}"
    "{{%- if message.role == 'user' %}}{{{{- {before} + message.content }}}}"
    "{{%- elif message.role == 'assistant' %}}{{{{- {after} }}}}"
    "{{%- generation %}}{{{{- (' ' if message.content[:1] not in ' \\n' else '') + message.content + eos_token }}}}"
    "{{%- endgeneration %}}"
    "{{%- else %}}{{{{- raise_exception('only the roles user and assistant are known, got ' + message.role) }}}}"
    "{{%- endif %}}"
    "{{%- endfor %}}"
    "{{%- if add_generation_prompt %}}{{{{- {after} }}}}{{%- endif %}}"
)

TEMPLATES = {
    "r1": Template(R1_PREAMBLE, " User: ", " Assistant:"),
    "plain": Template("", "Question: ", "\nAnswer:"),
    "none": Template("", "", ""),
}
CHAT = "chat"
"""In place of a template: the tokenizer's chat template, see prompting.py."""


def check_template(name: str) -> None:
    """Raises ValueError for a name that is neither a template's nor `chat`."""
    if name not in (*TEMPLATES, CHAT):
        known = ", ".join((*sorted(TEMPLATES), CHAT))
        raise ValueError(f"unknown template {name!r}; known: {known} (the tokenizer's chat template)")


def get_template(name: str) -> Template:
    """Raises ValueError for a name that is no template's; `chat` is none, as it takes a tokenizer."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
