"""AMC 12 of 2022 and 2023, as evaluated since Qwen2.5-Math; the files keep whole numbers as 27.0."""

from pipelines.tasks.math_rows import math_task

TASK = math_task(name="amc23", max_tokens=4096, default_data="math-ai/amc23@test")
