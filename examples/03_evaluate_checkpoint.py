"""Evaluation as a library: sample a checkpoint's answers to a task, print the accuracy and the first mistakes.

    python examples/03_evaluate_checkpoint.py runs/ledger-zero/model ledger
    python examples/03_evaluate_checkpoint.py runs/ledger-zero/model gsm8k test.jsonl

The command `grpo eval` does the same and writes files; this is for scripts that want the numbers.
"""

import sys

from pipelines.evaluate import EvalResult, evaluate
from pipelines.prompting import build_prompts, build_rubric, decoder, load_tokenizer, stop_token, task_rows
from pipelines.tasks import get_task
from rollout.engine import EngineConfig
from rollout.pool import build_pool
from rollout.sample import SamplingParams

NUM_PROBLEMS = 64


def evaluate_checkpoint(model: str, task_name: str, data: str | None) -> EvalResult:
    """Greedy answers to the first problems of `data`, or to generated ones where the task can make its own."""
    task = get_task(task_name)
    tokenizer = load_tokenizer(model)
    rows = task_rows(task, data, split="test", count=NUM_PROBLEMS, seed=0, max_bad_share=0.01, report=print)
    engine = EngineConfig(kind="native", transport="local")  # kind="vllm", transport="ray" for anything large
    room = engine.max_model_len - task.max_tokens
    prompts = build_prompts(rows, task, tokenizer, max_tokens=room, report=print)
    params = SamplingParams(max_tokens=task.max_tokens, temperature=0, stop_token_id=stop_token(tokenizer))
    pool = build_pool(engine, model)
    try:
        return evaluate(pool, prompts, build_rubric((), task), decoder(tokenizer), params, accuracy=task.accuracy)
    finally:
        pool.close()


def main(arguments: list[str]) -> None:
    if len(arguments) not in (2, 3):
        sys.exit(__doc__)
    result = evaluate_checkpoint(arguments[0], arguments[1], arguments[2] if len(arguments) == 3 else None)
    print(
        f"accuracy {result.accuracy:.1%} of {result.num_problems} problems "
        f"(95% interval {result.accuracy_low:.1%} to {result.accuracy_high:.1%}), {result.num_unscored} not scored"
    )
    for name, value in result.metrics.items():
        print(f"  {name:24} {value:.3f}")
    mistakes = [record for record in result.records if record["metrics"].get("math_answer") == 0]
    for record in mistakes[:3]:
        details = record["info"]["math_answer"]
        print(f"{record['id']}: {details['extracted']!r}, not {details['gold']!r}, in {record['completion']!r:.80}")


if __name__ == "__main__":
    main(sys.argv[1:])
