"""Evaluation: completions of a checkpoint or of a server's model, judged by the same rewards that training uses.

    grpo eval --model DIR --task gsm8k --data test.jsonl.gz
    grpo eval --model DIR --task gsm8k --data test.jsonl.gz --num-samples 16 --temperature 0.6 --top-p 0.95
    grpo eval --server http://127.0.0.1:8000/v1 --server-model NAME --task gsm8k --data test.jsonl.gz
    grpo eval --rescore runs/eval --reward my_rewards.py:judge --out runs/eval-again
    grpo eval compare runs/eval-before runs/eval-after

The folder `--out` gets results.json, report.md and records.jsonl. The same command again goes on where a killed one
was. What is computed, and how, is in docs/evaluation.md.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.samples import Decode
from pipelines.config import flat_fields, read_config
from pipelines.console import console, progress_bar
from pipelines.evaluation.compare import CompareConfig, run_compare
from pipelines.evaluation.config import NOT_DECIDING, OF_JUDGING, EvalConfig
from pipelines.evaluation.folder import open_folder, write_result
from pipelines.evaluation.from_engines import sample_engines
from pipelines.evaluation.judge import OWN_FIELDS, completions_of, judge, read_records
from pipelines.evaluation.problems import Problems, read_problems
from pipelines.evaluation.samples import Drawn, SampleLog, no_room
from pipelines.evaluation.summary import EvalResult, default_ks, summarize
from pipelines.prompting import build_rubric, decoder, load_tokenizer, stop_token
from pipelines.tasks import Task, get_task
from pipelines.traces import checkpoint_hash
from rewards import Rubric
from rollout.pool import StreamingPool, build_pool
from rollout.sample import Prompt, SamplingParams
from rollout.stream import Key

__all__ = ["EvalConfig", "EvalResult", "evaluate", "run_eval", "write_result"]


def evaluate(
    pool: StreamingPool,
    prompts: Sequence[Prompt],
    rubric: Rubric,
    decode: Decode,
    params: SamplingParams,
    *,
    accuracy: str,
    on_sample: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Samples `params.num_completions` per prompt and judges them; `accuracy` names the reward whose value 1 is a right
    answer. Raises ValueError for a prompt that leaves no room to continue.
    """
    started = time.perf_counter()
    drawn: dict[Key, Drawn] = {}
    for one in sample_engines(pool, prompts, params, decode):
        drawn[one.key] = one
        on_sample()
    seconds = time.perf_counter() - started
    records = judge(prompts, drawn, rubric, accuracy=accuracy)
    return summarize(
        records, accuracy=accuracy, ks=default_ks(params.num_completions), seconds=seconds,
        new_tokens=sum(one.tokens for one in drawn.values()),
    )  # fmt: skip


def run_eval(config: EvalConfig | CompareConfig) -> EvalResult | None:
    """The whole of `grpo eval`."""
    if isinstance(config, CompareConfig):
        run_compare(config)
        return None
    if config.rescore:
        return _rescore(config)
    config = replace(config, engine=config.engine.resolved())
    task, rubric = _task_and_rubric(config)
    problems = read_problems(config, task)
    weights = "" if config.server else checkpoint_hash(config.model)
    log = open_folder(config, NOT_DECIDING, weights=weights, prompts=problems.prompts)
    if config.retry_failed:
        console.print(f"{log.drop_failed()} failed completions are sampled again")
    wanted = {(prompt.id, index) for prompt in problems.fitting for index in range(config.num_samples)}
    missing = len(wanted - log.drawn.keys())
    console.print(f"{len(problems.prompts)} problems of {task.name}; {missing} completions to sample", soft_wrap=True)
    seconds, new_tokens = _sample_missing(config, problems, log, missing) if missing else (0.0, 0)
    needed = f"more than {problems.room} tokens: {config.tokens_per_completion} are wanted behind the prompt"
    drawn = log.drawn | {
        one.key: one for prompt in problems.too_long for one in no_room(prompt.id, config.num_samples, needed)
    }
    records = judge(
        problems.prompts, drawn, rubric, accuracy=task.accuracy, extractors=config.shown_extractors,
        about=_about(config, task, weights),
    )  # fmt: skip
    return _finish(config, records, seconds=seconds, new_tokens=new_tokens)


def _task_and_rubric(config: EvalConfig) -> tuple[Task, Rubric]:
    task = get_task(config.task)
    rubric = build_rubric(config.reward, task)
    if task.accuracy not in [reward.name for reward in rubric.rewards]:
        raise ValueError(f"task {task.name} counts answers with the reward {task.accuracy!r}: add it to --reward")
    return task, rubric


def _sample_missing(config: EvalConfig, problems: Problems, log: SampleLog, missing: int) -> tuple[float, int]:
    """Samples into the log; seconds without the engines' start, and tokens."""
    tokens = failed = 0
    total = len(problems.fitting) * config.num_samples
    with _sampler(config) as sample, progress_bar("sampling", total) as bar:
        if missing < total:
            bar.advance("resumed", steps=total - missing)
        started = time.perf_counter()
        for one in sample(problems.fitting, log):
            log.append([one])
            tokens, failed = tokens + one.tokens, failed + bool(one.failure)
            speed = tokens / (time.perf_counter() - started)
            bar.advance(f"{speed:,.0f} tokens/s" + (f"  {failed} failed" if failed else ""))
        return time.perf_counter() - started, tokens


@contextmanager
def _sampler(config: EvalConfig) -> Iterator[Callable[[Sequence[Prompt], SampleLog], Iterator[Drawn]]]:
    """What samples the completions that the log does not have."""
    params = SamplingParams(
        num_completions=config.num_samples, max_tokens=config.tokens_per_completion, temperature=config.temperature,
        top_k=config.top_k, top_p=config.top_p, seed=config.seed, stop_token_id=0,
    )  # fmt: skip
    if config.server:
        from pipelines.evaluation.from_server import Server, ServerSampler  # openai: only for those who ask

        server = Server(
            url=config.server, model=config.server_model, api=config.server_api, system=config.system,
            concurrency=config.concurrency, timeout_s=config.timeout_s,
        )  # fmt: skip
        with ServerSampler(server) as asking:
            yield lambda prompts, log: asking.sample(prompts, params, done=set(log.drawn), stop=config.stop)
        return
    tokenizer = load_tokenizer(config.model)
    params = replace(params, stop_token_id=stop_token(tokenizer))
    with console.status("starting the engines"):
        pool = build_pool(config.engine, config.model)
    with closing(pool):
        yield lambda prompts, log: sample_engines(
            pool, prompts, params, decoder(tokenizer), done=set(log.drawn), stop=config.stop
        )


def _about(config: EvalConfig, task: Task, weights: str) -> Callable[[Prompt], dict[str, Any]]:
    """What a record says of where it comes from, as a trace does (traces.py)."""
    source = {
        "model": config.server_model or config.model, "weights": weights, "temperature": config.temperature,
        "max_tokens": config.tokens_per_completion, "seed": config.seed, "top_p": config.top_p, "top_k": config.top_k,
    }  # fmt: skip
    template = "chat" if config.server_api == "chat" else config.template or task.template
    return lambda prompt: {
        "task": task.name, "template": template, "question": task.question(dict(prompt.row)), "source": source,
    }  # fmt: skip


def _rescore(config: EvalConfig) -> EvalResult:
    """Judges the completions of another folder."""
    source = Path(config.rescore)
    records = read_records(source)
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"{source} has no config.json: it is not the folder of a `grpo eval`")
    saved = read_config(EvalConfig, source / "config.json", default=EvalConfig())
    asked, usual = flat_fields(config), flat_fields(EvalConfig())
    if idle := [name for name in asked if name not in OF_JUDGING and asked[name] != usual[name]]:
        raise ValueError(f"{idle[0]} has no effect with --rescore, which samples nothing; leave it out")
    if config.task not in (usual["task"], saved.task):
        raise ValueError(f"{source} holds completions of the task {saved.task!r}, not {config.task!r}")
    config = replace(
        saved, reward=config.reward, extractors=config.extractors, pass_k=config.pass_k or saved.pass_k,
        rescore=config.rescore, out=config.out,
    )  # fmt: skip
    task, rubric = _task_and_rubric(config)
    prompts, drawn = completions_of(records)
    others = {r["prompt_id"]: {name: value for name, value in r.items() if name not in OWN_FIELDS} for r in records}
    if Path(config.out).resolve() == source.resolve():
        raise ValueError(f"--out {config.out} is the folder that is judged again; choose another")
    open_folder(config, ("out",), weights=str(records[0].get("source", {}).get("weights", "")), prompts=prompts)
    judged = judge(
        prompts, drawn, rubric, accuracy=task.accuracy, extractors=config.shown_extractors,
        about=lambda prompt: others[prompt.id],
    )  # fmt: skip
    return _finish(config, judged, seconds=0.0, new_tokens=0)


def _finish(config: EvalConfig, records: list[dict[str, Any]], *, seconds: float, new_tokens: int) -> EvalResult:
    """Sums up, writes the folder, and says what matters."""
    task, out = get_task(config.task), Path(config.out)
    ks = config.pass_k or default_ks(config.num_samples)
    result = summarize(records, accuracy=task.accuracy, ks=ks, seconds=seconds, new_tokens=new_tokens)
    write_result(result, out, _heading(config, task))
    speed = f", {result.tokens_per_s:,.0f} tokens/s" if seconds else ""
    console.print(
        f"accuracy {result.accuracy:.1%} (95% interval {result.accuracy_low:.1%} to {result.accuracy_high:.1%}), "
        f"{result.num_problems} problems, {result.truncated:.1%} cut at the token limit{speed}; results in {out}",
        soft_wrap=True,
    )
    if result.num_unscored_samples:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.failures.items()) or "no gold answer"
        console.print(
            f"not scored: {result.num_unscored} problems, {result.num_unscored_samples} completions ({kinds}); "
            f"with all of these wrong it is {result.accuracy_of_all:.1%}",
            style="bold red", soft_wrap=True,
        )  # fmt: skip
    return result


def _heading(config: EvalConfig, task: Task) -> dict[str, Any]:
    """What the report says of model, task and sampling."""
    sampling = "greedy" if config.temperature == 0 else (
        f"temperature {config.temperature:g}, top_p {config.top_p:g}, top_k {config.top_k or 'all'}"
    )  # fmt: skip
    template = "chat" if config.server_api == "chat" else config.template or task.template
    judged = {"judged again": config.rescore} if config.rescore else {}
    return {
        "model": config.model or f"{config.server_model} at {config.server} ({config.server_api})",
        "task": task.name,
        "data": config.data or task.default_data or "generated",
        "template": f"{template}, {config.shots} worked examples",
        "sampling": f"{sampling}, {config.num_samples} per problem, up to {config.tokens_per_completion} tokens, "
        f"stop {list(config.stop)}, seed {config.seed}",
        "rewards": ", ".join(config.reward or task.rewards),
        **judged,
    }
