"""One rollout batch as several optimizer steps, and what is reported of them together.

report = update_in_minibatches(learner, samples, minibatches=4)
"""

from collections.abc import Sequence

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_group import LearnerGroup

_SKIPPED = "policy/skipped_steps"


def update_in_minibatches(
    learner: Learner | LearnerGroup, samples: Sequence[TrainingSample], minibatches: int
) -> dict[str, float]:
    """One optimizer step on each of `minibatches` equal shares of the samples, in their order.

    The report is the mean over the steps that were applied (the first step's if none was), with the mismatch of the
    first, before which no weight had moved, and the number of skipped steps. Raises StepsSkippedError.
    """
    size = -(-len(samples) // minibatches)
    reports = [learner.update(samples[start : start + size]) for start in range(0, len(samples), size)]
    applied = [report for report in reports if not report[_SKIPPED]] or reports[:1]
    names = dict.fromkeys(name for report in applied for name in report if not name.startswith("mismatch/"))
    values = {name: [report[name] for report in applied if name in report] for name in names}
    means = {name: sum(of_name) / len(of_name) for name, of_name in values.items()}
    mismatch = {name: value for name, value in reports[0].items() if name.startswith("mismatch/")}
    return means | mismatch | {_SKIPPED: sum(report[_SKIPPED] for report in reports)}
