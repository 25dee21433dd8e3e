"""Whether two answers in LaTeX mean the same.

Both are normalized to one spelling (REWRITES), then compared part by part: lists, tuples, sets and intervals
by their items, chains like x = 1/3 ≈ 0.33 by their sides, amounts with their units (UNITS), and the remaining
single formulas by their exact values. math-verify parses formulas, and compares those without a value, for
example equations. math.py runs all this in a process that can be killed, so that only this process imports
these slow libraries.
"""

import json
import logging
import random
import re
import resource
import signal
import sys
from decimal import Decimal

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig
from sympy import Expr, Float, I, Rational

from .text import nested

SECONDS, MEMORY_MB = 5, 4096  # processor time of one comparison, and memory of the process
DIGITS = 2000                 # to which irrational numbers are compared
# The default drops letters that could be a unit, such as c or m
READING = LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True))
SIGNS = "+ - +- -+".split(), "+ ++ +++".split()  # of variables at random points, and of physical ones
# Pattern → replacement, in this order. ~ stands for a space.
REWRITES = r"""
\.{3,}|…|\\[lcdi]?dots[bcimo]?(?![a-zA-Z])→\\ldots
\.~*$→
\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])\.?→
\\(?:text)?color~*(?:\[\w*\])?\{[^{}]*\}|\\f?colorbox~*(?:\{[^{}]*\})?\{[^{}]*\}(?=\{)→
\\(?:bf|it|rm|sf|tt|em|bfseries|itshape|boldmath|small|normalsize|[lL]arge|LARGE|[hH]uge|strut)(?![a-zA-Z])~*→
\\(?:boldsymbol|bm|pmb|mathit|mathsf|mathtt|underline|uline|ensuremath|boxed|fbox|framebox)(?![a-zA-Z])→
,\\!~*|\{,\}|\\!→
(?<=\([A-J]\))(\}?)~*\\q?quad(?![a-zA-Z])→\1~
\\q+uad(?![a-zA-Z])→,
(?<!\\);→,~
(?<!\\)\\[,;:> \n]|(?<!\\)\\(?=~)|\s→~
\\\$→\\text{dollar}
\$→
−→-
\\(?:mathrm|operatorname)\{~*([eid])~*\}→\1
\\math(?:bf|rm|sf|tt|it)(?:~+(?=[a-zA-Z])|~*(?=\d))→
\\(?:text|mbox|hbox|mathrm|mathbf|text(?:bf|it|rm|sf|tt|up|normal)|emph|operatorname)(?![a-zA-Z])~*→\\text
\\text(?=\{~*[-+]?\\(?:[dtc]?frac|sqrt|pi|infty)(?![a-z]))→
\\text\{~*\(([A-J])\)~*\}→(\1)
\\text\{~*\(([A-J])\)~*([^{}~][^{}]*)\}→\\text{(\1)}\2
\\text\{~*(?:(?:the~)?(?:empty|null)~set)~*\}|\\varnothing|∅|\\\{~*\\\}→\\emptyset
\\text\{(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|exp)\}→\\\1
_~*\{?~*\\text\{~*(\w+)~*\}~*\}?→_{\1}
_~*\{?~*\\(max|min|odot)~*\}?→_{\1}
\\text\{~*(?:and|or)~*\}|(?<=~)(?:and|or)(?=~)→,
\\text\{dollar\}~*(\d(?:[\d.,]*\d)?)→\1\\text{dollar}
\\text\{~*(\d[\d.,]*\\text\{dollar\})~*\}→\1
\\text\{(?=[^{}]*\d)((?:[-+\d.,/~()]|and|or)+)\}→\1
\\text\{~*([-+]?\d[\d.,/]*)~*-?~*([a-zA-Z°%\\][^{}\d]*)\}→\1\\text{\2}
^\{((?:[^{}]|\{[^{}]*\})*)\}$→\1
(?<!\d)(\d{1,3})~(?=(?:\d{3}~)*\d{3}(?!\d|~*/|~*\d))→\1
(?<![\w.^])(\d+)~+(\d+)/(\d+)(?![\d/])→(\1+\\frac{\2}{\3})
(?:(?<!\\)\{~*\})?(?:\^~*\{?~*\\circ~*\}?|\\degree|°)(?:~*(?:\\text\{~*)?C\b\}?)?→\\text{degree}
\\?%→\\text{percent}
(?<=[\d}])~*\\(AA|Omega)(?![a-z])→\\text{\1}
\\mu~*\\text\{~*→\\text{mu
\\[dtc]frac→\\frac
\\frac~*\{(\\text\{[^{}]*\})\}~*\{(\\text\{[^{}]*\})\}→\1/\2
(?<=\\frac)~*(\d)~*(\d)→{\1}{\2}
(?<=\\frac)~*(\w|\\[a-zA-Z]+)~*\{→{\1}{
(?<=\\frac)~*(\{[^{}]*\})~*(\w)→\1{\2}
(?<![\w.^])(\d+)~*\\frac\{(\d+)\}\{(\d+)\}→(\1+\\frac{\2}{\3})
\\frac\{~*d~*(\\?[a-zA-Z]+)~*\}\{~*d~*(\w)~*\}→\1_{d\2}
(?<=[\w)}])~*\\ldots(?=~*(?:,|$|\\\}))→,\\ldots
(?<=\\sqrt)~*(\w)→{\1}
\\geqslant|\\geq(?![a-z])|≥|>=→\\ge
\\leqslant|\\leq(?![a-z])|≤|<=→\\le
\\(?:approx|simeq|sim)(?![a-zA-Z])→≈
^~*[=≈]~*→
\^\{?~*\\prime~*\}?→'
([a-zA-Z])''→\1_{2prime}
([a-zA-Z])'→\1_{prime}
np\.(?=[a-z])→
\\gamma(?![a-zA-Z])→g_{amma}
(?<![\\a-zA-Z])E_(?:\{(\w+)\}|(\w))→x_{e\1\2}
(?<![\\a-zA-Z])(?=(?:sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|log|ln|exp|pi)(?![a-zA-Z]))→\\
\\sqrt\(([^()]*)\)→\\sqrt{\1}
(?<=\d)\.(?!\d)→
(?<![\d.])\.(?=\d)→0.
(?<=\d)[eE]\+?(-?\d+)$→\\times~10^{\1}
(?<!\\)(\{\d{1,3}),(\d{3}\})→\1\2
\+\\infty→\\infty
(?<![^,~])\([a-zA-Z](?:,~*[a-zA-Z])*\)~*(?:=|\\in(?![a-z]))~*→
^[a-zA-Z]~*(?:\\in(?![a-z])|=(?=~*(?:\([^()]*,[^()]*\)$|\\\{)))~*→
~+→~
^[~,]+|[~,.]+$→
"""
UNITS = r"""
\\text|\\cdot|[{}.]→~
~per~→/
\b(?:square|sq)~+([a-z]+)→\1^2
\bcubic~+([a-z]+)→\1^3
(?<=[a-z])s\b→
\bdeg\b→degree
\busd\b→dollar
\bcentimeter\b→cm
\bmeter\b→m
\bkilometer\b→km
\bmillimeter\b→mm
\b(?:inche|in)\b→inch
\b(?:feet|ft)\b→foot
\bmi\b→mile
\bmin\b→minute
\b(?:h|hr)\b→hour
\b(?:s|sec)\b→second
\byr\b→year
\b(?:kmh|kph)\b→km/hour
\bmph\b→mile/hour
\bkilogram\b→kg
\bgram\b→g
~→
"""
SQUEEZED = r"""
\\text\{~*(\w+)~*\}→\1
(?<!\d)~+|~+(?!\d)→
\{(\w|\\[a-zA-Z]+)\}→\1
"""
# Units that count without \text. Others are taken for variables
PLAIN_UNIT = r"""(?x)(?: percent | degree | dollar | cent | [ckmn]?m | inch | foot | mile | minute
    | hour | second | day | year | unit | k?g | [km]?ev | k?j | hz )\b"""
WORD = r"\\text\{[^{}]*\}|[A-Za-z][a-z]{3,}[a-z ,'-]*"
NAME = r"(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})(?:_\w|_\{[^{}]*\})?(?:\s*\(\w\))?"  # x, f(x), X_{d}
LETTER = r"(?:\\text\{\s*)?\(?[A-J]\)?\}?"
CHOICE = r"""(?x)^ (?:\\text\{\s*)? \(?([A-J])[).:]\s* \}? \s*[:.=]?\s*  # (C) 36
    (?! [=+*/^_,<>}\s] | \\(?:cup|cap|times|cdot|to)\b ) (.+)$"""
# Text, a number in another base, numbers side by side, and dots: math-verify would skip them or add them up
NO_VALUE = r"\\text|\d_\{?\d|(?<![_^.\d])[\d.]*\d \d|(?<![\w^.])\d+ ?\{\d|(?<![\w}^\]])\{\d+\} ?\{?\d|\\ldots"
# A product without a sign, which math-verify would read as a sum: 2(3), (2)(3), \frac{6}{3}(4)
PRODUCT = r"(?<![_^.\d])\d[\d.]*\s*(?=\()|\\frac\{\d+\}\{\d+\}\s*(?=\()|\)\s*(?=[\d(]|\\frac)"
LONG = r"-?(?:[1-9]\d*\.\d{6,}|0?\.0*[1-9]\d{5,})"  # a decimal of at least six digits and places
BRACKETS = "() [] (] [)".split()  # of tuples and intervals
GROUP = nested(r"\\?[(\[{](?:[^()\[\]{}\\]|\\[^{}]|X)*\\?[)\]}]")


def serve():
    """The main function of that process. It reads pairs, and prints "ready", then true or false for each."""
    resource.setrlimit(resource.RLIMIT_AS, [MEMORY_MB << 20] * 2)
    logging.disable(logging.CRITICAL)
    print('"ready"', flush=True)
    for pair in json.load(sys.stdin):
        # processor time, so that a busy machine changes no verdict. Nothing catches the signal, so it ends
        # the process even inside a library's C code
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(same_math(*pair)), flush=True)


def rewrite(text, table):
    """The text in the spelling of a table."""
    text = text.strip().replace(" ", "~")
    for line in table.strip().splitlines():
        text = re.sub(*line.split("→"), text)
    return text.replace("~", " ")


def squeeze(text):
    """Drops meaningless spaces and braces. \\frac{1}{23} is not \\frac{12}{3}, and 1 1/2 is not 11/2."""
    return rewrite(text, SQUEEZED)


def same_math(gold, answer, physical=False):
    """Whether two answers in LaTeX mean the same. physical: see MathProblem."""
    gold, answer = rewrite(gold, REWRITES), rewrite(answer, REWRITES)
    return same(chosen(gold, answer), chosen(answer, gold), physical)


def chosen(text, other):
    """For a letter with its value, as in (C) 36: the letter if the other side is a letter, else the value."""
    return re.sub(CHOICE, r"\1" if re.fullmatch(LETTER, other) else r"\2", text)


def same(gold, answer, physical):
    if squeeze(gold) == squeeze(answer):
        return gold != ""
    if re.fullmatch(WORD, gold):
        meant, said = (re.sub(r"\\text|[{}()\s.,'\"]", "", text).lower() for text in (gold, answer))
        return meant == said
    if bool(parts(gold)) != bool(parts(answer)):  # 13,535 is one number if the other is
        gold, answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (gold, answer))
    ours, theirs = parts(gold), parts(answer)
    if ours and theirs:
        return same_items(*ours, *theirs, physical)
    if theirs and not theirs[0] and theirs[1][1:]:  # 1/2 or 0.5
        return all(same(gold, item, physical) for item in theirs[1])
    if (ours or theirs) and not re.search(r"[<>]|\\[lg][et](?![a-z])", gold + answer):
        return False
    compare = same_sides if re.search("[=≈]", gold + answer) else same_amount
    return compare(gold, answer, physical)


def same_items(kind, gold, other, answer, physical):
    """Compares tuples, intervals and anything with dots in order, but sets, lists and unions in any order."""
    if kind != other or len(gold) != len(answer):
        return False
    if kind in BRACKETS or r"\ldots" in gold:
        return all(same(a, b, physical) for a, b in zip(gold, answer))
    for item in gold:
        for candidate in answer:
            if same(item, candidate, physical):
                answer.remove(candidate)
                break
        else:
            return False
    return True


def same_sides(gold, answer, physical):
    """x = 5 equals 5, but not y = 5. In x = 10/3 ≈ 3.33, one side must be equal, and the others rounded."""
    (name, *ours), (other, *theirs) = map(sides, (gold, answer))
    if (name or ours[1:]) and (other or theirs[1:]) and (not name or name != other):
        says_something = name or None in map(value, ours)  # 1 + 1 = 2 has no more content than 3 = 3
        return same_formula(gold, answer, physical) if says_something else False
    if ours[1:] and not name:
        return False
    meant, found = ours[-1], False
    if theirs[1:] and not other and value(meant) is not None and value(theirs[0]) is None:
        theirs = theirs[1:]  # the expression whose value is the answer
    for side in theirs:  # sides before the answer round to it, and it rounds to those after it
        if same(meant, side, physical):
            found = True
        elif not (rounds(meant, side) if found else rounds(side, meant)):
            return False
    return found


def sides(text):
    """'x = 10/3 ≈ 3.33' → ['x', '10/3', '3.33']. The first is '' if there is no name."""
    name, rest = re.fullmatch(rf"(?s)(?:({NAME})\s*[=≈])?(.*)", text).groups()
    return [squeeze(name or ""), *map(str.strip, re.split("[=≈]", rest))]


def same_amount(gold, answer, physical):
    """Compares amounts with a unit on one side, or the same unit on both. 15% is 15 or 0.15."""
    amounts = [split_unit(gold, 2), split_unit(answer, 1)]
    (amount, unit), (said, other) = amounts
    hundredths = [f"({text})/100" if unit else text for text, unit in amounts]
    if (unit or other) and unit in ("", other or unit) and (
            same(amount, said, physical) or {unit, other} == {"percent", ""} and same(*hundredths, physical)):
        return True
    return same_formula(gold, answer, physical)


def split_unit(text, shortest):
    """'10 \\text{cm}^2' → ('10', 'cm^2'). shortest: letters without \\text (37 m may be a product)"""
    words, power = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}", r"\^\{?-?\d\}?"
    found = re.search(r"(?:(?<=[\d})!])|(?<=[a-zA-Z])(?=\s*\\text))\s*"
                      rf"({words}(?:{words}|{power}|[-/\s]|\\cdot)*"
                      rf"|\s[a-zA-Z/]{{{shortest},}}(?:{power})?)$", text)
    unit = rewrite(found[1].lower(), UNITS) if found else ""
    is_unit = unit and (re.match(PLAIN_UNIT, unit)
                        or "\\text" in found[1] and not text[found.start() - 1].isalpha())
    return (text[:found.start()], unit) if is_unit else (text, "")


def parts(text):
    """('()', ['1', '2']) of a tuple or interval, '∪' of a union, '' of a list or set. None of one formula."""
    union = cut(text, r"\\cup(?![a-z])")
    if union[1:]:
        return "∪", union
    opening, inner, closing = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", text, re.S).groups()
    kind = opening + closing
    if kind != r"\{\}" and (kind not in BRACKETS or r"\pm" in text) or cut(text)[1:]:
        kind, inner = "", text
    items = []
    for item in cut(inner):  # of 1 ± 2 both
        items += sorted({item.replace(r"\pm", sign) for sign in "+-"})
    return (kind.strip(r"\{}"), items) if items[1:] or kind == r"\{\}" else None


def cut(text, separator=","):
    """The pieces between separators outside all brackets."""
    return [piece.strip()
            for piece in re.findall(rf"(?s){separator}|(?:{GROUP}|(?!{separator})\\?.)+", text)
            if not re.fullmatch(rf"\s*|{separator}", piece)]


# --- one formula -------------------------------------------------------------------------------------------

def number(text):
    """A decimal, also with a power of ten, as a Decimal. None for other text."""
    plain = re.sub(r"\\(?:times|cdot)10\^\{?([-+]?\d+)\}?$", r"e\1", squeeze(text))
    return Decimal(plain) if re.fullmatch(r"[-+]?\d*\.?\d+(?:e[-+]?\d{1,9})?", plain) else None


def formula(text):
    """math-verify's parse, with decimals as fractions: [sympy's expression, its text], [its text] or []."""
    text = re.sub(PRODUCT, r"\g<0>\\cdot ", text)
    found = parse(f"$\\boxed{{{text}}}$", [READING], parsing_timeout=None)
    if found and not isinstance(found[0], str):
        # depending on context, i becomes one of two symbols, neither of which is the imaginary unit
        exact = {decimal: Rational(str(decimal)) for decimal in found[0].atoms(Float)} | {
            symbol: I for symbol in found[0].free_symbols if symbol.name == "i"}
        found[0] = found[0].xreplace(exact)
    return found


def value(text):
    """The exact value of a formula without variables, or None for all others."""
    found = formula(text)
    return found[0] if found and isinstance(found[0], Expr) and not found[0].free_symbols else None


def rounds(text, rounded, most=0.500001):
    """Whether a formula's value, rounded to the number of places of a decimal, is that decimal. most: how
    much larger it may be, in units of the last place (1 if the decimal may also be truncated)."""
    decimal, exact = number(rounded), value(text)
    if decimal is None or exact is None:
        return False
    sign, _, exponent = decimal.as_tuple()
    rest = ((exact - Rational(str(decimal))) * (-1) ** sign * Rational(10) ** -exponent).evalf()
    return bool(rest.is_Number and -0.500001 <= rest <= most)


def same_formula(gold, answer, physical):
    a, b = number(gold), number(answer)
    if None not in (a, b):
        last_digit = Decimal(1).scaleb(a.as_tuple().exponent)
        return a == b or physical and abs(a - b) <= min(abs(a) / 10000, last_digit / 2)
    ours, theirs = formula(gold), formula(answer)
    if not (ours and theirs) or re.search(NO_VALUE, f"{gold}\n{answer}"):
        return False
    verdict = same_value(ours[0], theirs[0], physical)
    if verdict is None:
        return bool(verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True))
    return verdict or any(rounds(exact, decimal, 1) for exact, decimal in ((gold, answer), (answer, gold))
                          if re.fullmatch(LONG, decimal))


def same_value(gold, answer, physical):
    """Whether two expressions have equal values, to DIGITS digits, at some random points, or None if that is
    undecided. physical: at points where all variables are positive."""
    if not all(isinstance(side, Expr) and not side.is_Matrix for side in (gold, answer)):
        return None
    symbols = gold.free_symbols | answer.free_symbols
    for signs in SIGNS[physical] if symbols else "+":
        point = {symbol: coordinate(symbol.name, signs) for symbol in symbols}
        rest = abs((gold.xreplace(point) - answer.xreplace(point)).doit()).evalf(2, maxn=DIGITS)
        if not (rest.is_Number and rest.is_finite):
            return None
        if rest.is_comparable and rest != 0:
            return False
    return True


def coordinate(name, signs):
    """A variable's value at the random point with these signs."""
    chance = random.Random(name + signs)
    return Rational(f"{chance.choice(signs)}{chance.randrange(3, 100)}/7")
