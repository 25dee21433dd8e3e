"""Programs: HumanEval(+), MBPP(+) and LiveCodeBench's generation set, judged by the benchmark's own tests.

A program runs in the sandbox and gives values there; whether they are right is decided here, outside,
where no object of the program's making takes part. Tests that are published as asserts become calls:
the sandbox runs them once with the benchmark's own solution and notes with what they call it.
"""

import base64
import json
import pickletools
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from tqdm import tqdm

from executor import literal, parse_literal
from tasks import fenced_blocks

from .text import answer_text

EVERYTHING = 1 << 30  # characters: no limit but memory
LONG = 100_000        # characters of a value that is compared by its checksum, where both sides are from runs
FENCE = "Give the whole program in one fenced block that starts with ```python."
STARRED = "bisect collections functools heapq itertools math typing".split()
PRELUDE = "\n".join([  # contest programs are written where these names are known
    "import copy, json, operator, re, string, " + ", ".join(STARRED),
    *(f"from {module} import *" for module in STARRED), "del pow  # the one of math\n"])


@dataclass(frozen=True)
class ProgramProblem:
    """What a program has to do, and the tests that it has to pass."""

    key: str
    question: str
    name: str         # what the program must define; "" if it reads standard input
    entry: str        # an expression that is called with the arguments of a test; "": standard input
    prelude: str      # code before the answer
    solutions: tuple  # programs that are right: the benchmark's own, and other readings of the task
    asserts: str      # base tests as code that calls `name`; "" if cases() has them
    cases: object     # () → {"base" and "plus": ([arguments], [[expected]], or None: as solutions say)}
    view: object = None  # (value, arguments) → what of a value has to be equal; None: see close
    atol: float = 0   # absolute tolerance
    batch = 16        # contests have megabytes of tests

    def answer_in(self, response):
        """The program in a response, ready to run, or None: the last block that defines what it must."""
        text = answer_text(response)
        blocks = [block for block in fenced_blocks(text, r"[\w+-]*") if block.strip()]
        if "```" not in text and re.search(r"^ *(?:def|import|from|class|return)\b", text, re.M):
            blocks = [text]
        definition = rf"\b(?:def|class) +{self.name}\b|^{self.name} *=" if self.name else ""
        if not blocks:
            return None
        code = next((block for block in blocks[::-1] if re.search(definition, block, re.M)), blocks[-1])
        future = "".join(re.findall(r"^from __future__ import .*\n?", code, re.M))  # must come first
        return f"{future}\n{self.prelude}\n{code.replace(future, '')}"

    @staticmethod
    def judge(problems, answers, executor):
        """[ProgramProblem], [program or None] → one {"correct", "base"} for each, in order.

        First by the base tests; those that pass, by the others. base is None where there are no base tests.
        """
        cases = known_cases({problem.key: problem for problem in problems}, executor)
        passed, base = [answer is not None for answer in answers], []
        for part in ("base", "plus"):
            left = [i for i, good in enumerate(passed) if good]
            outputs = run_programs(executor, [
                (answers[i], problems[i].entry, cases[problems[i].key][part][0],
                 LONG if problems[i].solutions else EVERYTHING) for i in left])
            for i, values in zip(left, outputs):
                arguments, expected = cases[problems[i].key][part]
                passed[i] = None not in (values, expected) and all(
                    map(partial(right, problems[i]), values, expected, arguments))
            base = base or list(passed)
        return [{"correct": good, "base": simple if cases[problem.key]["base"][0] else None}
                for problem, good, simple in zip(problems, passed, base)]


# --- the published formats ----------------------------------------------------------------------------

def read_function(key, row):
    """HumanEval+ and MBPP+: EvalPlus' release and its hub datasets, and the original HumanEval."""
    prompt, test, hints = row["prompt"], row.get("test") or "", row.get("test_list") or []
    name = row.get("entry_point") or re.search(r"^ *assertion\((\w+)\(\*inp\)", test, re.M)[1]
    opening = f"def {name}(" in prompt
    task = (f"Complete the Python function below. {FENCE}\n\n```python\n{prompt.strip()}\n```" if opening
            else "\n".join([f"Write a Python function `{name}`. {FENCE}\n",
                            prompt.strip(' \n"'), *hints[:1]]))
    own = prompt + row["canonical_solution"] if "canonical_solution" in row else row["code"]
    inputs = re.search(r"^ *inputs = (.*)$", test, re.M)
    written = re.findall(r"^ *assert.*(?:,|<=) (\d[\d.e-]*)\)?$", test, re.M) if inputs else ()
    asserts = "\n".join([*(row.get("test_imports") or ()), *hints]) if hints else ""
    if "base_input" not in row and not inputs:  # the original HumanEval
        asserts = f"{test}\ncheck({name})"
    return ProgramProblem(key, task, name, name, prompt if opening else "",
                          (own, *OTHER_READINGS.get(name, ())), asserts,
                          partial(function_cases, row, inputs), VIEWS.get(name),
                          row["atol"] if "atol" in row else max(map(float, written), default=0))


def function_cases(row, inputs):
    shape = SHAPES.get(row["task_id"], "x").split() if "base_input" in row else "x"
    plus = row.get("plus_input") or ()
    if inputs:
        plus = parse_literal(re.sub(r"(?<![\w'\"])inf(?![\w'\"])", "1e309", inputs[1]), EVERYTHING)
    words = [*shape, *shape[-1:] * 99]
    return {part: ([literal([CONVERT[word](value) for word, value in zip(words, case)], EVERYTHING)
                    for case in cases], None)
            for part, cases in (("base", row.get("base_input") or ()), ("plus", plus))}


def read_contest(key, row):
    """LiveCodeBench's generation set: functions of a class Solution, or programs that read and print."""
    name = json.loads(row["metadata"] or "{}").get("func_name", "")
    task = (f"Complete this program. {FENCE}\n\n```python\n{row['starter_code'].rstrip()}\n```" if name else
            f"Write a Python program that reads from standard input and prints the answer. {FENCE}")
    return ProgramProblem(
        key, f"{row['question_content'].strip()}\n\n{task}", name,
        name and f"Solution().{name} if 'Solution' in globals() else {name}", PRELUDE, (), "",
        partial(contest_cases, name, row["public_test_cases"], row["private_test_cases"]),
        lists if name else printed)


def contest_cases(name, public, private):
    cases = {}
    for part, text in (("base", public), ("plus", unpack(private))):
        tests = json.loads(text)
        given = [list(map(json.loads, test["input"].split("\n"))) if name else test["input"]
                 for test in tests]
        cases[part] = ([literal(value, EVERYTHING) for value in given],
                       [[json.loads(test["output"]) if name else test["output"]] for test in tests])
    return cases


def unpack(text):
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickle of one str of JSON."""
    if text.lstrip().startswith("["):
        return text
    pickled = zlib.decompress(base64.b64decode(text))  # read, never run: loading a pickle can run code
    tests, = [value for code, value, _ in pickletools.genops(pickled) if "UNICODE" in code.name]
    return tests


# --- in the sandbox -------------------------------------------------------------------------------------

CALL = '''
import binascii, copy

def plain(value):
    """A value as literals; what has none becomes a mark that equals only its like."""
    if isinstance(value, int) and value.bit_length() > 14000:
        return ("\\0int", hex(value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, (set, frozenset) if kind is set else kind):
            return kind([plain(item) for item in value])
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value) if value == value else ("\\0nan",)
    return value if value is None else ("\\0" + type(value).__name__, str(value)[:1000])

def shown(value, limit):
    """The value, or of a long one its length and checksum."""
    value = plain(value)
    text = repr(value)
    if len(text) < limit:
        return value
    return ("\\0long", len(text), binascii.crc32(text.encode("utf-8", "replace")))

def record(own, name, asserts):
    """The arguments with which the asserts call the benchmark's own solution, which must pass them."""
    calls = []

    def note(*arguments):
        calls.append(copy.deepcopy(list(arguments)))
        return own[name](*arguments)

    exec(asserts, own | {name: note})  # a copy: the solution's own calls of itself are no tests
    return calls

def f(source, entry, limit, cases):
    scope = {"__name__": "program"}
    exec(source, scope)
    if entry == "assert":  # no name of a function
        return [record(scope, *case) for case in cases]
    return [shown(eval(entry, scope)(*case), limit) for case in cases]
'''
READ = '''
import io, sys, threading

def f(source, entry, limit, cases):
    (text,) = cases

    def ask(prompt=""):
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\\n")

    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    sys.setrecursionlimit(50000)
    threading.Thread.start, threading.Thread.join = threading.Thread.run, lambda thread, timeout=None: None
    try:
        exec(source, {"__name__": "__main__", "input": ask, "open": lambda file, *how: sys.stdin})
    except SystemExit:
        pass
    sys.stdout.flush()
    return [sys.stdout.buffer.getvalue().decode("utf-8", "backslashreplace")]
'''


def known_cases(problems, executor):
    """{key: ProgramProblem} → {key: {part: ([arguments], [[expected]])}}

    Where a benchmark gives no expected values they are those of its solutions; None if its own fails.
    """
    cases = {key: problem.cases() for key, problem in problems.items()}
    asserted = [(key, problem) for key, problem in problems.items() if problem.asserts]
    recorded = run_programs(executor, [
        (problem.solutions[0], "assert", [literal([problem.name, problem.asserts], EVERYTHING)], EVERYTHING)
        for _, problem in asserted])
    for (key, _), calls in zip(asserted, recorded):
        # where the asserts fail, a text that does not run either
        cases[key]["base"] = [literal(call, EVERYTHING) for call in calls[0]] if calls else ["no call"], None
    jobs = [(key, part, solution) for key, parts in cases.items() for part in parts if parts[part][1] is None
            for solution in problems[key].solutions]
    outputs = defaultdict(list)
    for (key, part, _), values in zip(jobs, run_programs(executor, [
            (solution, problems[key].entry, cases[key][part][0], LONG) for key, part, solution in jobs])):
        outputs[key, part].append(values)
    for (key, part), (own, *others) in outputs.items():
        cases[key][part] = cases[key][part][0], own and list(zip(own, *filter(None, others)))
        if own is None:
            tqdm.write(f"{key}: the benchmark's own solution does not run in the sandbox, so every answer "
                       "counts as wrong", file=sys.stderr)
    return cases


def run_programs(executor, jobs):
    """[(source, entry, [arguments], limit)] → [[value] or None]: None if one of its calls gives no value.

    Of values longer than limit only a checksum comes back. A hundred calls share a process; those that
    take too much time or room together are run one by one. No job is run further once a call has failed.
    """
    results = [[None] * len(arguments) for _, _, arguments, _ in jobs]
    waiting = [[range(len(arguments))[start:start + size] for start in range(0, len(arguments), size)]
               for _, entry, arguments, _ in jobs for size in [100 if entry else 1]]
    while any(waiting):
        now = [(i, piece) for i, pieces in enumerate(waiting) for piece in pieces[:4]]
        waiting = [pieces[4:] for pieces in waiting]
        runs = executor.run([(CALL if entry else READ, f"{literal(source, EVERYTHING)}, {entry!r}, {limit}, "
                                    f"[{', '.join(arguments[piece.start:piece.stop])}]")
                             for i, piece in now for source, entry, arguments, limit in [jobs[i]]])
        for (i, piece), run in zip(now, runs):
            values = parse_literal(run.output, EVERYTHING) if run.ok else None
            if results[i] is None:
                continue
            if isinstance(values, list) and len(values) == len(piece):
                results[i][piece.start:piece.stop] = values
            elif run.status in ("timeout", "memory", "killed", "unrepresentable") and len(piece) > 1:
                waiting[i][:0] = [piece[place:place + 1] for place in range(len(piece))]
            else:
                results[i], waiting[i] = None, []
    return results


# --- whether a value is right ---------------------------------------------------------------------------

def right(problem, output, expected, arguments):
    """Whether an output is one of the expected values, as the problem compares them."""
    view, same = problem.view, partial(close, atol=problem.atol)
    if view:
        def same(a, b):
            return view(a, arguments) == view(b, arguments)
    try:
        return any(output == value or same(output, value) for value in expected)
    except (TypeError, ValueError, ArithmeticError):  # a value of another kind than was asked for
        return False


def close(output, expected, atol):
    """EvalPlus' rule for unequal values: floats, or what a task has a tolerance for, that are close."""
    flat = expected if isinstance(expected, (list, tuple)) else [expected]
    atol = atol or (1e-6 if flat and all(type(value) is float for value in flat) else 0)
    return atol > 0 and type(output) is type(expected) and near(output, expected, atol)


def near(a, b, atol):
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(near, a, b, [atol] * len(b)))
    return a == b or not isinstance(b, bool) and abs(a - b) <= atol + 1e-7 * abs(b)


def lists(value, arguments):
    return [lists(item, "") for item in value] if isinstance(value, (list, tuple)) else value


def printed(text, arguments):
    """Lines without the spaces around, numbers by their values."""
    return [tuple(map(Decimal, line.split())) if re.fullmatch(r"[-+.\deE ]*\d[-+.\deE ]*", line.strip())
            else line.strip() for line in text.strip().split("\n")]


def is_root(value, arguments):
    (coefficients,) = parse_literal(arguments)
    return abs(sum(c * value ** power for power, c in enumerate(coefficients))) <= 1e-4


# Tasks that EvalPlus does not compare by value, by their functions' names.
VIEWS = {"find_zero": is_root,
         **dict.fromkeys("similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum "
                         "intersection_array find_dissimilar Diff".split(),
                         lambda value, arguments: set(value)),
         **dict.fromkeys("check_str text_match_three text_starta_endb".split(),
                         lambda found, arguments: found is not None and found is not False)}
# Other solutions, where a task can be read in two ways. Of are_equivalent EvalPlus takes any answer; we take
# both readings of 'divisors', with and without the number itself.
OTHER_READINGS = {
    "sum_div": ["def sum_div(n): return 0"],
    "are_equivalent": ["""
def divisors(n):
    return sum({d for i in range(1, int(n ** 0.5) + 1) if n % i == 0 for d in (i, n // i)})
def are_equivalent(a, b):
    return divisors(a) == divisors(b)"""],
    "surface_Area": ["""
def surface_Area(base, height):
    return round(base ** 2 + 2 * base * ((base / 2) ** 2 + height ** 2) ** 0.5)"""],
    "digit_distance_nums": ["""
def digit_distance_nums(a, b):
    a, b = str(a)[::-1], str(b)[::-1]
    n = max(len(a), len(b))
    return sum(abs(int(x) - int(y)) for x, y in zip(a.ljust(n, "0"), b.ljust(n, "0")))"""]}

def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


# EvalPlus' release holds tuples and sets as lists, and complex numbers as text. How to restore them: one
# word for each argument, the last one for all that follow.
SHAPES = {f"Mbpp/{number}": shape for line in """
    tuple: 2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809
    of_tuples: 63 64 70 94 120 237 272 299 400 409 417 438 473 614 780
    of_tuples x: 75 413 444 753
    x tuple: 106 750
    of_sets: 115
    float complex: 124
    tuple x: 250 307 405 446 617 720 763 808
    complex: 252
    tuples: 259 278 401 445 580 615 791
    of_tuples x: 722""".strip().split("\n") for shape, _, numbers in [line.partition(":")]
    for number in numbers.split()}
CONVERT = {
    "x": lambda value: value, "tuple": tuple, "tuples": tuples, "float": float, "complex": complex,
    "of_tuples": lambda value: ({key: tuple(item) for key, item in value.items()} if isinstance(value, dict)
                                else list(map(tuple, value))),
    "of_sets": lambda value: [set(item) if item and isinstance(item, list) else {} for item in value]}
