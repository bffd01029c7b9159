"""Rows of `grpo sft`: which tokens are trained, and which samples are held out.

Pinned: (1) the three forms of rows; prompt and completion encoded apart, one end-of-text token, none behind a trace
that was cut off; (2) ids and mask of a conversation are transformers' own `return_assistant_tokens_mask`, for our chat
template and for one in ChatML's form; (3) a template that drops old thoughts gives each turn what the model is asked
with; (4) our chat template writes what the prompt template writes; (5) no prompt is on both sides of the held-out
split.
"""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pipelines.data import Row
from pipelines.sft import SFTConfig, sample_stores
from pipelines.sft_data import check_row, encode_rows
from pipelines.templates import TEMPLATES, get_template
from pipelines.token_store import TokenStore
from pipelines.tokenizer import train_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THOUGHTLESS = (
    "{% for message in messages %}{% set text = message.content %}"
    "{% if message.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '[' + message.role + ']' + text + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think> 2 and 2 </think> <answer> 4 </answer>"},
    {"role": "user", "content": "And 4 + 4?"},
    {"role": "assistant", "content": "<think> twice that </think> <answer> 8 </answer>"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    text = " ".join(message["content"] for message in TALK)
    return train_tokenizer([text] * 5, 400, [])


def said(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The whole text of each sample, and the trained part of it."""
    spans = [slice(*store.starts[place : place + 2]) for place in range(len(store))]
    return [
        (str(tokenizer.decode(store.ids_W[span])), str(tokenizer.decode(store.ids_W[span][store.trained_W[span]])))
        for span in spans
    ]


def encoded(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> TokenStore:
    assert check_row(row) is None
    tokenizer.chat_template = chat_template
    return encode_rows([row], get_template("plain"), tokenizer, max_length=10_000).store


def test_prompts_and_questions(tokenizer: PreTrainedTokenizerBase) -> None:
    exact = said(encoded({"prompt": "2 + 2 =", "completion": " 4 now"}, tokenizer), tokenizer)
    assert exact == [("2 + 2 = 4 now<|end|>", " 4 now<|end|>")]
    asked = said(encoded({"question": "2 + 2?", "completion": " 4"}, tokenizer), tokenizer)
    assert asked == [("Question: 2 + 2?\nAnswer: 4<|end|>", " 4<|end|>")]
    cut = {"prompt": "2 + 2 =", "completion": " 4 no", "finish_reason": "length"}
    assert said(encoded(cut, tokenizer), tokenizer) == [("2 + 2 = 4 no", " 4 no")]


def test_prompt_and_completion_are_encoded_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """In sampling, the prompt is encoded before there is a completion: no token may reach over the seam."""
    row = {"prompt": "What is 2 + 2? twi", "completion": "ce that"}
    store = encoded(row, tokenizer)
    prompt, completion = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row)
    assert store.ids_W.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert store.trained_W.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert tokenizer("".join(row.values()), add_special_tokens=False)["input_ids"] != [*prompt, *completion]


@pytest.mark.parametrize("template", ["ours", "chatml"])
def test_a_conversation_is_masked_as_transformers_masks_it(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    store = encoded({"messages": TALK}, tokenizer, CHATML if template == "chatml" else TEMPLATES["r1"].chat_template)
    theirs: Any = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    if template == "chatml":  # behind the last end-of-text stands a line end, which the model is never to say
        assert said(store, tokenizer)[0][0].endswith("<|end|>\n")
    assert store.ids_W.tolist() == ids
    assert store.trained_W.tolist() == [bool(mark) for mark in mask]
    assert sum(mask) > 15 and said(store, tokenizer)[0][1].count("<|end|>") == 2


def test_a_template_that_drops_old_thoughts(tokenizer: PreTrainedTokenizerBase) -> None:
    """What the model is asked with at its second turn has no first thought: the turns are two samples."""
    first, second = said(encoded({"messages": TALK}, tokenizer, THOUGHTLESS), tokenizer)
    assert first[1] == TALK[1]["content"] + "<|end|>" and first[0].endswith("[assistant]" + first[1])
    assert second[1] == TALK[3]["content"] + "<|end|>"
    asked: Any = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert second[0] == asked + second[1] and "2 and 2" not in asked


def test_a_chat_template_without_end_of_text_gets_one(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    ((whole, trained),) = said(encoded({"messages": TALK[:2]}, tokenizer, bare), tokenizer)
    assert trained == TALK[1]["content"] + "\n<|end|>" and whole.endswith("a:" + trained)


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_kinds_of_template_write_the_same(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = get_template(name).chat_template
    question = "What's 'two' + {{2}}?\n"
    messages = [{"role": "user", "content": question}]
    prompt: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == get_template(name).format(question)
    messages.append({"role": "assistant", "content": " four"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + " four<|end|>"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"completion": "a"}, "field 'prompt' or 'question' is missing"),
        ({"messages": "hello"}, "no list of objects"),
        ({"messages": TALK[:1]}, "no assistant turn"),
        ({"messages": [TALK[0], TALK[1], TALK[1]]}, "two assistant turns in a row"),
    ],
)
def test_other_rows_are_refused(row: Row, reason: str) -> None:
    assert reason in (check_row(row) or "")


def test_the_split_goes_by_prompt_and_long_samples_are_left_out(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{i % 10} and", "completion": f" {i}"} for i in range(40)]
    rows.append({"prompt": "0 and", "completion": " 2" * 200})
    config = SFTConfig(data="d", out="o", model="m", heldout_share=0.3)
    training, heldout = (said(s, tokenizer) for s in sample_stores(rows, [], config, tokenizer, 100))
    assert "1 of 41 samples are longer than 100 tokens: left out" in capsys.readouterr().out
    assert len(heldout) == 12 and len(training) == 28
    assert not {whole[:5] for whole, _ in training} & {whole[:5] for whole, _ in heldout}
    other = sample_stores(rows, [], replace(config, seed=1), tokenizer, 100)[1]
    assert said(other, tokenizer) != heldout
    with pytest.raises(ValueError, match="all 41 samples are longer than 2 tokens; raise max_length"):
        sample_stores(rows, [], config, tokenizer, 2)
