"""The prompts of an evaluation: those that can be answered, and those that leave no room for an answer."""

import sys
from dataclasses import dataclass

from pipelines.console import console
from pipelines.evaluation.config import EvalConfig
from pipelines.prompting import build_prompts, load_tokenizer, shown_examples, task_rows
from pipelines.tasks import Task
from pipelines.templates import get_template
from rollout.sample import Prompt


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What is asked."""

    task: Task
    fitting: list[Prompt]
    too_long: list[Prompt]
    """Those that leave no room for a completion of full length."""
    room: int
    """Longest prompt in tokens; of a server it is not known."""

    @property
    def prompts(self) -> list[Prompt]:
        return self.fitting + self.too_long


def read_problems(config: EvalConfig, task: Task) -> Problems:
    tokenizer = None if config.server else load_tokenizer(config.model)  # a wrong folder is told before data is read
    rows = task_rows(
        task, config.data, split=config.split, count=config.limit, seed=config.seed,
        max_bad_share=config.max_bad_share, report=console.print,
    )  # fmt: skip
    if tokenizer is None:
        template, examples = get_template(config.template or task.template), shown_examples(task, config.shots)
        questions = [(f"{task.name}-{row.number}", task.question(row.row), row.row) for row in rows]
        prompts = [
            Prompt(
                id=name,
                text=text if config.server_api == "chat" else template.format(text, examples),
                token_ids=[],
                row=row,
            )
            for name, text, row in questions
        ]
        return Problems(task=task, fitting=prompts, too_long=[], room=0)
    prompts = build_prompts(
        rows, task, tokenizer, max_tokens=sys.maxsize, report=console.print,
        template=config.template, shots=config.shots,
    )  # fmt: skip
    room = config.engine.max_model_len - config.tokens_per_completion
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= room]
    if not fitting:
        raise ValueError(
            f"no prompt leaves room for max_tokens={config.tokens_per_completion} within engine.max_model_len="
            f"{config.engine.max_model_len}; lower the first or raise the second"
        )
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > room]
    if too_long:
        console.print(
            f"{len(too_long)} of {len(prompts)} prompts are longer than {room} tokens and are not evaluated; raise "
            "engine.max_model_len or lower max_tokens",
            style="bold red", soft_wrap=True,
        )  # fmt: skip
    return Problems(task=task, fitting=fitting, too_long=too_long, room=room)
