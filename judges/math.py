"""Mathematics: finds the final answer of a response. latex.py compares it with the benchmark's."""

import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

from .text import answer_text, nested

# The marks of bold and italics, and not those of 2**3, x^* or a*b
EMPHASIS = r"""(?mx) (?<![\w)\]{}*^])\*{1,3}(?=[^\s*}]) | (?<=[^\s*^{])\*{1,3}(?![\w(\[{}\\*])
    | ^__?(?=\S) | (?<=\S)__?$"""
# After the last "answer is", "answer:" and the like: the content of $$1/2$$, \[1/2\], $1/2$ or \(1/2\), or
# else the rest of the line without an explanation that may follow the answer
CALLED = r"""(?imx) (?s:.*) (?: \banswers?\b (?:\ (?:to|of|for)\b[^.\n:=]{0,80}?)?
        (?:,?\ (?:therefore|thus|hence|then),?)?
        \s* (?: [:=] | \b(?:is|are|equals|(?:must|would|should)\ be)\b:? )
        | ^\W*(?:the\ )?(?:final\ )?answer\W*$ )
    (?: [\s,:]* \b(?:therefore|thus|hence|then|so|simply|just|indeed|exactly|clearly
        |consequently|accordingly|equal\ to|given\ by|option|choice)\b [,:]? )*
    [\s*]* (?: \$\$(?s:(.+?))\$\$ | \\\[(?s:(.+?))\\\] | \$(.+?)(?<!\\)\$ | \\\((.+?)\\\)
        | (?=[^\s.]) (.+?) (?:
        ,?\s+(?:since|because|as|which|where|so|I\ hope)\b.* | \s*\((?:since|because|as)\b.* | [.;!]?\s*$
        | [.;!]\s+(?-i:[A-Z]).* | [.;!]\s+[\\$].* ) )"""
BOX = r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*"
NOTHING = r"(?:[\s~\\,;$]|\{\s*\}|\\(?:text|mbox|q?quad)(?![a-zA-Z]))*\}"
BRACED = nested(r"\{(?:[^{}\\]|\\.|X)*\}")
# \boxed{5}, \boxed 5, \boxed\frac12 with its content
FULL = rf"""(?: {BOX} (?: \{{(?!{NOTHING})((?:[^{{}}\\]|\\.|{BRACED})*)\}}
    | (?!\{{)(.+?)(?=\s*(?:\$|\\[)\]]|[.,;]?\s*$|[.,;]\s|\s[a-zA-Z]{{2,}})) ) )"""
SPACE, WORD = r"(?:[\s$~]|\\[()\[\],;:]|\\q?quad)*", r"(?:(?:\\text\{\s*)?(?:or|and)\b(?:\s*\})?)"
# Text that may separate two boxes of a list
LISTED = rf"{SPACE}(?:[,;]{SPACE}{WORD}?|{WORD}){SPACE}(?:[a-zA-Z](?:_\{{?\w\}}?)?\s*=)?{SPACE}"
# A list of boxes, or one that is never closed
LAST = rf"(?mx){FULL}(?:{LISTED}{FULL})*|{BOX}\{{(?!{NOTHING})"


class MathProblem(namedtuple("MathProblem", "key question gold physical", defaults=[False])):
    """A question and its answer in LaTeX. physical: its variables are positive quantities, and two
    decimals may differ by 1e-4 of their size."""

    batch = 1024

    def answer_in(self, response):
        """The last box. Without one, the text tagged or called the answer, or a response of one formula."""
        text = answer_text(response).strip()
        answer = ", ".join(boxes(text))
        if not answer:
            text = re.sub(EMPHASIS, "", text)
            if called := re.match(CALLED, text):
                answer = called[called.lastindex]
            elif "<answer>" in response or re.fullmatch(r".{,19}|.*[\d\\].*", text):
                answer = text
        answer = answer.strip()
        return answer if 0 < len(answer) <= 1000 else None

    @staticmethod
    def judge(problems, answers, executor):
        """[MathProblem], [answer or None] → one {"correct"} for each, in order."""
        return [{"correct": correct} for correct in compare(
            [(p.gold, answer or "", p.physical) for p, answer in zip(problems, answers)])]


def read_math(key, row, physical=False):
    """AIME, AMC, MATH-500, Minerva, OlympiadBench: each has its own names for question and answer."""
    if "final_answer" in row:
        gold = ", ".join(row["final_answer"])
    elif "solution" in row and "answer" not in row:  # Minerva's own file
        gold = boxed(row["solution"])
    else:
        gold = str(row["answer"])
    question = f"{row.get('context') or ''}\n{row.get('problem') or row['question']}".strip()
    return MathProblem(key, f"{question}\n\nPut the final answer in \\boxed{{}}.", gold, physical)


def boxed(text):
    """The content of the last \\boxed{…} that has any. None without a box, or if the last is never closed."""
    return (boxes(text) or [None])[-1]


def boxes(text):
    """The contents of the last \\boxed{…} and of those before it that belong to the same list, as in
    x=\\boxed{1} or x=\\boxed{2}."""
    lists = ["", *(found[0] for found in re.finditer(LAST, text))]
    return ["".join(groups) for groups in re.findall(f"(?mx){FULL}", lists[-1])]


# --- a process that can be killed ------------------------------------------------------------------------

def compare(pairs):
    """[(gold, answer, physical)] → [whether they mean the same, False if that takes too long]"""
    verdicts = []
    while len(verdicts) < len(pairs):
        done = subprocess.run([sys.executable, "-c", "from judges.latex import serve; serve()"], text=True,
                              input=json.dumps(pairs[len(verdicts):]), capture_output=True,
                              cwd=Path(__file__).parents[1])
        ready, *lines = done.stdout.split() or [""]
        if not ready:
            raise OSError(f"math-verify does not start: {done.stderr.strip()[-300:]}")
        verdicts += [*map(json.loads, lines), False]  # False: the one in which the process died, if it did
    return verdicts[:len(pairs)]


def same_math(*pair):
    """latex.same_math, in this process."""
    from . import latex  # slow to import
    return latex.same_math(*pair)
