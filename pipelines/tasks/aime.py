"""AIME: 30 problems a year whose answers are whole numbers from 0 to 999; 1983 to 2023 to train on, 2024 and 2025 to
evaluate. With 30 problems an evaluation needs many samples of each.
"""

from pipelines.tasks.math_rows import math_task

TASK = math_task(name="aime", max_tokens=8192)
AIME24 = math_task(name="aime24", max_tokens=8192, default_data="HuggingFaceH4/aime_2024@train")
AIME25 = math_task(name="aime25", max_tokens=8192, default_data="math-ai/aime25@test")
