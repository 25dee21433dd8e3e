"""Mathematics: a final answer in LaTeX, and whether it says the same as the benchmark's.

Both are brought into one spelling (REWRITES), then compared part by part: lists, tuples, sets and intervals
by their items, chains like x = 1/3 ≈ 0.33 by their sides, numbers with their units, and what is left, one
formula, by math-verify. All this happens in a process that can be killed.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from .text import answer_text

SECONDS, MEMORY_MB = 5, 4096  # for one comparison; for the process that makes them


@dataclass(frozen=True)
class MathProblem:
    """A question and its answer in LaTeX. rough: decimals may differ by rounding, as Minerva's do."""

    key: str
    question: str
    gold: str
    rough: bool = False
    batch = 1024

    def answer_in(self, response):
        """The last box; without one, what is tagged or called the answer, or a response of one formula."""
        text = answer_text(response)
        answer = boxed(text)
        if answer is None:
            said = re.findall(r"(?i:.*answer(?: is|:))[ *]*(.+)", text)
            brief = "\n" not in text and (len(text) < 20 or re.search(r"[\d\\]", text))
            answer = re.sub(r"^\$(.+?)(?<!\\)\$.*", r"\1", said[-1]) if said else (
                text if brief or "<answer>" in response else "")
        return answer.strip() if 0 < len(answer.strip()) <= 1000 else None

    @staticmethod
    def judge(problems, answers, executor):
        """[MathProblem], [answer or None] → one {"correct"} for each, in order."""
        pairs = [(p.gold, answer or "", p.rough) for p, answer in zip(problems, answers)]
        return [{"correct": correct} for correct in compare(pairs)]


def read_math(key, row, rough=False):
    """AIME, AMC, MATH-500, Minerva, OlympiadBench: each has its own names for question and answer."""
    answer = row.get("final_answer", row.get("answer"))
    if answer is None:  # Minerva's own file has only solutions
        answer = boxed(row["solution"]) if "solution" in row else row["answer"]
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    question = "\n".join(filter(None, [row.get("context"), row.get("problem") or row["question"]]))
    return MathProblem(key, f"{question.strip()}\n\nPut the final answer in \\boxed{{}}.", str(answer), rough)


def boxed(text):
    """The content of the last \\boxed{…}, braces balanced, or None."""
    _, *boxes = re.split(r"\\(?:boxed|fbox)\s*\{", text)
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", boxes[-1] if boxes else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return boxes[-1][:brace.start()]
    return None


# --- a process that can be killed ------------------------------------------------------------------------

def compare(pairs):
    """[(gold, answer, rough)] → [whether they say the same], each in its seconds; one that hangs is wrong."""
    verdicts = []
    while len(verdicts) < len(pairs):
        done = subprocess.run([sys.executable, "-c", "from judges.math import serve; serve()"], text=True,
                              input=json.dumps(pairs[len(verdicts):]), capture_output=True,
                              cwd=Path(__file__).parents[1])
        ready, *lines = done.stdout.split() or [""]
        if not ready:
            raise OSError(f"math-verify does not start: {done.stderr.strip()[-300:]}")
        verdicts += map(json.loads, lines)
        verdicts += [False] * (len(verdicts) < len(pairs))  # the one in which the process died
    return verdicts


def serve():
    """The life of that process: pairs on standard input; "ready", then a line true or false for each."""
    import logging
    import resource
    import signal

    import math_verify  # noqa: F401  now, as importing takes longer than a comparison may
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    logging.disable(logging.CRITICAL)
    print('"ready"', flush=True)
    for pair in json.load(sys.stdin):
        signal.alarm(SECONDS)  # nothing catches it, so it ends the process even inside a library's C code
        print(json.dumps(same_math(*pair)), flush=True)


# --- one spelling ------------------------------------------------------------------------------------------

# Pattern → what it becomes, in this order; ~ stands for a space.
REWRITES = [line.split("→") for line in r"""
\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])\.?→
,\\!~*|\{,\}|\\!→
\\q+uad(?![a-zA-Z])→,
(?<!\\)\\[,;:> \n]|(?<!\\)\\(?=~)|\s→~
\\\$→\\text{dollar}
\$→
−→-
\\(?:mathrm|operatorname)\{~*([eid])~*\}→\1
\\(?:text|mbox|mathrm|mathbf|textbf|textit|textrm|operatorname)(?![a-zA-Z])~*→\\text
\\text\{(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|exp)\}→\\\1
_~*\{?~*\\text\{~*(\w+)~*\}~*\}?→_{\1}
\\text\{~*(?:and|or)~*\}|(?<=~)(?:and|or)(?=~)→,
\\text\{dollar\}~*(\d(?:[\d.,]*\d)?)→\1\\text{dollar}
\^~*\{?~*\\circ~*\}?|\\degree|°→\\text{degree}
\\?%→\\text{percent}
\\[dtc]frac→\\frac
(?<=\\frac)~*(\d)~*(\d)→{\1}{\2}
(?<=\\frac)~*(\w|\\[a-zA-Z]+)~*\{→{\1}{
(?<=\\frac)~*(\{[^{}]*\})~*(\w)→\1{\2}
(?<=\\sqrt)~*(\w)→{\1}
\\geqslant|\\geq(?![a-z])|≥→\\ge
\\leqslant|\\leq(?![a-z])|≤→\\le
\\(?:approx|simeq|sim)(?![a-zA-Z])→≈
^~*[=≈]~*→
\^\{?~*\\prime~*\}?→'
([a-zA-Z])''→\1_{2prime}
([a-zA-Z])'→\1_{prime}
np\.(?=[a-z])→
\\gamma(?![a-zA-Z])→g_{amma}
(?<![\\a-zA-Z])(?=(?:sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|exp|pi)(?![a-zA-Z]))→\\
\\sqrt\(([^()]*)\)→\\sqrt{\1}
(?<=\d)\.(?!\d)→
(?<![\d.])\.(?=\d)→0.
(?<=\d)[eE]\+?(-?\d+)$→\\times~10^{\1}
(?<!\\)(\{\d{1,3}),(\d{3}\})→\1\2
\+\\infty→\\infty
^[a-zA-Z]~*\\in(?![a-z])~*→
""".strip("\n").split("\n")]
UNITS = {alias: names.split()[0] for names in (  # other units must agree by the letter
    "percent", "degree deg", "dollar usd", "cent", "cm centimeter", "m meter", "km kilometer",
    "mm millimeter", "inch inches in", "foot feet ft", "mile mi", "minute min", "hour h hr", "second s sec",
    "day", "year yr", "unit", "km/hour kmh kph", "mile/hour mph", "kg kilogram", "g gram")
    for alias in names.split()}
# What an answer is the value of: x, f(x), X_{d}; or nothing
NAME = r"|(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})(?:_\w|_\{[^{}]*\})?(?:\(\w\))?"


def normal(text):
    text = text.strip().rstrip(".").replace(" ", "~")
    for pattern, plain in REWRITES:
        text = re.sub(pattern, plain, text)
    return re.sub("~+", " ", text).strip(" ,").rstrip(". ,")


def squeeze(text):
    """Without the spaces and braces that mean nothing: \\frac{1}{23} is not \\frac{12}{3}, nor 1 1/2 11/2."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\\text\{\s*(\w+)\s*\}", r"\1", text))
    return re.sub(r"\{(\w|\\[a-zA-Z]+)\}", r"\1", text)


def letters(text):
    """Whether there are variables in it."""
    return re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", re.sub(r"\\text\{[^{}]*\}", "", text))


# --- do they say the same? ---------------------------------------------------------------------------------

def same_math(gold, answer, rough=False):
    """Whether two answers in LaTeX say the same. rough: decimals may differ by rounding."""
    return same(normal(gold), normal(answer), rough)


def same(gold, answer, rough):
    if not gold or not answer or squeeze(gold) == squeeze(answer):
        return gold != "" and answer != ""
    if re.fullmatch(r"\\text\{[^{}]*\}|[A-Za-z][a-z]{3,}[a-z ,'-]*", gold):  # a word
        meant, said = (re.sub(r"\\text|[{}()\s.,'\"]", "", text).lower() for text in (gold, answer))
        return meant == said
    ours, theirs = parts(gold), parts(answer)
    if bool(ours) != bool(theirs):  # 13,535 is one number if the other side is one
        gold, answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (gold, answer))
        ours, theirs = parts(gold), parts(answer)
    if ours and theirs:
        return same_items(*ours, *theirs, rough)
    if (ours or theirs) and not re.search(r"[<>]|\\[lg][et](?![a-z])", gold + answer):
        return False
    if re.search("[=≈]", gold + answer):
        return same_sides(gold, answer, rough)
    words = "\\text" in gold + answer  # which math-verify skips
    return same_amount(gold, answer, rough) or not words and same_formula(gold, answer, rough)


def same_items(kind, gold, other, answer, rough):
    """Tuples and intervals by the place of their items; sets, lists and unions in any order, each once."""
    if kind != other and {kind, other} != {"", r"\{\}"} or len(gold) != len(answer):
        return False
    if kind[:1] in ("(", "["):
        return all(same(a, b, rough) for a, b in zip(gold, answer))
    left = list(answer)
    for item in gold:
        match = next((candidate for candidate in left if same(item, candidate, rough)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def same_sides(gold, answer, rough):
    """x = 5 is 5, and it is not y = 5. Of x = 10/3 ≈ 3.33 one side is right, and the others round to it."""
    (name, *ours), (other, *theirs) = (re.split("[=≈]", text) for text in (gold, answer))
    named, called = (bool(rest and re.fullmatch(NAME, squeeze(first)))
                     for first, rest in ((name, ours), (other, theirs)))
    if ours and theirs and name and other:
        if named and called and squeeze(name) != squeeze(other):
            return [*map(squeeze, [name, *ours])] == [*map(squeeze, [*theirs, other])]
        if not (named and called):  # two equations
            return same_formula(gold, answer, rough)
    if ours and not named:
        return False
    meant = ours[-1] if ours else name
    if not called and not (theirs and letters(other) and not letters(meant)):
        theirs = [other, *theirs]
    right = [same(meant, side.strip(), rough) for side in theirs]
    return any(right) and all(good or rounds(meant, side) or rounds(side, meant)
                              for good, side in zip(right, theirs))


def same_amount(gold, answer, rough):
    """With a unit on one side, or the same one on both; 15% is 15 or 0.15."""
    (gold, unit), (answer, other) = split_unit(gold, 2), split_unit(answer, 1)
    if unit == other or not unit or not other:
        percent = "percent" in (unit, other) and unit != other
        hundredth = (f"({gold})/100", answer) if unit else (gold, f"({answer})/100")
        return bool(unit or other) and (same(gold, answer, rough) or percent and same(*hundredth, rough))
    return False


def split_unit(text, shortest):
    """'10 \\text{cm}^2' → ('10', 'cm^2'). shortest: letters of one without \\text; 37 m may be a product"""
    words, power = r"\\text\{[^{}]*\}", r"\^\{?-?\d\}?"
    unit = rf"{words}(?:{words}|{power}|[-/\s]|\\cdot)*|\s[a-zA-Z/]+(?:{power})?"
    found = re.search(rf"(?<=[\d}})])\s*({unit})$", text)
    if not found:
        return text, ""
    name = re.sub(r"\\text|\\cdot|[{}.]", " ", found[1]).lower().replace(" per ", "/")
    name = re.sub(r"\b(?:square|sq)\s+([a-z]+)", r"\1^2", re.sub(r"\bcubic\s+([a-z]+)", r"\1^3", name))
    words = re.findall(r"[a-z]+|\S", name)
    names = [UNITS.get(word) or UNITS.get(word.removesuffix("s")) for word in words]
    if found[1][0] != "\\" and (len(words[0]) < shortest or not names[0]):
        return text, ""
    return text[:found.start()], "".join(name or word.removesuffix("s") for name, word in zip(names, words))


def number(text):
    """A decimal, also with a power of ten, as Decimal; or None."""
    plain = re.sub(r"\\(?:times|cdot)10\^\{?([-+]?\d+)\}?$", r"e\1", re.sub(r"\s", "", text))
    return Decimal(plain) if re.fullmatch(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", plain) else None


def rounds(text, rounded, digits=1):
    """Whether a formula's value, rounded like a decimal that has so many digits, is that decimal."""
    decimal, exact = number(rounded), value(text)
    if decimal is None or exact is None or len(decimal.as_tuple().digits) < digits:
        return False
    return abs(exact - complex(decimal)) <= 0.500001 * 10.0 ** decimal.as_tuple().exponent


def value(text):
    """A formula without variables as a complex number; None for all others."""
    try:
        return complex(formula(text)[0])
    except (TypeError, ValueError, IndexError, AttributeError):  # variables, a matrix, text, nothing
        return None


def formula(text):
    """What math-verify reads in it: [sympy's expression, its text], [its text] or []."""
    import sympy
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig
    reading = LatexExtractionConfig(  # its default drops what could be a unit, such as c or m
        normalization_config=NormalizationConfig(malformed_operators=True))
    # to sympy dx/dt is 0, as x is no function of t
    text = re.sub(r"\\frac\{\s*d\s*(\\?[a-zA-Z]+)\s*\}\{\s*d\s*(\w)\s*\}", r"\1_{d\2}", text)
    found = parse(f"$\\boxed{{{text}}}$", [reading], parsing_timeout=None)
    for symbol in getattr(found[0], "free_symbols", ()) if found else ():
        if symbol.name == "i":  # two kinds of it, neither the imaginary unit, depending on what stands around
            found[0] = found[0].subs(symbol, sympy.I)
    return found


def same_formula(gold, answer, rough):
    from math_verify import verify
    if re.search(r"\d_\{?\d", gold + answer):  # digits in another base, and the texts differ
        return False
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        last_digit = Decimal(1).scaleb(a.as_tuple().exponent)
        return abs(a - b) <= (min(abs(a) / 10000, last_digit / 2) if rough else 0)
    return bool(verify(formula(gold), formula(answer), timeout_seconds=None, allow_set_relation_comp=True))


# --- parts -------------------------------------------------------------------------------------------------

def parts(text):
    r"""('()', ['1', '2']) of a tuple or an interval, '\{\}' of a set, '' of a list; None of one formula."""
    if len(union := cut(text, r"\cup")) > 1:
        return "∪", union
    opening, inner, closing = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", text, re.S).groups()
    kind = opening + closing
    if kind != r"\{\}" and (kind not in ("()", "[]", "(]", "[)") or r"\pm" in text) or len(cut(text)) > 1:
        kind, inner = "", text
    items = [item.replace(r"\pm", sign) for item in cut(inner) for sign in ("+-" if r"\pm" in item else "+")]
    return (kind, items) if len(items) > 1 or kind == r"\{\}" else None


def cut(text, separator=","):
    """The pieces between separators that stand in no brackets."""
    pieces, depth = [""], 0
    for token in re.findall(r"\\cup(?![a-z])|\\?.", text, re.S):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        if token == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces if piece.strip()]
