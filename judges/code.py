"""Programs: HumanEval(+), MBPP(+) and LiveCodeBench's generation set, judged by the benchmark's own tests.

A program runs in the sandbox and returns values. They are judged here, outside the sandbox, where no object
that the program made takes part. Tests that are published as asserts become calls: the sandbox runs them once
with the benchmark's own solution, and records its arguments.
"""

import ast
import base64
import json
import pickletools
import re
import sys
import zlib
from collections import namedtuple
from contextlib import suppress
from decimal import Decimal
from functools import partial
from textwrap import dedent, indent

from executor import literal, parse_literal
from tasks import UsageError

from .text import answer_text, pieces

EVERYTHING = 1 << 30  # characters: no limit but memory
written = partial(literal, limit=EVERYTHING)
LONG = 100_000        # from this many characters on, values from two runs are compared by checksum
DIGITS = 100_000      # of an integer in a contest's tests (LiveCodeBench's own judge reads 50,000)
FENCE = "Give the whole program in one fenced block that starts with ```python."
STARRED = """string re datetime collections heapq bisect copy math random statistics itertools functools
    operator io sys json builtins typing""".split()
# Contest programs are written where these names are known. As in LiveCodeBench, they may recurse deeper than
# usual, and convert longer integers from and to text (50,000 digits there, any number here).
PRELUDE = "".join(map("from {0} import *\nimport {0}\n".format, STARRED)) + """\
sys.setrecursionlimit(50000)
getattr(sys, "set_int_max_str_digits", id)(0)
"""

# Patterns for text that could be a program: what it does, runs of indented lines, and runs of lines of code
RETURNS = r"\b(?:return|yield|raise)\b"
DEFINES = r"(?:\b(?:def|class) +|^(?=\w+ *=(?!=)))%s\b"
PRINTS = r"\b(?:print|stdout|__stdout__|write)\b"
READS_AND_PRINTS = rf"(?s)\A(?=.*\b(?:input|stdin|__stdin__|open|fdopen|read)\b).*{PRINTS}"
RUNS = (r"(?m)(?:^(?:[ \t]+\S.*|[ \t]*)(?:\n|\Z))+", r"""(?mx)(?: ^ (?: [ \t]+\S.* | [ \t]* | [@#)\]}].*
    | (?:def|class|from|import|async|if|elif|else|for|while|try|except|finally|with|return|print|assert)\b.*
    | [\w.,\ ]+\ [-+*/%]?=\ .* ) (?:\n|\Z) )+""")


class ProgramProblem(namedtuple(
        "ProgramProblem", "key question name entry prelude solutions asserts tests same")):
    """A programming problem, and the tests that a program has to pass.

    name       the name that the program must define ("" if it reads standard input)
    entry      the expression that is called with the arguments of a test ("": standard input)
    prelude    code before the answer
    solutions  correct programs: the benchmark's own, and other readings of the task
    asserts    base tests as code that calls `name` ("" if tests() has them)
    tests      () → [base, plus], each {arguments: [correct values, besides those of the solutions]}
    same       (value, correct value) → whether two unequal values agree
    """

    batch = 16        # contests have megabytes of tests

    def answer_in(self, response):
        """The program in a response, ready to run, or None. Pieces that parse come first. Among them it is
        the last one that defines the requested name, or else the last body of the prelude's function."""
        text = answer_text(response)
        blocks = [piece for _, piece in pieces(text)[1:-1] if piece]
        found = [*map(self.program, [*blocks, *self.candidates(text)])]
        return next(filter(parses, reversed(found)), found[0] if blocks else None)

    def candidates(self, text):
        """The pieces of a text that could be the program, the best ones last."""
        found, chosen = [], []
        for run in RUNS:
            found += re.findall(run, text)
        for more in (3, 2, 1, 0):  # a program may have fences in its strings
            found += [piece for _, piece in pieces(text, more)]
        if f"def {self.name}(" in self.prelude:
            for body in filter(re.compile(RETURNS).search, found):
                chosen += [body, dedent(body), "    " + body, indent(dedent(body), "    ")]
        for pattern in [DEFINES % self.name] if self.name else [PRINTS, READS_AND_PRINTS]:
            does = filter(re.compile(pattern, re.M).search, found)
            chosen += [dedent(piece) if piece[0].isspace() else piece for piece in does]
        return chosen

    def program(self, code):
        """The code after its prelude. Imports from __future__ are moved up, because they must come first."""
        before_future = r"(?ms)\A(.*?)^((?:from __future__ import [^\n]*\n)+)"
        return re.sub(before_future, r"\2\1", f"{self.prelude}\n{code}\n")

    def job(self, program, tests):
        """A job of run_programs: this program on these tests."""
        return program, self.entry, [*tests], LONG if self.solutions else EVERYTHING

    @staticmethod
    def judge(problems, answers, executor):
        """[ProgramProblem], [program or None] → one {"correct", "base"} for each, in order.

        The base tests come first. Programs that pass them get the plus tests. base is None if there are no
        base tests.
        """
        known = known_tests({problem.key: problem for problem in problems}, executor)
        tests = [known[problem.key] for problem in problems]
        passed, base = [answer is not None for answer in answers], []
        for part in range(2):
            left = [i for i, good in enumerate(passed) if good]
            outputs = run_programs(executor, [problems[i].job(answers[i], tests[i][part]) for i in left])
            for i, values in zip(left, outputs):
                passed[i] = values is not None and all(
                    map(partial(right, problems[i].same), values, tests[i][part].values()))
            base = base or [*passed]
        return [{"correct": good, "base": simple if base_tests else None}
                for good, simple, (base_tests, _) in zip(passed, base, tests)]


def parses(program):
    """Whether a text is Python. It is only parsed here, and never compiled."""
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return bool(ast.parse(program))
    return False


# --- the published formats ----------------------------------------------------------------------------

def read_function(key, row):
    """HumanEval+ and MBPP+: EvalPlus' release and its hub datasets, and the original HumanEval."""
    prompt, test, hints = row["prompt"], row.get("test") or "", row.get("test_list") or []
    name = row.get("entry_point") or re.search(r"^ *assertion\((\w+)\(\*inp\)", test, re.M)[1]
    prelude = prompt if f"def {name}(" in prompt else ""
    text = prompt.strip(' \n"')
    task = (f"Complete the Python function below. {FENCE}\n\n```python\n{prompt.strip()}\n```" if prelude else
            f"Write a Python function `{name}`. {FENCE}\n\n{text}\n{''.join(hints[:1])}".strip())
    own = prompt + row["canonical_solution"] if "canonical_solution" in row else row["code"]
    asserts, tolerance = "\n".join([*(row.get("test_imports") or ()), *hints]), []
    if inputs := re.search(r"^ *inputs = (.*)$", test, re.M):  # the hub's format
        tolerance = re.findall(r"^ *assert.*(?:,|<=) (\d[\d.e-]*)\)?$", test, re.M)
    elif "base_input" not in row:  # the original HumanEval
        asserts = f"{test}\ncheck({name})"
    shape = "base_input" in row and re.search(
        rf"^ *(.+):.* {row['task_id']} ".replace("Mbpp/", ""), SHAPES, re.M)
    atol = row.get("atol", max(map(float, tolerance), default=0))
    return ProgramProblem(key if "/" in key else f"Mbpp/{key}", task, name,
                          f"{shape[1]}|{name}" if shape else name,
                          prelude, (own, *OTHER_READINGS.get(name, ())), asserts,
                          partial(function_tests, row, inputs), partial(close, atol=atol))


def function_tests(row, inputs):
    """[base, plus] of a row. inputs: the match of the inputs that are written in its test."""
    parts = [row.get("base_input") or (), row.get("plus_input") or ()]
    if inputs:
        parts[1] = parse_literal(re.sub(r"(?<![\w'\"])inf(?![\w'\"])", "1e309", inputs[1]), EVERYTHING)
    return [*map(open_tests, parts)]


def open_tests(calls):
    """[[argument]] → {arguments: [right values, none so far]}"""
    return {written(call): [] for call in calls}


def read_contest(key, row):
    """LiveCodeBench's generation set: functions of a class Solution, or programs that read and print."""
    name = json.loads(row["metadata"] or "{}").get("func_name", "")
    task = (f"Complete this program. {FENCE}\n\n```python\n{row['starter_code'].rstrip()}\n```" if name else
            f"Write a Python program that reads from standard input and prints the answer. {FENCE}")
    return ProgramProblem(
        key, f"{row['question_content'].strip()}\n\n{task}", name,
        name and f"Solution().{name} if 'Solution' in globals() else {name}", PRELUDE, (), "",
        partial(contest_tests, name, row["public_test_cases"], row["private_test_cases"]),
        same_in_json if name else same_lines)


def integer(name, text):
    """An integer in a test of a function. One of more than 4,000 digits becomes what `plain` makes of it in
    the sandbox, because Python reads and writes no more than 4,300. Raises UsageError for more than DIGITS.

    >>> integer("f", "-12"), integer("f", "-1" + 5000 * "0")[1][:9]
    (-12, '-0x31e208')
    """
    length = len(text.strip("-"))
    if length <= 4000:
        return int(text)
    if length > DIGITS:
        raise UsageError(f"a test of {name} has an integer of {length:,} digits, and at most {DIGITS:,} are "
                         "read; leave this problem out")
    value = 0
    for part in re.findall(r"\d{1,4000}", text):
        value = value * 10 ** len(part) + int(part)
    return ["\0int", re.sub(r"\d+", hex(value), text)]


def same_in_json(output, expected):
    return json.loads(json.dumps(output)) == expected


def contest_tests(name, public, private):
    parts, read = [{}, {}], partial(json.loads, parse_int=partial(integer, name))
    for part, text in zip(parts, (public, unpack(private))):
        for test in json.loads(text):
            given, result = test["input"], test["output"]
            if name:
                given, result = [*map(read, given.split("\n"))], read(result)
            part.setdefault(written(given), []).append(result)
    return parts


def unpack(text):
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickle of one str of JSON."""
    if text.lstrip().startswith("["):
        return text
    pickled = zlib.decompress(base64.b64decode(text))  # only read, because loading a pickle can run code
    tests, = [value for code, value, _ in pickletools.genops(pickled) if "UNICODE" in code.name]
    return tests


# --- in the sandbox -------------------------------------------------------------------------------------

CALL = '''
import binascii

LARGE = 10 ** 4000

def plain(value):
    """A value as literals; what has none becomes a mark that equals only its like."""
    if isinstance(value, int) and not -LARGE < value < LARGE:
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

def restored(value):
    """An argument, in which the marks of large integers are integers again."""
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and value[0] == "\\0int":
            return int(value[1], 16)
        return type(value)(map(restored, value))
    return {key: restored(value[key]) for key in value} if isinstance(value, dict) else value

def shown(value, limit):
    """The value, or of a long one its length and checksum."""
    value = plain(value)
    text = repr(value)
    if len(text) < limit:
        return value
    return ("\\0long", len(text), binascii.crc32(text.encode("utf-8", "replace")))

def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value

def of_tuples(value):
    if isinstance(value, dict):
        return {key: tuple(item) for key, item in value.items()}
    return list(map(tuple, value))

def of_sets(value):
    return [set(item) if item and isinstance(item, list) else {} for item in value]

CONVERT = {"x": lambda value: value, "tuple": tuple, "tuples": tuples, "float": float, "complex": complex,
           "of_tuples": of_tuples, "of_sets": of_sets}

def is_root(value, case):
    return abs(sum(c * value ** power for power, c in enumerate(case[0]))) <= 1e-4

def as_set(value, case):
    return set(value)

def is_found(value, case):
    """Of a search: a match counts as True, nothing as False."""
    return value is not None and value is not False

# Tasks that EvalPlus does not compare by value, by their functions' names.
PROPERTY = {"find_zero": is_root,
            **dict.fromkeys("similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum "
                            "intersection_array find_dissimilar Diff".split(), as_set),
            **dict.fromkeys("check_str text_match_three text_starta_endb".split(), is_found)}

def f(source, entry, limit, cases):
    """The values of a call for each case, or the property of them that counts. entry: what is called, behind
    the shapes of its arguments, if any."""
    shapes, _, name = entry.rpartition("|")
    *first, last = shapes.split() or ["x"]
    scope = {"__name__": "program"}
    exec(source, scope)
    results = []
    for case in map(restored, cases):
        case = [CONVERT[shape](value) for shape, value in zip(first + [last] * len(case), case)]
        value = plain(eval(name, scope)(*case))
        results.append(shown(PROPERTY[name](value, case) if name in PROPERTY else value, limit))
    return results
'''
READ = '''
import atexit, builtins, io, os, sys, threading, time, types, _thread

class Standard(io.RawIOBase):
    """A standard stream by its descriptor: bytes in memory, which all that is opened on it share."""
    data = {}

    def __init__(self, number):
        self.number = self.name = number
        self.mode = "wb" if number else "rb"

    def fileno(self):
        return self.number

    def readable(self):
        return self.number == 0

    seekable = readable

    def writable(self):
        return self.number > 0

    def seek(self, *place):
        return self.data[self.number].seek(*place)

    def readinto(self, buffer):
        return self.data[self.number].readinto(buffer)

    def write(self, part):
        return self.data[self.number].write(part)

class Gone(BaseException):
    """os._exit was called: nothing is flushed."""

class Clock:
    """No run has threads. They run as they are started, and timers once the program waits or ends."""
    now, timers = 0, []

    def sleep(self, seconds):
        end = self.now + seconds
        while self.timers and min(self.timers, key=lambda timer: timer[0])[0] <= end:
            self.timers.sort(key=lambda timer: timer[0])
            self.now, timer = self.timers.pop(0)
            timer.interval = 0
            live(timer.run)
        self.now = end

def live(run, *arguments):
    """What a thread does; its exceptions end it and nothing else."""
    try:
        run(*arguments)
    except (Exception, SystemExit):
        pass

def f(source, entry, limit, cases):
    """What a program prints that reads the text of the one case."""
    (text,) = cases
    Standard.data = {0: io.BytesIO(text.encode()), 1: io.BytesIO(), 2: io.BytesIO()}
    files, clock, system = [], Clock(), types.ModuleType("os")
    names = dict.fromkeys((0, "/dev/stdin", "/dev/fd/0"), 0)
    names.update({1: 1, "/dev/stdout": 1, "/dev/fd/1": 1, 2: 2, "/dev/stderr": 2})

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **more):
        number = names.get(file if isinstance(file, int) else os.fspath(file), 0 if mode[:1] == "r" else None)
        if number is None:
            raise FileNotFoundError(2, "No such file or directory", file)
        stream = Standard(number)
        if buffering or "b" not in mode:
            stream = io.BufferedWriter(stream) if number else io.BufferedReader(stream)
        if "b" not in mode:
            stream = io.TextIOWrapper(stream, encoding or "utf-8", errors, newline, buffering == 1)
            stream.mode = mode
        files.append(stream)
        return stream

    def ask(prompt=""):
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line[:-1] if line.endswith("\\n") else line

    def start(thread):
        if isinstance(thread, threading.Timer):
            clock.timers.append((clock.now + thread.interval, thread))
        else:
            live(thread.run)

    def join(thread, timeout=None):
        clock.sleep(max([due - clock.now for due, timer in clock.timers if timer is thread], default=0))

    def start_new(run, arguments=(), options={}):
        live(lambda: run(*arguments, **options))
        return 1

    def leave(status=0):
        raise Gone

    vars(system).update(vars(os))
    system.read = lambda number, size: Standard.data[number].read(size)
    system.write = lambda number, part: Standard.data[number].write(part)
    system.fstat = lambda number: types.SimpleNamespace(
        st_size=len(Standard.data[number].getvalue()), st_mode=0o100600)
    system.isatty = lambda number: False
    system.fdopen, system._exit, sys.modules["os"] = opened, leave, system
    sys.stdin = sys.__stdin__ = opened(0)
    sys.stdout = sys.__stdout__ = opened(1, "w")
    sys.stderr = sys.__stderr__ = opened(2, "w")
    threading.Thread.start, threading.Thread.join, time.sleep = start, join, clock.sleep
    _thread.start_new_thread, io.open = start_new, opened
    scope = {"input": ask, "open": opened, "exit": sys.exit, "quit": sys.exit}
    vars(builtins).update(scope)
    atexit._clear()
    try:
        try:
            exec(source, {"__name__": "__main__", **scope})
        except SystemExit:
            pass
        clock.sleep(float("inf"))
        atexit._run_exitfuncs()
        for file in (sys.stdout, *files):
            if hasattr(file, "flush") and not getattr(file, "closed", False):
                file.flush()
    except Gone:
        pass
    return [Standard.data[1].getvalue().decode("utf-8", "backslashreplace")]
'''
RECORD = '''

def recorded_calls(name, asserts):
    """The arguments with which the asserts call the function above, which must pass them."""
    from copy import deepcopy
    own, calls = globals()[name], []

    def note(*arguments):
        calls.append(deepcopy(list(arguments)))
        return own(*arguments)

    exec(asserts, globals() | {name: note})  # a copy: the function's own calls of itself are no tests
    return calls
'''


def known_tests(problems, executor):
    """{key: ProgramProblem} → {key: [base, plus]}, each part {arguments: [right values]}

    Asserts become the calls that they make, and values that a benchmark's solutions return are correct.
    """
    tests = {key: problem.tests() for key, problem in problems.items()}
    asserted = [problem for problem in problems.values() if problem.asserts]
    recorded = run_programs(executor, [
        (problem.solutions[0] + RECORD, "recorded_calls", [written([problem.name, problem.asserts])],
         EVERYTHING) for problem in asserted])
    for problem, calls in zip(asserted, recorded):
        # if the asserts fail, an input that does not run either
        tests[problem.key][0] = open_tests(calls[0]) if calls else {"no call": []}
    parts, jobs = [], []
    for key, problem in problems.items():
        for solution in problem.solutions:
            parts += tests[key]
            jobs += [problem.job(solution, part) for part in tests[key]]
    for part, values in zip(parts, run_programs(executor, jobs)):
        for expected, value in zip(part.values(), values or ()):
            expected.append(value)
    for key, (base, plus) in tests.items():
        if not all([*base.values(), *plus.values()]):
            print(f"{key}: the benchmark's own solution does not run in the sandbox, so every answer "
                  "counts as wrong", file=sys.stderr)
    return tests


def run_programs(executor, jobs):
    """[(source, entry, [arguments], limit)] → [[value] or None]: None if one of the job's calls has no value.

    For values over the limit, only a checksum comes back. A hundred calls share a process. If they take too
    much time or memory together, calls are run one by one. A job stops at its first failed call.
    """
    results, sizes = [[] for _ in jobs], [100 if entry else 1 for _, entry, _, _ in jobs]
    left = range(len(jobs))
    while left := [i for i in left if results[i] is not None and len(results[i]) < len(jobs[i][2])]:
        calls, runs = [], []
        for i in left:
            source, entry, arguments, limit = jobs[i]
            calls.append(arguments[len(results[i]):][:sizes[i]])
            runs.append((CALL if entry else READ,
                         f"{written(source)}, {entry!r}, {limit}, [{', '.join(calls[-1])}]"))
        for i, some, run in zip(left, calls, executor.run(runs)):
            values = parse_literal(run.output, EVERYTHING) if run.ok else None
            if isinstance(values, list) and len(values) == len(some):
                results[i] += values
            elif len(some) > 1 and run.status in "timeout memory killed unrepresentable".split():
                sizes[i] = 1
            else:
                results[i] = None
    return results


# A line of numbers
NUMBERS = r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,6})?(?:\s+|$))+"

# --- whether a value is right ---------------------------------------------------------------------------

def right(same, output, expected):
    """Whether an output is one of the expected values."""
    with suppress(TypeError, ValueError, AttributeError, ArithmeticError):  # a value of another kind
        return any(output == value or same(output, value) for value in expected)
    return False


def close(output, expected, atol=0):
    """EvalPlus' rule for unequal values: only floats, or values of a task with a tolerance, may be close."""
    flat = expected if isinstance(expected, (list, tuple)) else [expected]
    atol = atol or (1e-6 if {*map(type, flat)} == {float} else 0)
    return atol > 0 and type(output) is type(expected) and near(output, expected, atol)


def near(a, b, atol):
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(near, a, b, [atol] * len(b)))
    return a == b or not isinstance(b, bool) and abs(a - b) <= atol + 1e-7 * abs(b)


def same_lines(output, expected):
    """Compares line by line, without surrounding spaces, and lines of numbers by value."""
    return read_lines(output) == read_lines(expected)


def read_lines(text):
    return [tuple(map(Decimal, line.split())) if re.fullmatch(NUMBERS, line) else line
            for line in map(str.strip, text.strip().split("\n"))]


# Other solutions, for tasks that can be read in two ways. For are_equivalent EvalPlus accepts any answer. We
# accept both readings of 'divisors', with and without the number itself.
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


# EvalPlus' release stores tuples and sets as lists, and complex numbers as text. This is how CALL restores
# them: one word for each argument, of which the last is for all that follow, then the task numbers in MBPP.
SHAPES = """
    tuple: 2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809 .
    of_tuples: 63 64 70 94 120 237 272 299 400 409 417 438 473 614 780 .
    of_tuples x: 75 413 444 753 .
    x tuple: 106 750 .
    of_sets: 115 .
    float complex: 124 .
    tuple x: 250 307 405 446 617 720 763 808 .
    complex: 252 .
    tuples: 259 278 401 445 580 615 791 .
    of_tuples x: 722 ."""
