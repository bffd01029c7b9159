"""From data set rows to prompts, and from token ids back to text.

prompts = build_prompts(rows, task, tokenizer, max_tokens=2048, report=print)
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipelines.data import NumberedRow, load_rows
from pipelines.tasks import Task
from pipelines.templates import get_template
from rewards import Rubric, load_rubric
from rollout.sample import Prompt


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Raises FileNotFoundError where the folder has no tokenizer, ValueError where it names no end-of-text token."""
    if not folder:
        raise ValueError("no model given: add --model with the folder of a Hugging Face checkpoint")
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: give the folder of a Hugging Face checkpoint")
    # Not AutoTokenizer: that takes the class of the model's type, Qwen2's say, which adds tokens and splits as it likes.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
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
    """Rows from `data`, or generated (`count` of them, from `seed`), or from the task's own hub id, in this order.

    A positive `count` also limits how many rows of a data set are kept.
    """
    if data is None and task.make_rows is not None:
        return [NumberedRow(number=i, row=row) for i, row in enumerate(task.make_rows(count, seed), 1)]
    source = data or task.default_data
    if source is None:
        raise ValueError(f"task {task.name} needs --data: a file or a hub id")
    rows = load_rows(source, split=split, check=task.check, max_bad_share=max_bad_share, report=report)
    return rows[:count] if count else rows


def build_prompts(
    rows: Sequence[NumberedRow], task: Task, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int,
    report: Callable[[str], None], prefill: str = "",
) -> list[Prompt]:  # fmt: skip
    """One prompt per row, in order; `prefill` is forced on the model as the beginning of its answer.

    Prompts longer than `max_tokens` are dropped and counted in a report. Raises ValueError if none is left.
    """
    template = get_template(task.template)
    texts = [template.format(task.question(row.row)) + prefill for row in rows]
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
