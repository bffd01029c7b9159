"""Math sets in verl's form, as DAPO-Math-17k (arXiv:2503.14476) and Skywork-OR1 have it: `prompt` is a list of
messages, `reward_model.ground_truth` the answer. DAPO's hub copy repeats every problem about a hundred times, the
processed one does not.
"""

from pipelines.tasks.math_rows import math_task

TASK = math_task(name="dapo", max_tokens=8192, default_data="open-r1/DAPO-Math-17k-Processed:en@train")
