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
}


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
