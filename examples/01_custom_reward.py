"""A reward of your own: a function of one sample in a file of its own, named on the command line as FILE:FUNCTION.

    grpo zero --model base --task gsm8k --data train.jsonl --reward examples/01_custom_reward.py:right_and_brief

Several rewards are added up, each with a weight: `--reward examples/01_custom_reward.py:right_and_brief 0.1*r1_format`.
Try a reward on made-up samples before training on it, as below:

    python examples/01_custom_reward.py
"""

from rewards import Sample, Score, math_answer, reward

FREE_WORDS = 100
"""A completion may have so many words without losing anything."""


@reward
def right_and_brief(sample: Sample) -> Score:
    """1 for a right answer in at most 100 words, falling to 0.5 at 200 words and beyond; 0 for a wrong answer.

    A right answer always beats a wrong one, however long it is: otherwise the model would learn to stop thinking.
    """
    answer = math_answer.score(sample)
    if answer.value is None:  # the row has no usable gold answer: not the model's fault, so no verdict
        return answer
    words = len(sample.completion.split())
    excess = min(max(words - FREE_WORDS, 0) / FREE_WORDS, 1.0)
    return Score(
        value=answer.value * (1 - 0.5 * excess),
        metrics={"words": words, "right": answer.value},  # averaged and logged as right_and_brief/words, .../right
        info=answer.info,  # kept with the completion in groups.jsonl
    )


def main() -> None:
    row = {"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}
    completions = {
        "right and brief": "<think> 6 x 7 = 42 </think> <answer> 42 </answer>",
        "right and long": f"<think> {'well, let me see ... ' * 30} 42 </think> <answer> 42.0 </answer>",
        "wrong": "<think> 6 + 7 = 13 </think> <answer> 13 </answer>",
    }
    for name, completion in completions.items():
        score = right_and_brief.score(Sample(prompt=row["question"], completion=completion, row=row))
        print(f"{name:15}  reward {score.value:.2f}  {dict(score.metrics)}  {score.info['reason']}")


if __name__ == "__main__":
    main()
