"""Rows of supervised fine-tuning as tokens, with a mark on those that the model is to say.

| row has | text before the completion | trained |
| --- | --- | --- |
| `prompt`, `completion` | the prompt as it stands; traces of `grpo sample` are such rows | completion, end-of-text |
| `question`, `completion` | the question in a prompt template | completion, end-of-text |
| `messages` | by the tokenizer's chat template | what the template puts behind "now the assistant" |

Prompt and completion are encoded apart, as in sampling, where the prompt is encoded before there is a completion.

    store, dropped = encode_rows(rows, get_template("r1"), tokenizer, max_length=2048)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipelines.data import Row
from pipelines.prompting import stop_token
from pipelines.templates import Template
from pipelines.token_store import TokenStore
from pipelines.tokenizer import encode_texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One sequence to be: texts that are given, each followed by one that is to be said."""

    turns: tuple[tuple[str, str], ...]
    """(given, said) pairs, end to end."""
    is_ended: bool
    """Whether the model is to stop behind the last of them."""


def check_row(row: Row) -> str | None:
    """None if the row has one of the three forms, else the reason why not."""
    if "messages" in row:
        return _check_messages(row["messages"])
    if not isinstance(row.get("completion"), str) or not row["completion"]:
        return "field 'completion' is missing or empty (nor are there 'messages')"
    if not any(isinstance(row.get(name), str) and row[name] for name in ("prompt", "question")):
        return "field 'prompt' or 'question' is missing or empty"
    return None


def _check_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        return "'messages' is no list of objects with texts 'role' and 'content'"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        return "'messages' has no assistant turn behind another one"
    if ("assistant", "assistant") in pairwise(roles):
        return "'messages' has two assistant turns in a row"
    return None


def conversations_of(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """What a row that `check_row` accepts gives: one sequence; of messages sometimes several. Raises ValueError if
    the chat template does not take the messages."""
    if "messages" in row:
        return _of_messages(row["messages"], tokenizer)
    prompt = row["prompt"] if row.get("prompt") else template.format(row["question"])
    # A trace that was cut off teaches no end.
    return [Conversation(turns=((prompt, row["completion"]),), is_ended=row.get("finish_reason") != "length")]


def _of_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """Each assistant turn behind exactly what the model is given when it is to speak. Turns share a sequence as long
    as the earlier text stays as it is; a template that, say, drops old thoughts begins another sequence."""

    def text(count: int, *, asks: bool) -> str:
        try:
            written = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        assert isinstance(written, str)
        return written

    sequences: list[list[tuple[str, str]]] = []
    so_far = ""
    for count, message in enumerate(messages):
        if message["role"] != "assistant" or count == 0:
            continue
        asked, answered = text(count, asks=True), text(count + 1, asks=False)
        if not answered.startswith(asked):
            raise ValueError(
                "the chat template writes an answer otherwise than behind its own generation prompt; give the rows as "
                "'prompt' and 'completion'"
            )
        if not sequences or not asked.startswith(so_far):
            sequences.append([])
            so_far = ""
        sequences[-1].append((asked[len(so_far) :], answered[len(asked) :]))
        so_far = answered
    return [Conversation(turns=tuple(turns), is_ended=True) for turns in sequences]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRows:
    """Rows as tokens."""

    store: TokenStore
    prompts: list[str]
    """What stands before the first said text of each sequence."""
    num_dropped: int
    """Sequences that were too long."""


def encode_rows(
    rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> EncodedRows:
    """All sequences of at most `max_length` tokens. Raises ValueError if none is left."""
    conversations = [conversation for row in rows for conversation in conversations_of(row, template, tokenizer)]
    texts = [text for conversation in conversations for turn in conversation.turns for text in turn]
    encoded = iter(encode_texts(tokenizer, texts))
    end = stop_token(tokenizer)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    prompts: list[str] = []
    for conversation in conversations:
        pairs = [(next(encoded), next(encoded)) for _ in conversation.turns]
        ids, mask = _join(pairs, end, is_ended=conversation.is_ended)
        if len(ids) <= max_length:
            kept.append((ids, mask))
            prompts.append(conversation.turns[0][0])
    if not kept:
        raise ValueError(f"all {len(conversations)} samples are longer than {max_length} tokens; raise max_length")
    return EncodedRows(store=TokenStore.of(kept), prompts=prompts, num_dropped=len(conversations) - len(kept))


def _join(pairs: list[tuple[np.ndarray, np.ndarray]], end: int, *, is_ended: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and marks on what is said, up to one end-of-text token a turn. What a chat template writes behind that
    token is not the model's; where it writes no such token, the last turn gets one."""
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    for number, (given, said) in enumerate(pairs, 1):
        ends = (said == end).nonzero()[0]
        if not len(ends) and is_ended and number == len(pairs):
            said = np.append(said, np.int32(end))
            ends = np.array([len(said) - 1])
        last = ends[0] if len(ends) else len(said) - 1
        ids += [given, said]
        mask += [np.zeros(len(given), np.bool_), np.arange(len(said)) <= last]
    return np.concatenate(ids), np.concatenate(mask)
