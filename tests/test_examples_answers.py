"""Answers of worked solutions: found where the formats put them, and compared as mathematics writes them."""

import importlib
from fractions import Fraction
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def answers(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("common.answers")


EXTRACTED = [
    # MetaMathQA
    ("So 6 × 7 = 42.\nThe answer is: 42", "42"),
    ("The total is $1,234.50. The answer is: $1,234.50", "$1,234.50"),
    (r"…\n#### \frac{1}{2}" + "\nThe answer is: \\frac{1}{2}", r"\frac{1}{2}"),
    ("The answer is: 3. Therefore the answer is: 4.", "4"),
    (r"The answer is: \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
    ("The answer is 12 apples. That is a lot.", "12 apples"),
    ("The answer is 3.14", "3.14"),
    ("THE ANSWER IS: 7", "7"),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
    ("The answer is: 5\n\n### Instruction:\nAdd.\n\n### Response: The answer is: 6", "5"),
    ("I think the answer is:\n#### 8", "8"),
    ("The answer is: ", None),
    # GSM8K
    ("48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72", "72"),
    ("#### 1,080", "1,080"),
    ("#### -3.5\n", "-3.5"),
    ("#### 10 #### 11", "11"),
    # MATH
    (r"Hence $x = \boxed{5}$.", "5"),
    (r"First $\boxed{1}$, then $\boxed{\frac{\sqrt{3}}{2}}$, so done.", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\left\{ \frac{1}{2}, \{3\} \right\}}", r"\left\{ \frac{1}{2}, \{3\} \right\}"),
    (r"The set is \boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"so \fbox{17}", "17"),
    (r"so $\boxed 9$ it is", "9"),
    (r"so $\boxed{9", "9"),  # cut off by the limit on tokens
    # None of these
    ("First 3, then 4, which makes 7 in all.", "7"),
    ("It costs $1,299.99 in total.", "$1,299.99"),
    ("about -12 degrees", "-12"),
    ("which leaves 3/4 of it", "3/4"),
    (r"which leaves \frac{3}{4} of it", r"\frac{3}{4}"),
    ("a share of 25%", "25%"),
    ("x2 is a name", None),
    ("nothing at all", None),
    ("", None),
]

SAME = [
    ("1,234,567", "1234567"),
    (r"11,\!111,\!100", "11111100"),
    (r"\$32,\!348", "32348"),
    ("$18", "18"),
    ("18.00", "18"),
    ("18.", "18"),
    ("+7", "7"),
    ("−7", "-7"),
    ("50%", "50"),
    (r"50\%", "50"),
    (".5", "0.5"),
    ("007", "7"),
    ("42 apples", "42"),
    ("42 square feet.", "42"),
    ("60 miles per hour", "60"),
    ("60 km/h", "60"),
    ("5cm", "5"),
    (r"18\text{ inches}", "18"),
    (r"15\mbox{ cm}^2", "15"),
    (r"12 \text{ cm}^{2}", "12"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("90°", "90"),
    ("x = 5", "5"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"\tfrac{1}{2}", "0.5"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"\frac{-1}{2}", "-0.5"),
    (r"\frac{2}{4}", "1/2"),
    ("0.3333333", r"\frac{1}{3}"),
    ("66.66667", "200/3"),
    (r"2\frac{3}{4}", "2.75"),
    ("2 3/4", r"\frac{11}{4}"),
    ("2 3/4 cups", "2.75"),
    ("3/4 cup", "0.75"),
    (r"1.5 \times 10^{3}", "1500"),
    (r"2\cdot10^2", "200"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("(1/2, 0.25)", r"\left(\frac{1}{2},\frac{1}{4}\right)"),
    (r"\{1, 2\}", r"\{1,2\}"),
    ("1, 2, 3", "1,2,3"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(B)}", "(B)"),
    ("x^2 + 2x + 1", "x^2+2x+1"),
    ("$6 - 5i$", "6-5i"),
    (r"$\boxed{12}$", "12"),
    ("**12**", "12"),
]

DIFFERENT = [
    ("7", "8"),
    ("72", "7"),
    ("-7", "7"),
    ("10001", "10000"),
    ("100000001", "100000000"),
    ("0.33", "1/3"),
    ("50%", "0.5"),
    ("1,234", "1.234"),
    ("1/2", "2"),
    ("1/0", "0"),
    (r"\frac{1}{0}", "1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("1,2,3", "123"),
    ("2 3/4", "23/4"),
    ("2 3", "23"),
    ("x+1", "x-1"),
    (r"\sqrt{3}", "3"),
    (r"5\sqrt{3}", "5"),
    ("3x", "3"),
    ("", ""),
    (None, "5"),
]


@pytest.mark.parametrize(("text", "expected"), EXTRACTED)
def test_the_answer_is_found(answers, text, expected):
    assert answers.extract(text) == expected


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_one_answer_in_two_spellings(answers, answer, reference):
    assert answers.same(answer, reference) and answers.same(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_two_answers(answers, answer, reference):
    assert not answers.same(answer, reference)
    assert answer is None or not answers.same(reference, answer)


def test_numbers_are_exact(answers):
    assert answers.number("$1,000.01") == Fraction(100001, 100)
    assert answers.number("2 3/4 cups") == Fraction(11, 4)
    assert answers.number("x+1") is None and answers.number("1/0") is None
    assert answers.number("10^{4000}") is None and answers.number(r"9\times10^{4000}") is None


def test_a_solution_is_right_if_its_answer_is(answers):
    reference = answers.extract("3 + 4 = <<3+4=7>>7\n#### 7")
    assert answers.solves("Three and four make 7. The answer is: 7.00", reference)
    assert not answers.solves("The answer is: 3", reference) and not answers.solves("I do not know", reference)
