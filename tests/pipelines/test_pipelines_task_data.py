"""The data sets as they are, where they lie beside the project (or where GRPO_SHARED_DATA says): each file is read by
its task, every row counted, and every gold answer judged right by the task's own rewards; programs on a sample.
"""

import os
from pathlib import Path

import pytest

from pipelines.data import NumberedRow
from pipelines.prompting import build_rubric, task_rows
from pipelines.tasks import Task, get_task
from rewards import Rubric, Sample
from tests.pipelines.conftest import ROOT

DATA = Path(os.environ.get("GRPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: the data sets lie beside the project")

# Two problems of MATH's train set, and four of rLLM's copy, have an empty box and so no gold answer.
WITHOUT_GOLD = {"math/train.jsonl.gz": 2, "math/rllm_train_math.json.gz": 4}
MATH_FILES = {
    "gsm8k/train.jsonl.gz": ("gsm8k", 7473),
    "gsm8k/test.jsonl.gz": ("gsm8k", 1319),
    "math/train.jsonl.gz": ("math", 7498),
    "math/test.jsonl.gz": ("math", 5000),
    "math/rllm_train_math.json.gz": ("math", 7470),
    "math500/test.jsonl.gz": ("math500", 500),
    "aime/aime24.jsonl.gz": ("aime24", 30),
    "aime/aime24_sky.parquet": ("aime24", 30),
    "aime/aime25_sky.parquet": ("aime25", 30),
    "aime/rllm_train_aime_1983_2023.json.gz": ("aime", 975),
    "amc23/test.jsonl.gz": ("amc23", 40),
    "amc23/amc_83.jsonl.gz": ("amc23", 83),
    "countdown/train.jsonl.gz": ("countdown", 10240),
    "countdown/test.jsonl.gz": ("countdown", 1024),
    "reasoning_traces/math_numeric_3k.jsonl.gz": ("math", 3000),
}
CODE_FILES = {  # task, rows, how many of their programs are run; 0 where the data set has no programs
    "humaneval/HumanEval.jsonl.gz": ("humaneval", 164, 8),
    "humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz": ("humaneval+", 164, 6),
    "mbpp/mbpp.jsonl.gz": ("mbpp", 974, 8),
    "mbppplus/MbppPlus-OriginFmt.jsonl.gz": ("mbpp+", 378, 6),
    "leetcode/LeetCodeDataset-v0.2.0-test.jsonl.gz": ("leetcode", 200, 4),
    "leetcode/LeetCodeDataset-v0.2.0-train.jsonl.gz": ("leetcode", 1890, 4),
    "leetcode/rllm_test_leetcode.json.gz": ("leetcode", 200, 4),
    "leetcode/rllm_train_leetcode.json.gz": ("leetcode", 1889, 4),
    "codeforces/rllm_test.json.gz": ("codeforces", 408, 0),
    "code_contests/rllm_test.json.gz": ("codeforces", 165, 0),
    "code_contests/sandboxfusion_sample.jsonl.gz": ("codeforces", 20, 0),
    "code_contests/sandboxfusion_rl_train_oj.jsonl.gz": ("leetcode", 20, 0),
}
SAMPLE_EVERY = int(os.environ.get("GRPO_CODE_SAMPLE", "0"))
"""0 for the few programs above, else every so manieth one."""


def rows_of(file: str, task: Task, reports: list[str]) -> list[NumberedRow]:
    return task_rows(
        task, str(DATA / file), split="train", count=0, seed=0, max_bad_share=0.1, report=reports.append
    )  # fmt: skip


def gold_sample(task: Task, row: NumberedRow) -> Sample:
    assert task.gold is not None
    completion = f" <think> so </think> <answer>\n{task.gold(row.row)}\n</answer>"
    return Sample(prompt="", completion=completion, row=row.row, group_id=str(row.number))


def judged_wrong(task: Task, rows: list[NumberedRow]) -> list[str]:
    """What the task's rewards do not take for a right answer in its form."""
    rubric: Rubric = build_rubric((), task)
    scores = rubric.score_groups([[gold_sample(task, row)] for row in rows])
    return [
        f"{row.number}: {score.info[task.accuracy]}"
        for row, (score,) in zip(rows, scores, strict=True)
        if score.metrics.get(task.accuracy) != 1.0 or not score.value or score.value < 1.1
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", MATH_FILES)
def test_every_gold_answer_is_judged_right(file: str) -> None:
    name, count = MATH_FILES[file]
    task, reports = get_task(name), []
    rows = rows_of(file, task, reports)
    skipped = WITHOUT_GOLD.get(file, 0)
    assert len(rows) == count and len(reports) == (skipped and skipped + 1)
    assert all("no gold answer" in report for report in reports[:-1])
    assert all(task.question(row.row).strip() for row in rows)
    assert judged_wrong(task, rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", CODE_FILES)
def test_programs_of_the_data_sets_are_judged_right(file: str) -> None:
    name, count, sample = CODE_FILES[file]
    task, reports = get_task(name), []
    rows = rows_of(file, task, reports)
    assert (len(rows), reports) == (count, [])
    assert all(task.question(row.row).strip() for row in rows)
    assert task.gold is not None and all(bool(task.gold(row.row)) == bool(sample) for row in rows)
    if sample:
        assert judged_wrong(task, rows[:: SAMPLE_EVERY or len(rows) // sample]) == []


def test_teacher_traces_without_a_readable_answer_are_counted() -> None:
    reports: list[str] = []
    rows = rows_of("reasoning_traces/teacher_traces_12k_test.jsonl.gz", get_task("math"), reports)
    assert len(rows) >= 900 and reports[-1].endswith(f"{1000 - len(rows)} of 1000 rows are malformed")


@pytest.mark.parametrize("file", ["humanevalplus/HumanEvalPlus.jsonl.gz", "mbppplus/MbppPlus.jsonl.gz"])
def test_the_release_form_of_evalplus_is_refused(file: str) -> None:
    task = get_task("humaneval+" if file.startswith("human") else "mbpp+")
    with pytest.raises(ValueError, match="are malformed"):
        rows_of(file, task, [])
    assert "take the hub's form" in str(task.check({"prompt": "p", "test": "t", "entry_point": "f", "test_list": ["a"],
                                                    "plus_input": []}))  # fmt: skip
