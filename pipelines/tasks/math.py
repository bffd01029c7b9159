r"""MATH (arXiv:2103.03874): competition problems with worked solutions, and MATH-500 (arXiv:2305.20050), the 500 of its
test problems that are usually evaluated. Answers are LaTeX; the gold is the last `\boxed{}` of the solution.
"""

from pipelines.tasks.math_rows import math_task, worked

EXAMPLES = (
    worked(
        r"Solve $2x + 3 = 11$ for $x$.",
        r"Subtracting 3 gives $2x = 8$, and dividing by 2 gives $x = 4$.",
        "4",
    ),
    worked(
        r"What is the probability that two fair dice show the same number? Express your answer as a common fraction.",
        r"Of the $6 \cdot 6 = 36$ equally likely outcomes 6 are pairs, so the probability is $\frac{6}{36}$.",
        r"$\frac{1}{6}$",
    ),
    worked(
        r"Find the distance between the points $(1, 2)$ and $(3, 6)$.",
        r"The differences are 2 and 4, so the distance is $\sqrt{2^2 + 4^2} = \sqrt{20} = 2\sqrt{5}$.",
        r"$2\sqrt{5}$",
    ),
    worked(
        r"For which values of $x$ is $x^2 - 5x + 6 < 0$? Answer in interval notation.",
        r"The quadratic is $(x - 2)(x - 3)$, which is negative exactly between its roots 2 and 3.",
        r"$(2, 3)$",
    ),
)

TASK = math_task(name="math", max_tokens=2048, examples=EXAMPLES, default_data="DigitalLearningGmbH/MATH-lighteval")
MATH500 = math_task(
    name="math500", max_tokens=2048, examples=EXAMPLES, default_data="HuggingFaceH4/MATH-500@test"
)  # fmt: skip
