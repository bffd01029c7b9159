"""From data set rows to prompts, and from token ids back to text.

prompts = build_prompts(rows, task, tokenizer, max_tokens=2048, report=print)
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipelines.data import NumberedRow, load_rows
from pipelines.tasks import Example, Task
from pipelines.templates import CHAT, check_template, get_template
from rewards import Rubric, load_rubric
from rollout.sample import Prompt

_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Of a tokenizer that is what its tokenizer.json says, with nothing added by a class."""

_OTHER_SPLITS = 1 << 31


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Raises FileNotFoundError where the folder has no tokenizer, ValueError where it names no end-of-text token."""
    if not folder:
        raise ValueError("no model given: add --model with the folder of a Hugging Face checkpoint")
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: give the folder of a Hugging Face checkpoint")
    named = Path(folder) / "tokenizer_config.json"
    # For some architectures, Qwen2 for one, AutoTokenizer takes their own class whatever the file names, and that class
    # splits text its own way: a student of such an architecture would not have its teacher's tokenizer.
    is_plain = named.is_file() and json.loads(named.read_text()).get("tokenizer_class") in _PLAIN_CLASSES
    tokenizer = (PreTrainedTokenizerFast if is_plain else AutoTokenizer).from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Token ids of several completions -> texts, without special tokens."""

    def decode(batch: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode([list(ids) for ids in batch], skip_special_tokens=True)

    return decode


def task_rows(
    task: Task, data: str | None, *, split: str, count: int, seed: int, max_bad_share: float,
    report: Callable[[str], None],
) -> list[NumberedRow]:  # fmt: skip
    """Rows as the task prepares them: from `data`, or generated (`count` of them, from `seed`), or from the task's own
    hub id, in this order.

    A positive `count` also limits how many rows of a data set are kept. Rows that are generated for another split than
    `train` come from another seed, so that an evaluation does not get the problems that were trained on.
    """
    if data is None and task.make_rows is not None:
        made = task.make_rows(count, seed if split == "train" else seed + _OTHER_SPLITS)
        return [NumberedRow(number=i, row=row) for i, row in enumerate(made, 1)]
    source = data or task.default_data
    if source is None:
        raise ValueError(f"task {task.name} needs --data: a file or a hub id")
    rows = load_rows(source, split=split, check=task.check, max_bad_share=max_bad_share, report=report)
    kept = rows[:count] if count else rows
    return [NumberedRow(number=row.number, row=task.prepare(row.row)) for row in kept]


def shown_examples(task: Task, shots: int) -> tuple[Example, ...]:
    """The first `shots` worked examples of the task. Raises ValueError if it has fewer."""
    if not 0 <= shots <= len(task.examples):
        raise ValueError(f"shots={shots}: task {task.name} has {len(task.examples)} worked examples; ask for as many")
    return task.examples[:shots]


def format_prompts(
    questions: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example] = ()
) -> list[str]:
    """The exact texts that the model continues. With the template `chat`, questions are user turns and examples earlier
    exchanges, as the tokenizer's chat template writes them. Raises ValueError where the tokenizer has none.
    """
    check_template(template)
    if template != CHAT:
        return [get_template(template).format(question, examples) for question in questions]
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; choose another --template")
    shown = [
        {"role": role, "content": text}
        for one in examples
        for role, text in (("user", one.question), ("assistant", one.completion.strip()))
    ]
    return [
        str(
            tokenizer.apply_chat_template(
                [*shown, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]


def build_prompts(
    rows: Sequence[NumberedRow], task: Task, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int,
    report: Callable[[str], None], prefill: str = "", template: str = "", shots: int = 0,
) -> list[Prompt]:  # fmt: skip
    """One prompt per row, in order; `prefill` is forced on the model as the beginning of its answer.

    `template` is the task's own if it is empty; `shots` worked examples of the task stand before the question. Prompts
    longer than `max_tokens` are dropped and counted in a report. Raises ValueError if none is left.
    """
    questions = [task.question(row.row) for row in rows]
    examples = shown_examples(task, shots)
    texts = [text + prefill for text in format_prompts(questions, template or task.template, tokenizer, examples)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt(id=f"{task.name}-{row.number}", text=text, token_ids=list(token_ids), prefill=prefill, row=row.row)
        for row, text, token_ids in zip(rows, texts, ids, strict=True)
    ]
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if len(fitting) < len(prompts):
        report(f"{len(prompts) - len(fitting)} of {len(prompts)} prompts are longer than {max_tokens} tokens: left out")
    if not fitting:
        raise ValueError(f"no prompt fits into {max_tokens} tokens; raise engine.max_model_len")
    return fitting


def build_rubric(specs: Sequence[str], task: Task) -> Rubric:
    """The rewards named by the user, or the task's own."""
    return load_rubric(specs or task.rewards)
