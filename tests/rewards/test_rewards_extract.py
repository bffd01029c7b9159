"""Pins where the final answer of a completion is found: the last one, by the first method that finds any.

Hedging (answers side by side) gives a list, nested boxes give the inner one, and hostile text takes linear time.
"""

import pytest

from rewards import extract_answer
from rewards.extract import EXTRACTORS, own_turn


@pytest.mark.parametrize(
    ("method", "text", "answer"),
    [
        ("answer_tag", "<answer>42</answer>", "42"),
        ("answer_tag", "<answer>\n 42 \n</answer> bye", "42"),
        ("answer_tag", "<answer>1</answer> no wait <answer>2</answer>", "2"),
        ("answer_tag", "<answer>1 <answer>2</answer>", "2"),
        ("answer_tag", "<answer>1</answer>2</answer>", "1"),
        ("answer_tag", r"<answer>so $\boxed{42}$</answer>", "42"),
        ("answer_tag", "<answer>1</answer> <answer>2</answer>", "1, 2"),
        ("answer_tag", "<answer>2</answer>\n<answer>2</answer>", "2"),
        ("answer_tag", "<answer>1</answer> <answer>2", "1"),
        ("answer_tag", "<answer>42", None),
        ("answer_tag", "42</answer>", None),
        ("answer_tag", "</answer>42<answer>", None),
        ("answer_tag", "<answer></answer>", None),
        ("boxed", r"\boxed{42}", "42"),
        ("boxed", r"\fbox{42}", "42"),
        ("boxed", r"\boxed {42}", "42"),
        ("boxed", r"I thought \boxed{1}. So \boxed{2}.", "2"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{12\\}", r"12\\"),
        ("boxed", r"\boxed{x = \boxed{5}}", "5"),
        ("boxed", r"\boxed{\boxed{4} \text{ or } \fbox{5}}", "4, 5"),
        ("boxed", r"{{{ \boxed{5}", "5"),
        ("boxed", r"} \boxed{5} }", "5"),
        ("boxed", r"\boxed{4} then \boxed{5", "4"),
        ("boxed", r"\boxed{4 then \boxed{5}", "5"),
        ("boxed", r"\boxed{5", None),
        ("boxed", r"\boxed{}", None),
        ("boxed", "boxed{5}", None),
        ("boxed", r"\boxed5", None),
        ("boxed", r"The solutions are $\boxed{-2}$ and $\boxed{1}$.", "-2, 1"),
        ("boxed", r"\boxed{3} or \boxed{4} or \boxed{5}", "3, 4, 5"),
        ("boxed", r"\boxed{1} \boxed{2} \boxed{3}", "1, 2, 3"),
        ("boxed", r"\boxed{1} no no no no no \boxed{2}", "2"),
        ("hash", "so 6*7\n#### 42", "42"),
        ("hash", "#### 41\n#### 42\nthat is all", "42"),
        ("hash", "####", None),
        ("hash", "### 42", None),
        ("answer_line", "Answer: 42", "42"),
        ("answer_line", "**Answer:** 42", "42"),
        ("answer_line", "**Final Answer**: **42**", "42"),
        ("answer_line", "The answer is 3.5. I hope it is correct.", "3.5"),
        ("answer_line", "The answer is 1. No, the answer is 2.", "2."),
        ("answer_line", "Answer:\n\n42\nbye", "42"),
        ("answer_line", "the answer is not 41 but 42", "not 41 but 42"),
        ("answer_line", "the answers are 1 and 2", None),
        ("answer_line", "answer:", None),
        ("boxed", r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        ("boxed", r"\boxed{1} and then \boxed{2}", "2"),
        ("boxed", r"\boxed{1}. And now \boxed{2}.", "2"),
        ("boxed", r"\(y_1 = \boxed{1}\) and \( y_2 = \boxed{2}\)", "1, 2"),
        ("answer_line", "Final Answer: The largest $n$ is 34.", "34."),
        ("answer_line", "Final Answer: she started 3 hours ago. I hope so.", "3"),
        ("answer_line", "The correct option is C.", "C."),
        ("last_math", r"Hence $x \geq 5$ is the solution.", r"x \geq 5"),
        ("last_math", "Answer \\[ \n 9 \n \\]", "9"),
        ("last_math", "Answer $ \n 9 \n $", None),
        ("last_math", "With $x = 1$ there are 12 of them.", None),
        ("last_math", r"It costs \$5.", None),
        ("whole", r"\frac{10}{9}", r"\frac{10}{9}"),
        ("whole", "x = 3 or y", "x = 3 or y"),
        ("whole", "about 5", None),
        ("whole", "one\ntwo", None),
        ("whole", r"\boxed{42", None),
        ("last_number", "x = 10 is impossible, so there is no solution.", None),
        ("last_number", "Answer $ \n 9 \n $", None),
        ("last_number", "first 41 and then 42.", "42"),
        ("last_number", "it costs $1,234.50!", "1,234.50"),
        ("last_number", "6*7=42 apples", "42"),
        ("last_number", "it is **-3/4**", "-3/4"),
        ("last_number", "grew by 42%", "42%"),
        ("last_number", "about .5", ".5"),
        ("last_number", "1e5", "1e5"),
        ("last_number", "AZYUK2A", None),
        ("last_number", "7 or 1,2345", "7"),
        ("last_number", "7, 1_000, inf, nan", "7"),
        ("last_number", "\u0664\u0662 \uff14\uff12", None),
        ("last_number", "", None),
    ],
)
def test_one_method(method: str, text: str, answer: str | None) -> None:
    found = extract_answer(text, [method])
    assert (found.answer, found.method) == (answer, "none" if answer is None else method)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        (r"#### 1 Answer: 2 \boxed{3} <answer>4</answer> 5", "answer_tag"),
        (r"#### 1 Answer: 2 \boxed{3} 5", "boxed"),
        ("#### 1\nAnswer: 2\n5", "hash"),
        ("Answer: 2\n5", "answer_line"),
        ("maybe 5", "last_number"),
        ("<answer></answer> maybe 5", "last_number"),
        ("no idea", "none"),
    ],
)
def test_default_order(text: str, method: str) -> None:
    assert extract_answer(text).method == method


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"\boxed{1}, no, \boxed{2}", ("1", "2")),
        (r"\boxed{x = \boxed{5}}", ("5",)),
        (r"<answer>\boxed{5}</answer>", ("5",)),
        ("#### 5", ()),
    ],
)
def test_all_boxes_are_recorded(text: str, boxes: tuple[str, ...]) -> None:
    assert extract_answer(text).boxes == boxes


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("42<|im_end|>", "42"),
        ("42</s> 43", "42"),
        ("<|im_start|>assistant\n42<|im_end|>\n<|im_start|>user\n43", "42"),
        ("<|endoftext|>42", "<|endoftext|>42"),
        ("a < b", "a < b"),
    ],
)
def test_own_turn(text: str, kept: str) -> None:
    assert own_turn(text) == kept


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'box'; known: answer_tag, boxed, .*, whole, last_number"):
        extract_answer("42", ["boxed", "box"])


HOSTILE_PIECES = [
    "{",
    "}",
    "\\boxed{",
    "\\boxed{1}",
    "\\boxed{\\boxed{1}}",
    "\\boxed ",
    "\\",
    "<answer>",
    "</answer>",
    "<answer>1</answer> ",
    "<answer>\\boxed{",
    "#",
    "####\n",
    "answer: ",
    "answer is ",
    "1,234",
    "1",
    "9 ",
    ",",
    "$",
    "or ",
    "\\[",
    "\\(",
    "$$ ",
    "is a ",
    "x. ",
    " ",
    "\n",
    "\x00",
]


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_hostile_text_is_read_in_linear_time(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    for method in EXTRACTORS:  # a quadratic extractor would need minutes here
        extract_answer(text, [method])
        extract_answer(text + "x", [method])
