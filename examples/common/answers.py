r"""The answer that a worked solution ends in, and whether two answers are the same.

Solutions of MetaMathQA end in "The answer is: 42", those of GSM8K in "#### 42", those of MATH put their answer into
\boxed{42}, and a model that was taught none of these may end in a number. Answers are compared as numbers where both
are, and as LaTeX otherwise, after what is only a matter of writing has been taken out of both.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

TURN = re.compile(r"###? ?Instruction|\bInstruction:|###? ?Response|<\|im_end\|>|</s>")
"""Where a model that does not stop goes on with another exercise."""

SAID = re.compile(r"\b(?:the|final)\s+answer\s*(?:is|:)\s*:?", re.IGNORECASE)
BOXES = (r"\boxed", r"\fbox")

NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))"
"""Digits, perhaps in groups of three, perhaps with a decimal part; a sign and a dollar may stand before them."""

LAST_NUMBER = re.compile(rf"(?<![\w.])(?:{NUMBER}(?:/\d+)?|[-+]?\\[dt]?frac\{{-?\d+\}}\{{-?\d+\}})%?")

CLOSE = 1e-4
"""Relative difference up to which a decimal counts as the fraction that it rounds: 0.3333 is 1/3, 0.33 is not."""


def extract(text: str) -> str | None:
    r"""Return the final answer of a worked solution.

    It is what follows the last "The answer is", else the last "####", else what the last \boxed{} or \fbox{} holds,
    else the last number. Whatever follows the beginning of another exercise is left out.

    Returns
    -------
    str or None
        As it stands there, without enclosing dollars, boxes and a full stop; None if there is no answer.
    """
    text = text[: match.start()] if (match := TURN.search(text)) else text
    said = [_first_sentence(text[match.end() :]) for match in SAID.finditer(text)]
    marked = [_first_sentence(part) for part in text.split("####")[1:]]
    for found in (*reversed(said), *reversed(marked)):
        if answer := _bare(found):
            return answer
    if (held := last_boxed(text)) is not None:
        return _bare(held)
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
    r"""Return what the last \boxed{} or \fbox{} holds, whose braces may be nested, or the word after \boxed."""
    place, box = max((text.rfind(box), box) for box in BOXES)
    if place < 0:
        return None
    rest = text[place + len(box) :].lstrip()
    if not rest.startswith("{"):
        words = re.split(r"[\s$]", rest, maxsplit=1)
        return words[0] or None
    end = _end_of_braces(rest)
    return None if end is None else rest[1 : end - 1]


def same(answer: str | None, reference: str) -> bool:
    """Return whether two answers are the same number, the same parts in the same order, or the same LaTeX."""
    if answer is None:
        return False
    one, other = written_alike(answer), written_alike(reference)
    if one == other:
        return one != ""
    values = number(one), number(other)
    if None not in values:
        return _equal(*values)
    parts = _parts(one), _parts(other)
    return (
        None not in parts
        and parts[0][0] == parts[1][0]
        and len(parts[0][1]) == len(parts[1][1])
        and all(same(*pair) for pair in zip(parts[0][1], parts[1][1]))
    )


def solves(text: str, answer: str) -> bool:
    """Return whether a worked solution ends in an answer."""
    return same(extract(text), answer)


def number(answer: str) -> Fraction | None:
    r"""Return the value of an answer that is one number, exactly.

    Read are 1,234.5, −3, $5, 50% (as 50), 3/4, \frac{3}{4}, 2\frac{3}{4}, 2 3/4, 1.5\times10^{3}, and a number followed
    by a unit in words.
    """
    text = written_alike(answer)
    if match := re.fullmatch(r"(.+?)\\(?:times|cdot)10\^(?:\{(-?\d+)\}|(\d))", text):
        base, power = number(match[1]), int(match[2] or match[3])
        return None if base is None or abs(power) > 300 else base * Fraction(10) ** power
    if match := re.fullmatch(r"(-?)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}", text):
        over, under = _decimal(match[2]), _decimal(match[3])
        return None if over is None or not under else _signed(match[1], over / under)
    if match := re.fullmatch(r"(-?)(\d+)\\frac\{(\d+)\}\{(\d+)\}", text):
        return None if not int(match[4]) else _signed(match[1], int(match[2]) + Fraction(int(match[3]), int(match[4])))
    return _decimal(text)


def written_alike(answer: str) -> str:
    r"""Return an answer with one spelling of what can be spelt in several ways.

    Taken out are spaces, signs of currency and percent, degrees, \left and \right, units, a variable that the answer is
    assigned to, and commas that group digits; fractions become \frac{a}{b}, roots \sqrt{a}.
    """
    text = _bare(answer).replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:left|right|displaystyle|[!,;:> ])|~|\\qquad|\\quad", lambda m: _space(m[0]), text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\{\\circ\}|\\circ)|°|\\degree|\\?%|\\\$|\$|€|£", "", text)
    text = _without_units(text)
    text = re.sub(r"^\s*[a-zA-Z]\w?\s*(?:=|\\in(?![a-z]))\s*", "", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "&", text)  # the space of 2 3/4, which has a meaning
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{([^{}]*)\}(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:(\d+)&)?(?<![\d./])(\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return text.rstrip(".,;:").removeprefix("+")


def _space(command: str) -> str:
    r"""What a command of LaTeX that only sets space stands for: \! groups digits, the others part words."""
    return "" if command.startswith((r"\left", r"\right", r"\!", r"\d")) else " "


def _without_units(text: str) -> str:
    r"""Drop words after a number, as plain words or as \text{ cm}^2; \text{} around the whole answer is taken off."""
    whole = re.fullmatch(r"\s*\\(?:text|textbf|mbox|mathrm|mathbf|text|textnormal)\s*\{([^{}]*)\}\s*", text)
    if whole:
        return whole[1].strip()
    text = re.sub(r"\s*\\(?:text|textbf|mbox|mathrm|textnormal)\s*\{[^{}]*\}\s*(?:\^\{?\d\}?)?\s*\.?$", "", text)
    unit = r"(?:[a-zA-Z]{2,}|[a-zA-Z])(?:\^\{?\d\}?)?"
    match = re.fullmatch(rf"(\s*{NUMBER}(?:\s*/\s*\d+|\s+\d+/\d+)?)\s+{unit}(?:[ /]+{unit})*\.?\s*", text)
    match = match or re.fullmatch(rf"(\s*{NUMBER})(?:[a-zA-Z]{{2,}})\.?\s*", text)
    return match[1] if match else text


def _first_sentence(text: str) -> str:
    """Up to the end of the line, or a full stop that a further sentence follows."""
    line = text.strip("# \n").partition("\n")[0]
    return re.split(r"\.\s+(?=[A-Z(])", line, maxsplit=1)[0]


def _bare(text: str) -> str:
    """Without what encloses an answer: spaces, dollars, boxes, bold face, a full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip().removesuffix(".").strip("*").strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(text) > len(left) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
        if text.startswith(BOXES) and (held := last_boxed(text)) is not None:
            text = held
    return text


def _end_of_braces(text: str) -> int | None:
    """The place after the brace that closes the first one, or None."""
    depth = 0
    for place, character in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\"
        depth += 0 if escaped else (character == "{") - (character == "}")
        if depth == 0:
            return place + 1
    return None


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the elements of a pair, an interval or a set, or of a plain list; None if it is none."""
    match = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text)
    brackets, inner = (match[1] + match[3], match[2]) if match else ("", text)
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return (brackets, parts) if len(parts) > 1 else None


def _decimal(text: str) -> Fraction | None:
    return Fraction(text) if re.fullmatch(r"-?\d+(?:\.\d*)?", text) else None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign else value


def _equal(one: Fraction, other: Fraction) -> bool:
    """Exactly, or nearly where one is no whole number and so may be rounded."""
    if one == other or (one.denominator == 1 and other.denominator == 1):
        return one == other
    try:
        return math.isclose(one, other, rel_tol=CLOSE)
    except OverflowError:
        return False
