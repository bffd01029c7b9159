"""Evaluation of a served model: any OpenAI-compatible server, judged by the rewards that training uses.

    vllm serve runs/zero/model --port 8000
    python examples/06_evaluate_server.py http://127.0.0.1:8000/v1 runs/zero/model test.jsonl

The command `grpo eval --server URL --server-model NAME` does the same, writes files and goes on after a kill; this is
for scripts that want the numbers.
"""

import sys

from pipelines.evaluation.from_server import Server, ServerSampler
from pipelines.evaluation.judge import judge
from pipelines.evaluation.summary import EvalResult, summarize
from pipelines.prompting import build_rubric, task_rows
from pipelines.tasks import get_task
from rollout.sample import Prompt, SamplingParams

NUM_PROBLEMS, NUM_SAMPLES = 64, 4


def evaluate_server(url: str, model: str, data: str) -> EvalResult:
    """Four completions of each of the first GSM8K problems in `data`, through the server's chat endpoint."""
    task = get_task("gsm8k")
    rows = task_rows(task, data, split="", count=NUM_PROBLEMS, seed=0, max_bad_share=0.01, report=print)
    prompts = [Prompt(id=str(row.number), text=task.question(row.row), token_ids=[], row=row.row) for row in rows]
    params = SamplingParams(
        num_completions=NUM_SAMPLES, max_tokens=task.max_tokens, temperature=0.6, top_p=0.95, stop_token_id=0
    )  # the server knows its model's stop token
    with ServerSampler(Server(url=url, model=model, api="chat")) as sampler:
        drawn = {one.key: one for one in sampler.sample(prompts, params)}
    records = judge(prompts, drawn, build_rubric((), task), accuracy=task.accuracy)
    return summarize(records, accuracy=task.accuracy, ks=(1, NUM_SAMPLES))


def main(arguments: list[str]) -> None:
    if len(arguments) != 3:
        sys.exit(__doc__)
    result = evaluate_server(*arguments)
    print(
        f"accuracy {result.accuracy:.1%} of {result.num_problems} problems "
        f"(95% interval {result.accuracy_low:.1%} to {result.accuracy_high:.1%}), failures {result.failures or 'none'}"
    )
    for title, estimates in (("pass", result.pass_at), ("cons", result.cons_at)):
        for k, estimate in estimates.items():
            print(f"  {title}@{k} {estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})")


if __name__ == "__main__":
    main(sys.argv[1:])
