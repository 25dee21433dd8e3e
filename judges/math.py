"""Mathematics: a final answer in LaTeX, and whether it says the same as the benchmark's.

Both are bphysicalt into one spelling (REWRITES), then compared part by part: lists, tuples, sets and intervals
by their items, chains like x = 1/3 ≈ 0.33 by their sides, amounts with their units (UNITS), and what is left,
one formula, by math-verify. All this happens in a process that can be killed.
"""

import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from .text import answer_text

SECONDS, MEMORY_MB = 5, 4096  # of processor time for one comparison; for the process that makes them
ENCLOSED = re.compile(  # $$1/2$$, \[1/2\], $1/2$, \(1/2\)
    r"\$\$(?s:(.+?))\$\$|\\\[(?s:(.+?))\\\]|\$(.+?)(?<!\\)\$|\\\((.+?)\\\)")
# The marks of bold and italics, and not those of 2**3, x^* or a*b
EMPHASIS = re.compile(r"(?<![\w)\]{}*^])\*{1,3}(?=[^\s*}])|(?<=[^\s*^{])\*{1,3}(?![\w(\[{}\\*])|^__(?=\S)|(?<=\S)__$", re.M)
ANNOUNCED = re.compile(r"""(?: \banswers?\b (?:\ (?:to|of|for)\b[^.\n:=]{0,80}?)? \s* (?: [:=] | \b(?:is|are|equals|(?:must|would|should)\ be)\b:? )
    | ^\W*(?:the\ )?(?:final\ )?answer\W*$ )
    (?: [\s,:]* \b(?:therefore|thus|hence|then|so|simply|just|indeed|exactly|clearly|equal\ to|given\ by|option|choice)\b [,:]? )*""",
    re.I | re.M | re.X)
REMARK = re.compile(  # what may follow an answer on its line
    r",?\s+(?:since|because|as|which|where|so|I hope)\b.*|\s*\((?:since|because|as)\b.*|[.;!]?\s*$|[.;!]\s+[A-Z\\$].*")
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
UNBRACED = re.compile(r".*?(?=\s*(?:\$|\\[)\]]|[.,;]?\s*$|[.,;]\s|\s[a-zA-Z]{2,}))", re.M)  # what \boxed 5 has in it
LISTED = re.compile(r"""}? S* (?: [,;] S* (?:W S*)? | W S* ) (?:[a-zA-Z](?:_\{?\w\}?)? \s* = )? S*"""  # between two boxes
                    .replace("S", r"(?:[\s$~]|\\[()\[\],;:]|\\q?quad)").replace("W", r"(?:(?:\\text\{\s*)?(?:or|and)\b(?:\s*\})?)"),
                    re.X)


@dataclass(frozen=True)
class MathProblem:
    """A question and its answer in LaTeX. physical: its variables are positive quantities, and two decimals may
    differ by 1e-4 of their size."""

    key: str
    question: str
    gold: str
    physical: bool = False
    batch = 1024

    def answer_in(self, response):
        """The last box; without one, what is tagged or called the answer, or a response of one formula."""
        text = answer_text(response).strip()
        answer = ", ".join(boxes(text))
        if not answer:
            text = EMPHASIS.sub("", text)
            brief = "\n" not in text and (len(text) < 20 or re.search(r"[\d\\]", text))
            answer = called_answer(text) or (text if brief or "<answer>" in response else "")
        return answer.strip() if 0 < len(answer.strip()) <= 1000 else None

    @staticmethod
    def judge(problems, answers, executor):
        """[MathProblem], [answer or None] → one {"correct"} for each, in order."""
        pairs = [(p.gold, answer or "", p.physical) for p, answer in zip(problems, answers)]
        return [{"correct": correct} for correct in compare(pairs)]


def called_answer(text):
    """What stands behind the last "answer is" or "answer:", without what encloses it; '' if there is none."""
    pieces = [piece.strip() for piece in ANNOUNCED.split(text)[1:] if piece.strip(" \n.")]
    if not pieces:
        return ""
    found = ENCLOSED.match(pieces[-1])
    return found[found.lastindex] if found else REMARK.sub("", pieces[-1].split("\n")[0])


def read_math(key, row, physical=False):
    """AIME, AMC, MATH-500, Minerva, OlympiadBench: each has its own names for question and answer."""
    if "final_answer" in row:
        gold = ", ".join(row["final_answer"])
    elif "solution" in row and "answer" not in row:  # Minerva's own file
        gold = boxed(row["solution"])
    else:
        gold = str(row["answer"])
    question = "\n".join(filter(None, [row.get("context"), row.get("problem") or row["question"]]))
    return MathProblem(key, f"{question.strip()}\n\nPut the final answer in \\boxed{{}}.", gold, physical)


def boxed(text):
    """The content of the last \\boxed{…} that has any, or None. A last box that is never closed is no answer."""
    return (boxes(text) or [None])[-1]


def boxes(text):
    """The contents of the last \\boxed{…} and of those before it with which it makes up a list, as in
    x=\\boxed{1} or x=\\boxed{2}."""
    contents, end = [], 0
    for box in BOX.finditer(text):
        start = box.end()
        content = braced(text, start) if text.startswith("{", start) else UNBRACED.match(text, start)[0]
        if content is None:
            contents = []
        elif content.strip(" {}~\\,;"):
            contents = [*(contents if LISTED.fullmatch(text, end, box.start()) else ()), content]
            end = text.index(content, start) + len(content)
    return contents


def braced(text, start):
    """What stands between the brace at `start` and the one that closes it, or None."""
    depth = 0
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1:brace.start()]
    return None


# --- a process that can be killed ------------------------------------------------------------------------

def compare(pairs):
    """[(gold, answer, physical)] → [whether they say the same]; one that takes longer than SECONDS does not."""
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
        # processor time, so that a busy machine changes no verdict; nothing catches the signal, so it ends
        # the process even inside a library's C code
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(same_math(*pair)), flush=True)


# --- one spelling ------------------------------------------------------------------------------------------

def table(lines):
    """Pattern → what it becomes, in this order; ~ stands for a space."""
    return [line.split("→") for line in lines.strip("\n").split("\n")]


REWRITES = table(r"""
\.{3,}|…|\\[lcdi]?dots[bcimo]?(?![a-zA-Z])→\\ldots
\.~*$→
\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])\.?→
\\(?:text)?color~*\{[^{}]*\}|\\f?colorbox~*(?:\{[^{}]*\})?\{[^{}]*\}(?=\{)→
\\(?:bf|it|rm|sf|tt|em|bfseries|itshape|boldmath|small|normalsize|large|Large|LARGE|huge|Huge|strut)(?![a-zA-Z])~*→
\\(?:boldsymbol|bm|pmb|mathit|mathsf|mathtt|underline|uline|ensuremath)(?![a-zA-Z])→
,\\!~*|\{,\}|\\!→
\\q+uad(?![a-zA-Z])→,
(?<!\\)\\[,;:> \n]|(?<!\\)\\(?=~)|\s→~
\\\$→\\text{dollar}
\$→
−→-
\\(?:mathrm|operatorname)\{~*([eid])~*\}→\1
\\(?:text|mbox|hbox|mathrm|mathbf|text(?:bf|it|rm|sf|tt|up|normal)|emph|operatorname)(?![a-zA-Z])~*→\\text
\\text(?=\{~*[-+]?\\(?:[dtc]?frac|sqrt|pi|infty)(?![a-z]))→
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
""")
UNITS = table(r"""
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
""")
# The units that count without \text; others are taken for variables
PLAIN_UNIT = ("(?:percent|degree|dollar|cent|[ckmn]?m|inch|foot|mile|minute|hour|second|day|year|unit|k?g|"
              "[km]?ev|k?j|hz)")
# Text, a number in another base, numbers side by side, and dots: math-verify would skip it, or compute with it
NO_VALUE = r"\\text|\d_\{?\d|(?<![_^.\d])[\d.]*\d \d|(?<![\w^.])\d+ ?\{\d|(?<![\w}^\]])\{\d+\} ?\{?\d|\\ldots"
CHOICE = re.compile(r"(?:\\text\{\s*)?\(?([A-J])[).:]\s*\}?\s*[:.=]?\s*(?![=+*/^_,<>}\s]|\\(?:cup|cap|times|cdot|to)\b)(.+)")
MAX_BITS = 1 << 24  # of a number that is computed exactly
DIGITS = 2000       # to which irrational numbers are compared
BRACKETS = "()", "[]", "(]", "[)"  # of tuples and intervals
NAME = r"(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})(?:_\w|_\{[^{}]*\})?(?:\(\w\))?"  # x, f(x), X_{d}


def rewrite(text, patterns):
    """The text in the spelling of a table."""
    text = text.strip().replace(" ", "~")
    for pattern, plain in patterns:
        text = re.sub(pattern, plain, text)
    return re.sub("~+", " ", text).strip(" ,").rstrip(". ,")


def squeeze(text):
    """Without the spaces and braces that mean nothing: \\frac{1}{23} is not \\frac{12}{3}, nor 1 1/2 11/2."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\\text\{\s*(\w+)\s*\}", r"\1", text))
    return re.sub(r"\{(\w|\\[a-zA-Z]+)\}", r"\1", text)


# --- do they say the same? ---------------------------------------------------------------------------------

def same_math(gold, answer, physical=False):
    """Whether two answers in LaTeX say the same. physical: as of a MathProblem."""
    gold, answer = rewrite(gold, REWRITES), rewrite(answer, REWRITES)
    return same(chosen(gold, answer), chosen(answer, gold), physical)


def chosen(text, other):
    """Of a letter with its value, as in (C) 36, the one of the two that the other side has."""
    choice = CHOICE.fullmatch(text)
    if not choice or CHOICE.fullmatch(other):
        return text
    return choice[1] if re.fullmatch(r"(?:\\text\{\s*)?\(?[A-J]\)?\}?", other) else choice[2]


def same(gold, answer, physical):
    if squeeze(gold) == squeeze(answer):
        return gold != ""
    if re.fullmatch(r"\\text\{[^{}]*\}|[A-Za-z][a-z]{3,}[a-z ,'-]*", gold):  # a word
        meant, said = (re.sub(r"\\text|[{}()\s.,'\"]", "", text).lower() for text in (gold, answer))
        return meant == said
    ours, theirs = parts(gold), parts(answer)
    if bool(ours) != bool(theirs):  # 13,535 is one number if the other side is one
        gold, answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (gold, answer))
        ours, theirs = parts(gold), parts(answer)
    if ours and theirs:
        return same_items(*ours, *theirs, physical)
    if theirs and not ours and not theirs[0] and theirs[1][1:]:  # 1/2 or 0.5
        return all(same(gold, item, physical) for item in theirs[1])
    if (ours or theirs) and not re.search(r"[<>]|\\[lg][et](?![a-z])", gold + answer):
        return False
    if re.search("[=≈]", gold + answer):
        return same_sides(gold, answer, physical)
    return same_amount(gold, answer, physical) or same_formula(gold, answer, physical)


def same_items(kind, gold, other, answer, physical):
    """Tuples and intervals by the place of their items; sets, lists and unions in any order, each once."""
    if kind != other or len(gold) != len(answer):
        return False
    if kind in BRACKETS or r"\ldots" in gold:
        return all(same(a, b, physical) for a, b in zip(gold, answer))
    for item in gold:
        match = next((candidate for candidate in answer if same(item, candidate, physical)), None)
        if match is None:
            return False
        answer.remove(match)
    return True


def same_sides(gold, answer, physical):
    """x = 5 is 5, and it is not y = 5. Of x = 10/3 ≈ 3.33 one side is right, and the others round to it."""
    (name, *ours), (other, *theirs) = map(sides, (gold, answer))
    is_equation, is_other = name or len(ours) > 1, other or len(theirs) > 1
    if is_equation and is_other and (not name or name != other):  # 1 + 1 = 2 says as little as 3 = 3
        says_something = bool(name) or any(value(side) is None for side in ours)
        return says_something and same_formula(gold, answer, physical)
    if is_equation and not name:
        return False
    meant = ours[-1]
    if len(theirs) > 1 and not other and value(meant) is not None and value(theirs[0]) is None:
        theirs = theirs[1:]  # what the answer is the value of
    found = False
    for side in theirs:  # what stands before the answer rounds to it, and it to what follows
        if same(meant, side, physical):
            found = True
        elif not (rounds(meant, side) if found else rounds(side, meant)):
            return False
    return found


def sides(text):
    """'x = 10/3 ≈ 3.33' → ['x', '10/3', '3.33']; the first is '' if there is no name."""
    pieces = [piece.strip() for piece in re.split("[=≈]", text)]
    name = squeeze(pieces[0])
    return [name, *pieces[1:]] if pieces[1:] and re.fullmatch(NAME, name) else ["", *pieces]


def same_amount(gold, answer, physical):
    """With a unit on one side, or the same one on both; 15% is 15 or 0.15."""
    amounts = [split_unit(gold, 2), split_unit(answer, 1)]
    (amount, unit), (said, other) = amounts
    if not (unit or other) or unit and other and unit != other:
        return False
    hundredths = [f"({text})/100" if unit else text for text, unit in amounts]
    return same(amount, said, physical) or {unit, other} == {"percent", ""} and same(*hundredths, physical)


def split_unit(text, shortest):
    """'10 \\text{cm}^2' → ('10', 'cm^2'). shortest: letters of one without \\text; 37 m may be a product"""
    words, power = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}", r"\^\{?-?\d\}?"
    found = re.search(r"(?:(?<=[\d})!])|(?<=[a-zA-Z])(?=\s*\\text))\s*"
                      rf"({words}(?:{words}|{power}|[-/\s]|\\cdot)*"
                      rf"|\s[a-zA-Z/]{{{shortest},}}(?:{power})?)$", text)
    unit = rewrite(found[1].lower(), UNITS) if found else ""
    if not unit:
        return text, ""
    could_be_words = "\\text" not in found[1] or text[found.start() - 1].isalpha()
    if could_be_words and not re.match(rf"{PLAIN_UNIT}\b", unit):
        return text, ""
    return text[:found.start()], unit


def number(text):
    """A decimal, also with a power of ten, as Decimal; or None."""
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    plain = re.sub(r"\\(?:times|cdot)10\^\{?([-+]?\d+)\}?$", r"e\1", plain)
    return Decimal(plain) if re.fullmatch(r"[-+]?\d*\.?\d+(?:e[-+]?\d{1,9})?", plain) else None


def rounds(text, rounded, units=0.500001):
    """Whether a formula's value is a decimal, but for so many units of the decimal's last place."""
    import sympy
    decimal, exact = number(rounded), value(text)
    if decimal is None or exact is None:
        return False
    unit = sympy.Rational(10) ** decimal.as_tuple().exponent
    return bool(abs(exact - sympy.Rational(str(decimal))).evalf() <= units * unit)


def value(text):
    """The exact number that a formula without variables stands for; None for all others."""
    exact = scalar(formula(text))
    return None if exact is None or exact.free_symbols else exact


def formula(text):
    """What math-verify reads in it: [sympy's expression, its text], [its text] or []."""
    import sympy
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig
    reading = LatexExtractionConfig(  # its default drops what could be a unit, such as c or m
        normalization_config=NormalizationConfig(malformed_operators=True))
    # it adds integers that stand side by side, and reads 2(3) as 5
    text = re.sub(r"(?<![_^.\d])\d[\d.]*\s*(?=\()|\\frac\{\d+\}\{\d+\}\s*(?=\()|\)\s*(?=[\d(]|\\frac)", r"\g<0>\\cdot ", text)
    found = parse(f"$\\boxed{{{text}}}$", [reading], parsing_timeout=None)
    for symbol in getattr(found[0], "free_symbols", ()) if found else ():
        if symbol.name == "i":  # two kinds of it, neither the imaginary unit, depending on what stands around
            found[0] = found[0].subs(symbol, sympy.I)
    return found


def scalar(found):
    """The expression that was read, with decimals as fractions, if it is one whose value can be computed."""
    import sympy
    from sympy.core.function import AppliedUndef
    found = found[0] if found else None
    if not isinstance(found, sympy.Expr) or found.is_Matrix or found.has(
            AppliedUndef, sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.oo, sympy.zoo,
            sympy.nan) or bits(found) > MAX_BITS:
        return None
    return found.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in found.atoms(sympy.Float)})


def bits(expression):
    """About how many bits the value of an expression takes, which is not computed; a variable is below 16."""
    import sympy
    arguments = getattr(expression, "args", ())
    if getattr(expression, "is_Rational", False):
        return max(expression.p.bit_length(), expression.q.bit_length())
    sizes = [bits(argument) for argument in arguments] or [4]
    if isinstance(expression, (sympy.Pow, sympy.exp, sympy.factorial, sympy.binomial)):
        return sizes[0] * (abs(arguments[-1]) if arguments[-1].is_Rational else 2 ** min(sizes[-1], 64))
    return max(sizes) + 1 if isinstance(expression, sympy.Add) else sum(sizes)


def same_value(gold, answer, physical):
    """Whether two expressions have equal values, to DIGITS digits, wherever their variables are put; None if that
    cannot be said. physical: only where all variables are positive."""
    import sympy
    symbols = gold.free_symbols | answer.free_symbols
    for place in range(4 if symbols else 1):
        values = {}
        for symbol in symbols:
            chance = random.Random(f"{symbol.name} {place}")
            sign = 1 if physical else [1, -1, chance.choice([1, -1]), chance.choice([1, -1])][place]
            values[symbol] = sign * sympy.Rational(chance.randrange(3, 100), 7)
        difference = (gold.xreplace(values) - answer.xreplace(values)).doit()
        rest = difference if difference.is_Rational else difference.evalf(2, maxn=DIGITS)
        if not rest.is_number or rest.has(sympy.nan, sympy.zoo, sympy.oo):
            return None
        if any(part.is_comparable and part != 0 for part in rest.as_real_imag()):
            return False
    return True


def same_formula(gold, answer, physical):
    from math_verify import verify
    if re.search(NO_VALUE, f"{gold}\n{answer}"):
        return False
    a, b = number(gold), number(answer)
    if a is not None and b is not None:
        last_digit = Decimal(1).scaleb(a.as_tuple().exponent)
        return a == b or physical and abs(a - b) <= min(abs(a) / 10000, last_digit / 2)
    ours, theirs = formula(gold), formula(answer)
    if any(bits(found[0]) > MAX_BITS and not found[0].free_symbols for found in (ours, theirs) if found):
        return ours == theirs  # a tower of powers
    exact, said = scalar(ours), scalar(theirs)
    verdict = None if exact is None or said is None else same_value(exact, said, physical)
    if verdict is None:
        return bool(verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True))
    return verdict or approximates(answer, gold) or approximates(gold, answer)


def approximates(decimal, formula):
    """Whether a decimal of six places and digits or more agrees with a formula's value in all of them."""
    sign, digits, exponent = (number(decimal) or Decimal()).as_tuple()
    return len(digits) >= 6 and exponent <= -6 and rounds(formula, decimal, 1)


# --- parts -------------------------------------------------------------------------------------------------

def parts(text):
    """('()', ['1', '2']) of a tuple or interval, '∪' of a union, '' of a list or set; None of one formula."""
    if len(union := cut(text, r"\cup")) > 1:
        return "∪", union
    opening, inner, closing = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", text, re.S).groups()
    kind = opening + closing
    if kind != r"\{\}" and (kind not in BRACKETS or r"\pm" in text) or len(cut(text)) > 1:
        kind, inner = "", text
    items = [item.replace(r"\pm", sign) for item in cut(inner) for sign in ("+-" if r"\pm" in item else "+")]
    return (kind.strip(r"\{}"), items) if len(items) > 1 or kind == r"\{\}" else None


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
