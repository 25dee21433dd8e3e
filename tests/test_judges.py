"""Public benchmarks: every published format with invented tasks, and the verdicts on answers to them."""

import base64
import builtins
import json
import os
import pickle
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import judges
from executor import Executor
from judges import code
from judges import math as mathematics
from tasks import UsageError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fence(code, tag="python"):
    return f"Let me see.\n```{tag}\n{code}\n```\n"


def load(name, data):
    problems, missing = judges.load_benchmarks([name], data)
    assert not missing, missing
    return problems[name]


def correct(problems, responses, executor):
    return [verdict["correct"] for verdict in judges.judge(problems, list(responses), executor)]


# --- invented tasks in the published formats ---------------------------------------------------------

HALF = 'def half(x: float) -> float:\n    """ Half of x. """\n'
HELPED = ("import math\n\n\ndef ceil2(x):\n    return 2 * math.ceil(x)\n\n\n"
          "def lift(x):\n    'Two ceilings.'\n")
RELEASE = [
    {"task_id": "HumanEval/900", "prompt": HALF, "entry_point": "half", "contract": "", "atol": 0,
     "canonical_solution": "    return x / 2\n", "base_input": [[1.0], [3]],
     "plus_input": [[0.1], [float("inf")], [-7]]},
    {"task_id": "HumanEval/901", "prompt": HELPED, "entry_point": "lift", "contract": "", "atol": 0,
     "canonical_solution": "    print('lifting', x)\n    return ceil2(x)\n", "base_input": [[1.5]],
     "plus_input": [[i / 7] for i in range(250)]},
    {"task_id": "HumanEval/902", "prompt": "def big(n):\n    ''' Many things. '''\n", "entry_point": "big",
     "contract": "", "atol": 0, "canonical_solution": "    return list(range(n)) + ['ü' * n, 7 ** n]\n",
     "base_input": [[2]], "plus_input": [[30000], [5], [20000], [1]]},
]


def mbpp(number, name, code, base, plus, atol=0):
    return {"task_id": f"Mbpp/{number}", "prompt": f'"""\nWrite {name}.\nassert 1\n"""\n', "contract": "",
            "entry_point": name, "canonical_solution": code, "base_input": [base], "plus_input": [plus],
            "assertion": "", "atol": atol}


MBPP = [mbpp(106, "behind", "\ndef behind(items, front):\n    return front + tuple(items)\n",
             [[1], [2, 3]], [[], []]),  # a list and a tuple
        mbpp(579, "find_dissimilar", "\ndef find_dissimilar(a, b):\n    return tuple(set(a) ^ set(b))\n",
             [[1, 2], [2, 3]], [["x"], []]),  # two tuples
        mbpp(252, "length", "\nimport cmath\ndef length(z):\n    return cmath.polar(z)[0]\n",
             ["(3+4j)"], ["1j"], 0.0001)]  # a complex number
HUB_TEST = """\
import numpy as np

def is_floats(x) -> bool:
    return isinstance(x, float)

def assertion(out, exp, atol):
    assert out == exp

def check(candidate):
    inputs = [[[1, 2], 'in\\'f'], [[], 'a\\nb'], [[inf], '']]
    results = [(2, "in'f"), (0, 'a\\nb'), (1, '')]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
HUB = [{"task_id": "HumanEval/903", "prompt": "def pair(items, text):\n    ''' Length and text. '''\n",
        "canonical_solution": "    return len(items), text\n", "entry_point": "pair", "test": HUB_TEST}]
HUB.append(HUB[0] | {  # a value too long to be carried around whole
    "task_id": "HumanEval/906", "test": HUB_TEST.replace("'in\\'f'", repr("y" * 99_000))})
HUB_MBPP = [{"task_id": 904, "code": "def add(a, b):\n    return a + b", "prompt": "Write a function to add.",
             "test_imports": ["import math"], "test_list": ["assert add(1, math.floor(2.5)) == 3"],
             "test": "import numpy as np\n\ndef assertion(out, exp, atol):\n    pass\n\n"
                     "inputs = [[1, 2], [0.1, 0.2]]\nresults = [3, 0.3]\nfor i, (inp, exp) in "
                     "enumerate(zip(inputs, results)):\n    assertion(add(*inp), exp, 0)\n"}]
ORIGINAL = [{"task_id": "HumanEval/905", "prompt": "def up(s):\n    ''' Upper. '''\n", "entry_point": "up",
             "canonical_solution": "    return s.upper()\n",
             "test": "\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate('ab') == 'AB'\n"}]
CRUX = [{"id": "sample_0", "code": "def f(s, n):\n    return s * n", "input": "'ab', 2", "output": "'abab'"},
        {"id": "sample_1", "code": "def f(x):\n    return {v: None for v in x}", "input": "[True, 2]",
         "output": "{True: None, 2: None}"}]
EXECUTION = [{"question_id": 1, "id": "sample_7", "function_name": "countIt", "problem_id": 3, "numsteps": 4,
              "code": "def countIt(xs: List[int], k: int) -> int:\n    return xs.count(k)",
              "input": "countIt(xs = [1, 2, (1)], k = 1)", "output": "2"}]


def private(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def cases(*pairs, kind):
    return [{"input": i, "output": o, "testtype": kind} for i, o in pairs]


CONTEST = [
    {"question_id": "abc_a", "question_content": "Print the sum.", "starter_code": "", "metadata": "{}",
     "public_test_cases": json.dumps(cases(("2\n1 2\n", "3\n"), kind="stdin")),
     "private_test_cases": private(cases(("1\n0.5\n", "0.50"), ("0\n\n", "0"), kind="stdin"))},
    {"question_id": "77", "question_content": "Twice.", "metadata": json.dumps({"func_name": "twice"}),
     "starter_code": "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        ",
     "public_test_cases": json.dumps(cases(("[1, 2]\n2", "[2, 4]"), kind="functional")),
     "private_test_cases": private(cases(("[]\n1", "[]"), ("[3]\n0", "[0]"), kind="functional"))}]
MATHS = {
    "MATH-500/test.jsonl": ("MATH500", [{"problem": "?", "solution": "", "answer": "\\frac{1}{2}",
                                         "level": 1, "unique_id": "test/algebra/1.json"}]),
    "aime_2024.jsonl": ("AIME24", [{"id": 60, "problem": "?", "answer": "025"}]),
    "amc23.jsonl": ("AMC23", [{"id": 3, "question": "?", "answer": 27.0, "url": ""}]),
    "minerva_math/test.jsonl": ("Minerva", [{"problem": "?", "solution": "\\boxed{4.5e33} erg", "idx": 5}]),
    "olympiadbench.jsonl": ("OlympiadBench", [{"id": 9, "question": "?", "context": "Let.", "unit": None,
                                               "final_answer": ["$(1,2),(3,4)$"]}]),
}


# --- code --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,file,rows", [
    ("HumanEval+", "HumanEvalPlus.jsonl", RELEASE), ("HumanEval+", "humanevalplus/data/test.jsonl", HUB),
    ("HumanEval+", "openai_humaneval.jsonl", ORIGINAL), ("MBPP+", "MbppPlus.jsonl", MBPP),
    ("MBPP+", "mbppplus.jsonl", HUB_MBPP)])
def test_own_solutions_pass_and_broken_ones_fail(name, file, rows, tmp_path, executor):
    write(tmp_path / file, rows)
    problems = load(name, tmp_path)
    good = [row.get("code") or row["prompt"] + row["canonical_solution"] for row in rows]
    broken = [code + f"\n\nold = {problem.name}\ndef {problem.name}(*a):\n    return [old(*a)]"
              for code, problem in zip(good, problems)]
    assert correct(problems, map(fence, good), executor) == [True] * len(rows)
    assert correct(problems, map(fence, broken), executor) == [False] * len(rows)
    bodies = [fence(row["canonical_solution"]) for row in rows if "canonical_solution" in row]
    assert not bodies or all(correct(problems, bodies, executor))
    assert problems[0].key == (rows[0]["task_id"] if isinstance(rows[0]["task_id"], str) else "Mbpp/904")
    assert all(problem.name in problem.question for problem in problems)


# Right programs, and a body without its function, in the forms in which models write them
FENCES = ["Let me see.\n```python\nCODE\n```\n", "```\nCODE\n```", "``` python\nCODE\n```", "```python\nCODE```",
          "```python\nCODE\n", "```python\nCODE\n``` This halves.\nIt does.", "```python\nCODE\n```This halves.",
          '```python title="a.py" linenums\nCODE\n```', "```{.python .code}\nCODE\n```", "```Python3\nCODE\n```",
          "````python\nCODE\n````", "~~~python\nCODE\n~~~", "~~~ py\nCODE\n~~~~", "~~~\nCODE", "So: ```python\nCODE\n```",
          "````markdown\nIt is\n```python\nCODE\n```\n````", "CODE\n```\nThis halves.", "</think><answer>\nCODE\n</answer>",
          "```python\nx = (1\n```\nNo:\n```python\nCODE\n```\nwhich prints\n```\n2.0\n```",
          "```python\nx = 1\nWait, all of it:\n```python\nCODE\n```", "CODE"]
DOCUMENTED = "def half(x):\n    \"\"\"\n    ```\n    half(4)\n    ```\n    \"\"\"\n    return x / 2"


@pytest.mark.parametrize("form", FENCES)
def test_programs_are_found_in_loose_fences(form, tmp_path, executor):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    problem, = load("HumanEval+", tmp_path)
    programs = [HALF + "    return x / 2", DOCUMENTED, "half = lambda x: x / 2", "    return x / 2\n",
                "    y = x\n    if y:\n        y /= 2\n    return y\n\n\ndef other(x):\n    return x",
                "    return other(x)\n\n\ndef other(x):\n    return x / 2\n\n\nprint(half(4))", HALF + "    return x / 3",
                "    return x / 3", "    return other(x)\n\n\ndef other(x):\n    return x / 3"]
    responses = [form.replace("CODE", program) for program in programs]
    verdicts = judges.judge([problem] * len(programs), responses, executor)
    assert [verdict["correct"] for verdict in verdicts] == [True] * 6 + [False] * 3
    assert all(verdict["well_formed"] for verdict in verdicts)


@pytest.mark.parametrize("completion,right", [
    ("    return x / 2", True), ("\n    return x / 2", True), ("return x / 2", True), ("  y = x / 2\n  return y", True),
    ("if x:\n        return x / 2\n    return 0.0", True), ("if x:\n    return x / 2\nreturn 0.0", True),
    ("    return x / 2\n\nThis halves x.", True), ("    return x / 2\n\ndef other(x):\n    return (x", True),
    ("    return x / 2\n```\nThis halves x.", True), ("We halve it.\n\n" + HALF + "    return x / 2\n\nThat is all.", True),
    ("    return x / 2\n    return (x", False), ("    return x", False), ("x / 2", False), ("    x / 2", False)])
def test_completions_without_a_fence(completion, right, tmp_path, executor):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    assert correct(load("HumanEval+", tmp_path), [completion], executor) == [right]


def test_what_parses_and_defines_comes_first():
    problem = code.ProgramProblem("", "", "g", "g", "", (), "", None, None)
    good, other, broken = "def g():\n    return 1", "def h():\n    return g()", "def g():\n    return (1"
    for response in (fence(good) + fence(other), fence(good) + fence(broken), fence(good) + fence("g()"),
                     fence(broken) + fence(good), fence("def g():\n    return 2") + fence(good),
                     fence(good) + "```python\n" + broken):
        assert problem.answer_in(response).strip() == good
    assert problem.answer_in("```python\n" + broken) is None and problem.answer_in(fence(broken)) is not None


def test_base_tests_alone_are_not_enough(tmp_path):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    problems = load("HumanEval+", tmp_path)
    answers = [HALF + "    return x / 2", HALF + "    return max(x, 0) / 2", HALF + "    return x / 2 + 1e-9",
               HALF + "    return x / 2 + 1e-3", HALF + "    return str(x / 2)", HALF + "    return",
               HALF + "    import os\n    return os.getpid()", HALF + "    while True: pass"]
    with Executor(2, timeout=1.0) as executor:
        verdicts = judges.judge(problems * len(answers), list(map(fence, answers)), executor)
    assert [(v["base"], v["correct"]) for v in verdicts] == [
        (True, True), (True, False), (True, True), *[(False, False)] * 5]
    # the original tests compare with 5: a value, and no tolerance where the row itself says there is none
    strict = RELEASE[0] | {"test": "def check(f):\n    assert f([]) == (0, 5)\n"}
    write(tmp_path / "strict" / "HumanEvalPlus.jsonl", [strict])
    with Executor(1) as executor:
        (verdict,) = judges.judge(load("HumanEval+", tmp_path / "strict"),
                                  [fence(HALF + "    return x / 2 + 1")], executor)
    assert not verdict["base"] and not verdict["correct"]
    malformed = ["I do not know.", "", "```python\ndef half(x):\n    return (x", "x / 2",
                 "</think><answer></answer>"]
    with Executor(1) as executor:
        verdicts = judges.judge(problems * len(malformed), malformed, executor)
    for verdict in verdicts:
        assert verdict == {"base": False, "correct": False, "well_formed": False}


def test_programs_cannot_pass_by_cheating(tmp_path, executor):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    problems = load("HumanEval+", tmp_path)
    cheats = ["class Yes:\n    def __eq__(self, other): return True\ndef half(x):\n    return Yes()",
              "raise SystemExit(0)\ndef half(x): pass",
              "def half(x):\n    return x / 2\nprint('a' * 10 ** 7)\n1 / 0",
              "def half(x):\n    return {'0': float('nan')}"]
    assert not any(correct(problems * len(cheats), map(fence, cheats), executor))


ANYTHING = """
class Anything:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __bool__(self): return True
"""


@pytest.mark.parametrize("name,file,row", [("HumanEval+", "humaneval.jsonl", ORIGINAL[0]),
                                           ("MBPP+", "mbppplus.jsonl", HUB_MBPP[0])])
def test_values_are_compared_outside_of_the_answers_process(name, file, row, tmp_path, executor):
    write(tmp_path / file, [row])
    problems = load(name, tmp_path)
    define = f"{ANYTHING}\ndef {problems[0].name}(*a): "
    forged = [define + "return Anything()", define + "raise SystemExit(0)",
              define + "import builtins; builtins.all = lambda *a: True; return 1"]
    verdicts = judges.judge(problems * 3, list(map(fence, forged)), executor)
    assert not any(verdict["correct"] or verdict["base"] for verdict in verdicts)


def test_asserts_become_calls_whatever_their_form(tmp_path, executor):
    tests = """
def check(candidate):
    assert candidate(2.0) == 1.0, "halves"
    assert abs(candidate(1.0) - 0.5) < 1e-6
    for x in range(2, 5):
        assert candidate(x) == x / 2
    assert not candidate(0), half(0)
"""
    write(tmp_path / "humaneval.jsonl", [{"task_id": "HumanEval/907", "prompt": HALF, "entry_point": "half",
                                          "canonical_solution": "    return x / 2\n", "test": tests}])
    problems = load("HumanEval+", tmp_path)
    answers = [HALF + f"    return {value}" for value in
               ("x / 2", "x * 0.5 + 1e-8", "x / 2 if x < 4 else 7", "x / 2 or 1", "str(x / 2)")]
    assert correct(problems * 5, map(fence, answers), executor) == [True, True, False, False, False]


def test_windows_line_ends(tmp_path, executor):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    answer = fence(HALF + "    return x / 2").replace("\n", "\r\n")
    assert correct(load("HumanEval+", tmp_path), [answer], executor) == [True]


def test_values_that_are_not_literals_agree_only_with_their_like(executor):
    program = ("import fractions, collections, enum\nclass E(enum.IntEnum):\n    A = 3\n"
               "def g(x):\n    return [fractions.Fraction(1, 3), frozenset([x]), float('nan'), 4,"
               " collections.Counter('aa'), E.A, 10 ** 5000 + x, collections.namedtuple('P', 'a')(x)][x]")
    outputs, again = code.run_programs(executor, [(program, "g", [f"[{i}]" for i in range(8)], 10 ** 6)] * 2)
    assert outputs == again and outputs[6][0] == "\0int" and outputs[:6] + outputs[7:] == [
        ("\0Fraction", "1/3"), {1}, ("\0nan",), 4, {"a": 2}, 3, (7,)]


def test_one_slow_call_does_not_fail_the_others():
    program = "def g(x):\n    for i in range(1 if x % 40 else 2_000_000):\n        x += i - i\n    return x"
    with Executor(1, timeout=0.6) as quick:
        outputs = code.run_programs(quick, [(program, "g", [f"[{i}]" for i in range(400)], 99),
                                         ("def g(x):\n    while x == 7: pass", "g", ["[6]", "[7]"], 99)])
    assert outputs == [list(range(400)), None]


@pytest.mark.parametrize("name,arguments,output,expected,agree", [
    ("find_zero", [[-4, 0, 1]], 2.00001, 2.0, True), ("find_zero", [[-4, 0, 1]], 2.1, 2.0, False),
    ("find_zero", [[-4, 0, 1]], -2.0, 2.0, True), ("find_zero", [[-4, 0, 1]], None, 2.0, False),
    ("find_char_long", [], ["b", "a"], ["a", "b"], True), ("Diff", [], [1], [2], False),
    ("check_str", [], ("\0Match", ""), True, True), ("check_str", [], None, True, False),
    ("check_str", [], [], True, True),
    ("surface_Area", [3, 4], 35, 0, True), ("surface_Area", [3, 4], 34, 0, False),
    ("digit_distance_nums", [192, 9], 17, 0, True), ("digit_distance_nums", [19, 92], 8, 0, False),
    ("sum_div", [4], 0, 3, True), ("sum_div", [4], 1, 3, False),
    ("are_equivalent", [36, 57], True, False, False), ("are_equivalent", [6, 6], True, False, True)])
def test_tasks_with_more_than_one_answer(name, arguments, output, expected, agree, executor):
    """An answer that returns `output` where the benchmark's own solution returns `expected`."""
    constant = f"def {name}(*arguments):\n    return {{!r}}\n"
    problem = code.read_function("0", {"task_id": "0", "prompt": "", "entry_point": name, "atol": 0,
                                       "canonical_solution": constant.format(expected), "plus_input": [],
                                       "base_input": [arguments]})
    answer = "True, 1" if output == ("\0Match", "") else repr(output)
    assert correct([problem], [fence(constant.replace("{!r}", answer))], executor) == [agree]


@pytest.mark.parametrize("output,expected,atol,agree", [
    ([1.0, 2.0000001], [1.0, 2.0], 0, True), ([1, 2], [1, 3], 0, False), (1, True, 0, True),
    (False, True, 100.0, False), ((1.0,), [1.0000001], 0, False),
    ([[1.0], [2.00001]], [[1.0], [2.0]], 1e-4, True)])
def test_tolerance(output, expected, atol, agree):
    assert code.right(partial(code.close, atol=atol), output, [expected]) == agree


def test_a_benchmark_whose_own_solution_fails_is_named(tmp_path, executor, capsys):
    rows = [RELEASE[0] | {"canonical_solution": "    return x / (x - 3)\n"},  # not for every base input
            ORIGINAL[0] | {"canonical_solution": "    return s\n"}]           # does not pass its asserts
    for file, row in zip(("release/humaneval.jsonl", "original/humaneval.jsonl"), rows):
        write(tmp_path / file, [row])
        problems = load("HumanEval+", (tmp_path / file).parent)
        assert correct(problems, [fence(row["prompt"] + row["canonical_solution"])], executor) == [False]
        assert f"{row['task_id']}: the benchmark's own solution does not run" in capsys.readouterr().err


def test_contests_with_functions(tmp_path):
    write(tmp_path / "code_generation_lite" / "test5.jsonl", CONTEST)
    problem = load("LCB-Generation", tmp_path)[1]
    head = "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        "
    answers = [head + "return [pow(x * k, 1, 99) for x in xs]", head + "return tuple(x * k for x in xs)",
               "def twice(xs, k):\n    return [gcd(0, x * k) for x in xs]",
               head + "return [x * 2 for x in xs]"]
    with judges.sandbox(1) as executor:
        verdicts = judges.judge([problem] * 4, list(map(fence, answers)), executor)
    assert [(v["base"], v["correct"]) for v in verdicts] == [(True, True)] * 3 + [(True, False)]


def test_contests_with_standard_input(tmp_path):
    write(tmp_path / "livecodebench.jsonl", CONTEST)
    problem = load("LCB-Generation", tmp_path)[0]
    good = ["input()\nprint(sum(map(float, input().split())))",
            "import sys\nprint(sum(map(float, sys.stdin.read().split()[1:])))",
            "import sys\nfor i, line in enumerate(sys.stdin):\n"
            "    if i: print(sum(map(float, line.split())))",
            "import sys\ndef main():\n    data = sys.stdin.buffer.read().split()\n"
            "    print(sum(map(float, data[1:])))\n    sys.exit()\nif __name__ == '__main__':\n    main()",
            "import threading\ndef main():\n    n = input()\n    print(sum(map(float, input().split())))\n"
            "t = threading.Thread(target=main)\nt.start()\nt.join()",
            "input()\nprint(sum(map(float, input().split())))\nexit()\nprint('more')"]
    bad = ["print(3)", "print(sum(map(float, input().split())))", "import os\nos.system('echo 3')",
           "raise SystemExit",
           "import sys\nclass Output:\n    buffer = property(lambda self: self)\n    flush = getvalue = lambda self: self\n"
           "    decode = lambda self, *how: 7\nsys.stdout = Output()"]  # prints a number where text is compared
    with judges.sandbox(2) as executor:
        assert correct([problem] * 6, map(fence, good), executor) == [True] * 6
        assert not any(correct([problem] * 5, map(fence, bad), executor))


READS = "sum(map(float, (DATA).split()[1:]))"
FAST = """
import os, sys
from io import BytesIO, IOBase
class Fast(IOBase):
    def __init__(self, file):
        self.descriptor, self.kept = file.fileno(), BytesIO()
        self.write = lambda text: self.kept.write(text.encode())
    def read(self):
        return os.read(self.descriptor, max(os.fstat(self.descriptor).st_size, 8192)).decode()
    def flush(self):
        os.write(self.descriptor, self.kept.getvalue())
        self.kept = BytesIO()
sys.stdin, sys.stdout = Fast(sys.stdin), Fast(sys.stdout)
"""


@pytest.mark.parametrize("setup,data,output", [  # a program that reads DATA and gives the sum to OUTPUT
    (FAST, "sys.stdin.read()", "print(SUM)"),
    ("import threading\nclass Main(threading.Thread):\n    def run(self):\n", "input() + ' ' + input()",
     "        print(SUM)\nmain = Main()\nmain.start()\nmain.join()"),
    ("import sys, threading\ndef main():\n    global total\n", "input() + ' ' + input()",
     "    total = SUM\n    sys.exit()\nthread = threading.Thread(target=main)\nthread.start()\nthread.join()\nprint(total)"),
    ("import threading\ndef bad():\n    raise ValueError\nthreading.Thread(target=bad).start()\n", "stdin.read()", "print(SUM)"),
    ("import threading\nthreading.Timer(0.5, lambda: print(total)).start()\n", "open(0).read()", "total = SUM"),
    ("import threading\nlate = threading.Timer(0.5, print, [7])\nlate.start()\n", "open(0).read()", "late.cancel()\nprint(SUM)"),
    ("import threading, time\nthreading.Timer(0.5, lambda: print(total)).start()\n", "open(0).read()",
     "total = SUM\ntime.sleep(1)\ntotal = 7"),
    ("import _thread\n", "open(0).read()", "_thread.start_new_thread(print, (SUM,))"),
    ("import builtins\n", "builtins.input() + ' ' + builtins.input()", "print(SUM)"),
    ("import io\n", "io.open(0).read()", "print(SUM)"), ("import io\n", "io.open(0, 'rb', 0).read()", "print(SUM)"),
    ("", "open('/dev/stdin').read()", "print(SUM, file=open(1, 'w'))"),
    ("import pathlib\n", "pathlib.Path('/dev/stdin').read_text()", "print(SUM)"),
    ("import fileinput\n", "' '.join(fileinput.input())", "print(SUM)"),
    ("import sys\n", "sys.__stdin__.read()", "sys.__stdout__.write(str(SUM))"),
    ("import codecs, sys\n", "codecs.getreader('utf-8')(sys.stdin.buffer).read()", "sys.stdout.buffer.write(str(SUM).encode())"),
    ("import os\n", "os.read(0, 10 ** 6)", "os.write(1, str(SUM).encode())"),
    ("import os\n", "BytesIO(os.read(0, os.fstat(0).st_size)).read()", "os.fdopen(1, 'w').write(str(SUM))"),
    ("import os, sys\n", "os.fdopen(0).read()", "print(SUM)\nsys.stdout.flush()\nos._exit(0)"),
    ("import atexit\n", "open(0).read()", "atexit.register(print, SUM)"),
    ("import atexit, io, sys\nsys.stdout = io.StringIO()\n"
     "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n", "open(0).read()", "print(SUM)"),
    ("", "stdin.read()", "stdout.write(str(SUM)); assert maxsize and StringIO and setrecursionlimit and argv and dumps"),
    ("try:\n    sys.stdin = open('input.txt')\n    sys.stdout = open('output.txt', 'w')\nexcept FileNotFoundError:\n    pass\n",
     "input() + ' ' + input()", "print(SUM)")])
def test_contest_programs_that_plain_python_runs(setup, data, output, tmp_path):
    write(tmp_path / "livecodebench.jsonl", CONTEST)
    problem = load("LCB-Generation", tmp_path)[0]
    program = setup + re.sub(r"\bSUM\b", READS.replace("DATA", data), output)
    if "global total" in setup or "def run" in setup:  # the body of a function
        program = setup + output.replace("SUM", READS.replace("DATA", data))
    with judges.sandbox(1) as executor:
        assert correct([problem] * 2, [fence(program), fence(program.replace("sum(", "min("))], executor) == [True, False]


def test_what_is_never_flushed_is_not_printed(tmp_path):
    write(tmp_path / "livecodebench.jsonl", CONTEST)
    program = "import os\nprint(sum(map(float, open(0).read().split()[1:])))\nos._exit(0)"
    with judges.sandbox(1) as executor:
        assert correct(load("LCB-Generation", tmp_path)[:1], [fence(program)], executor) == [False]


NINES = "9" * 5000


def function_row(*tests):
    return CONTEST[1] | {"public_test_cases": json.dumps(cases(*tests, kind="functional")), "private_test_cases": "[]"}


LONG_INTEGERS = [  # tests with JSON integers beyond Python's 4,300 digits; right and wrong expressions of xs, k
    ([(f"{NINES}\n1", "1" + "0" * 5000)], "xs + k", ["xs - k", "xs", "[xs + k]", "str(xs + k)", "1e5000"]),
    ([(f"-{NINES}\n1", f"-{NINES[1:]}8")], "xs + 11 * k - 10", ["xs", "-xs - k", "9"]),
    ([(f"[[{NINES}, 1], [-{NINES}]]\n{NINES}", f"[{NINES}, 1, -{NINES}, {NINES}]")], "sum(xs, []) + [k]",
     ["sum(xs, [])", "[abs(x) for x in sum(xs, [])] + [k]"]),
    ([("[1, 2]\n3", f'{{"a": {NINES}, "b": [{{"c": -{NINES}0}}]}}')], "{'a': 10 ** 5000 - 1, 'b': [{'c': 10 - 10 ** 5001}]}",
     ["{'a': 10 ** 5000 - 1, 'b': [{'c': 10 - 10 ** 5000}]}", "{'a': 10 ** 5000 - 1}"]),
    ([(f'{{"a": [{NINES}]}}\n3', "45000"), ('{"a": [12]}\n3', "3")], "sum(map(int, str(xs['a'][0])))", ["45000", "3"]),
    ([(f'"{NINES}"\n1', "1" + "0" * 5000)], "int(xs) + k", ["int(xs)", "xs"]),  # a text is a text
    ([("12345\n4999", f'"{NINES}9"')], "'9' + str(10 ** 4999 - 1) + '9'", ["10 ** 5001 - 1"]),
    ([(f"{sign}{digit * count}\n0", f"{sign}{digit * count}") for sign in ("", "-") for digit in "19"
      for count in (3999, 4000, 4001, 4214, 4215, 4299, 4300, 4301, 8000, 8001, 50_000)], "xs", ["-xs", "xs + 1", "xs ^ 1"])]


@pytest.mark.parametrize("tests,right,wrong", LONG_INTEGERS, ids=[right for _, right, _ in LONG_INTEGERS])
def test_functions_of_integers_of_many_digits(tests, right, wrong, tmp_path):
    write(tmp_path / "livecodebench.jsonl", [function_row(*tests)])
    problem, = load("LCB-Generation", tmp_path)
    answers = [fence(f"class Solution:\n    def twice(self, xs, k):\n        return {value}") for value in (right, *wrong)]
    limit = getattr(sys, "get_int_max_str_digits", int)()
    with judges.sandbox(1) as executor:
        assert correct([problem] * len(answers), answers, executor) == [True] + [False] * len(wrong)
    assert getattr(sys, "get_int_max_str_digits", int)() == limit


def test_short_integers_of_tests_stay_integers():
    for text in ("0", "-0", "-7", NINES[:4000], "-" + NINES[:4000]):
        assert code.integer("f", text) == int(text)


def test_long_integers_of_tests_are_what_the_sandbox_makes_of_them():
    values = [10 ** 4000, 10 ** 4001 - 1, 7 ** 9000, 10 ** 8000, 3 ** 20_000 * 10 ** 4000, 10 ** 99_999]
    marks = [["\0int", hex(value)] for value in [*values, *(-value for value in values)]]
    program = code.PRELUDE + "def g(value):\n    return [value, str(value)]"
    with judges.sandbox(1) as executor:
        outputs, = code.run_programs(executor, [(program, "g", [code.written([mark]) for mark in marks], code.EVERYTHING)])
    assert [[*mark] for mark, _ in outputs] == [code.integer("f", text) for _, text in outputs] == marks


def test_asserts_with_integers_of_many_digits(tmp_path, executor):
    tests = "def check(f):\n    assert f(10 ** 5000) == 5 * 10 ** 4999\n    assert f(-2 * 10 ** 6000) == -10 ** 6000\n"
    write(tmp_path / "humaneval.jsonl", [ORIGINAL[0] | {"prompt": HALF, "entry_point": "half", "test": tests,
                                                        "canonical_solution": "    return x // 2\n"}])
    answers = [HALF + f"    return {value}" for value in ("x >> 1", "divmod(x, 2)[0]", "x // 2 + 1")]
    assert correct(load("HumanEval+", tmp_path) * 3, map(fence, answers), executor) == [True, True, False]


def test_an_integer_of_a_test_has_a_bound(tmp_path, executor):
    for given, result in ((f"{'7' * 3_000_000}\n1", "1"), ("1\n1", f"[-{'7' * 100_001}]")):
        write(tmp_path / "livecodebench.jsonl", [function_row((given, result))])
        with pytest.raises(UsageError, match=r"^a test of twice has an integer of [\d,]+ digits, and at most 100,000 are read; .*$"):
            correct(load("LCB-Generation", tmp_path), [fence("def twice(xs, k):\n    return 1")], executor)


def test_numbers_of_many_digits(tmp_path):
    rows = [CONTEST[0] | {"public_test_cases": json.dumps(cases(("20000\n", "1" + "0" * 20000), kind="stdin")),
                          "private_test_cases": private(cases(("1" + "0" * 9000 + "\n", "9000"), kind="stdin"))}]
    write(tmp_path / "livecodebench.jsonl", rows)
    program = "n = int(input())\nprint(10 ** n if n < 10 ** 9 else len(str(n)) - 1)"
    with judges.sandbox(1) as executor:
        assert correct(load("LCB-Generation", tmp_path) * 2, [fence(program), fence(program.replace("10 **", "1 + 10 **"))],
                       executor) == [True, False]


@pytest.mark.parametrize("expected, output, agree", [
    ("1.50 2", "1.5 2.0\n", True), ("1-2", "1-2\n", True), ("2024-01-02 ", "2024-01-02", True), ("e4\n", "e4", True),
    ("1..2\n3", "1..2\n3.0\n", True), ("1-2", "-1", False), ("1 2", "12", False), ("1\n2", "1 2", False)])
def test_printed_lines_are_compared_as_text_or_as_numbers(expected, output, agree):
    assert code.right(code.same_lines, output, [expected]) is agree


def test_a_long_line_that_is_almost_a_number_takes_no_time():
    numbers = "7 " * 300_000  # hours, if each start were tried
    assert not code.right(code.same_lines, numbers + "None", [numbers + "no"])


def test_the_program_is_found_among_other_blocks():
    reads, defines = (code.ProgramProblem("", "", name, name, "", (), "", None, None) for name in ("", "g"))
    program = "print(input())"
    assert reads.answer_in(f"```python\nn = input()\n```\nAll of it:\n```Python\n{program}\n```").strip() == program
    for other in ("```\n1 2\n```", "```bash\npython main.py\n```", "```text\n3\n```"):
        assert reads.answer_in(f"```python\n{program}\n```\nA run of it:\n{other}").strip() == program
    assert reads.answer_in(f"```\n{program}\n```").strip() == program
    text = "def g():\n    return '''a\n   \nb'''"
    assert defines.answer_in(f"```python\n{text}\n```").strip() == text
    listed = "1. So:\n\n   ```python\n   def g(x):\n       return x\n   ```\n"
    assert defines.answer_in(listed).strip() == "def g(x):\n    return x"


def test_contest_programs_have_the_builtins():
    scope = {}
    exec(code.PRELUDE.partition("sys.setrecursionlimit")[0], scope)
    assert not [name for name in scope if name != "__builtins__" and scope[name] is not getattr(builtins, name, scope[name])]


def test_contest_programs_have_the_names_and_the_recursion_that_they_are_written_for(tmp_path):
    write(tmp_path / "livecodebench.jsonl", CONTEST)
    problem = load("LCB-Generation", tmp_path)[1]
    body = ("        down = lambda n: n and down(n - 1)\n        assert down(5000) == 0 and sys.maxsize > abs(-1) == pow(1, 2, 5)\n"
            "        assert ascii_lowercase[0] == 'a' and random.random() < 1 and datetime.date(20, 1, 1).year == 20\n"
            "        return [x * k for x in deepcopy(xs)]")
    with judges.sandbox(1) as executor:
        assert correct([problem], [fence(f"class Solution:\n    def twice(self, xs, k):\n{body}")], executor) == [True]


def test_benchmarks_may_use_more_modules():
    program = ("import hashlib, random, datetime, os, sys, time\n"
               "import doctest, unittest, warnings, logging, traceback, argparse, pathlib, signal, atexit, inspect, gc\n"
               "def g():\n    random.seed(1)\n"
               "    return hashlib.md5(b'a').hexdigest()[:4], sys.maxsize > 1, datetime.date(20, 1, 1).year")
    hostile = "import os\ndef g():\n    return os.listdir('/')"
    with judges.sandbox(1) as executor:
        outputs = code.run_programs(executor, [(program, "g", ["[]"], 99), (hostile, "g", ["[]"], 99)])
    assert outputs == [[("0cc1", True, 20)], None]


def test_private_tests_are_read_without_running_them():
    class Evil:
        def __reduce__(self):
            return os.system, ("echo broken",)
    pack = lambda value: base64.b64encode(zlib.compress(pickle.dumps(value))).decode()  # noqa: E731
    assert code.unpack('[{"input": "1"}]') == '[{"input": "1"}]' and code.unpack(pack("[1]")) == "[1]"
    for value in (Evil(), [1], {"a": Evil()}):
        with pytest.raises(ValueError):
            code.unpack(pack(value))


# --- input and output --------------------------------------------------------------------------------

def test_input_and_output(tmp_path, executor):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa
    write(tmp_path / "cruxeval.jsonl", CRUX)
    (tmp_path / "execution-v2").mkdir()
    pyarrow.write_table(pa.Table.from_pylist(EXECUTION), tmp_path / "execution-v2" / "test-00000.parquet")
    problems = {name: load(name, tmp_path) for name in ("CRUXEval-I", "CRUXEval-O", "LCB-Execution")}
    assert [p.key for p in problems["CRUXEval-I"]] == ["sample_0", "sample_1"] and \
        problems["LCB-Execution"][0].key == "sample_7"
    assert "'ab', 2" not in problems["CRUXEval-I"][0].question
    assert "'abab'" not in problems["CRUXEval-O"][0].question
    assert "f = countIt" in problems["LCB-Execution"][0].question
    assert "xs = [1, 2, (1)], k = 1" in problems["LCB-Execution"][0].question

    def verdicts(name, place, answers):
        return correct([problems[name][place]] * len(answers), answers, executor)
    inputs = ["'ab', 2", "f('ab', 2)", "[ANSWER]f('ab', 2)[/ANSWER]",
              "assert f('abab', 1) == 'abab'", "2, 'ab'", "`'ab', n=2`", "'ab'"]
    assert verdicts("CRUXEval-I", 0, inputs) == [True] * 6 + [False]
    outputs = ["'abab'", '"abab"', "f('ab', 2) == 'abab'", fence("'abab'", "output"),
               "[ANSWER]'abab'[/ANSWER]", "[ANSWER]f('ab', 2) == 'abab'[/ANSWER]",
               "so</think> <answer>'abab'</answer>", "'ab' * 2",
               "abab", "It is\n'abab'", ""]
    assert verdicts("CRUXEval-O", 0, outputs) == [True] * 7 + [False] * 4
    assert verdicts("CRUXEval-O", 1, ["{True: None, 2: None}", "{1: None, 2: None}"]) == [True, False]
    assert verdicts("LCB-Execution", 0, ["2", "3"]) == [True, False]
    forms = ["```output\nVALUE", "``` output\nVALUE\n```", "```output\nVALUE```", "```output\nVALUE\n``` as s is doubled.",
             "```output title\nVALUE\n```", "````output\nVALUE\n````", "~~~output\nVALUE\n~~~", "It is ```output\nVALUE\n```",
             "```VALUE```", "```\nVALUE\n```\nDone", "</think><answer>~~~output\nVALUE\n~~~</answer>", "[ANSWER]VALUE",
             "```output\nVALUE\n```\nCheck:\n```python\nassert f('ab', 2)\n```"]
    for value, right in (("'abab'", True), ("'aba'", False)):
        responses = [form.replace("VALUE", value) for form in forms]
        assert verdicts("CRUXEval-O", 0, responses) == [right] * len(forms)
        assert problems["CRUXEval-O"][0].answer_in(responses[0]) == value
    responses = [form.replace("VALUE", "'ab', 2").replace("output", "input") for form in forms]
    assert verdicts("CRUXEval-I", 0, responses) == [True] * len(forms)


# --- mathematics -------------------------------------------------------------------------------------

EQUAL = [                       # gold, right answers, wrong answers
    (r"\frac{1}{2}", [r"\dfrac12", "0.5", "1/2", r"\tfrac{2}{4}", "x = 1/2", ".5"],
     ["0.51", r"\frac{2}{1}", "12"]),
    ("13535", ["13,535", "13{,}535", r"13\,535", "13535.0", r"\$13535", "13535."],
     ["1353", "13,536", "13,5,35"]),
    (r"90^\circ", ["90", r"90^{\circ}", r"90 \text{ degrees}", "90°"], ["91", r"\frac{\pi}{2}", r"9^\circ"]),
    (r"15\%", ["15", "15%", "0.15"], ["1.5", "16\\%", "0.16"]),
    (r"10\text{ cm}^2", ["10", r"10 \mathrm{cm}^{2}", "10.0"], [r"10\text{ cm}", r"10\text{ m}^2", "100"]),
    ("(3,1)", [r"\left( 3, 1 \right)", r"(3, \frac22)"], ["(1,3)", "(5,2)", "3", "(3,1,0)", r"\{3,1\}"]),
    ("[0,1)", [r"\left[0,1\right)", r"x \in [0, 1)"], ["[0,1]", "(0,1)", "(0,1]", "[0,2)"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"(3, \infty) \cup (-\infty, 2)"],
     [r"(-\infty,2]\cup(3,\infty)", r"(3,\infty)"]),
    ("1,-2", ["-2, 1", r"x=1 \text{ or } x=-2", r"\{1, -2\}"], ["1", "1,2", "1,-2,3", "(1,-2)"]),
    (r"1 \pm \sqrt{19}", [r"1-\sqrt{19}, 1+\sqrt{19}"], [r"1+\sqrt{19}", r"1 \pm \sqrt{18}"]),
    ("x=5", ["5", "x = 5"], ["y=5", "x=6"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{evelyn}", r"\textbf{Evelyn}."], ["Evelny", "E", "42"]),
    (r"\text{(C)}", ["C", "(C)"], ["B", r"\text{(D)}"]),
    ("52_8", ["52_{8}"], ["52", "52_7", "53_8"]),
    ("6 - 5i", ["-5i+6"], ["6+5i", "6-5"]),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
     [r"\begin{pmatrix}-\frac13\\\frac23\end{pmatrix}", r"-\begin{pmatrix} 1/3 \\ -2/3 \end{pmatrix}"],
     [r"\begin{pmatrix} -1/3 \\ 1/3 \end{pmatrix}", r"\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}",
      r"-\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"]),
    ("p - q", ["-q + p"], ["q - p", "p"]),
    (r"3\sqrt{13}", [r"\sqrt{117}"], [r"3\sqrt{12}", "10.8"]),
    (r"\frac{3}{56}", [r"\dfrac{3}{56}", r"\frac 3{56}", "3/56"], [r"\frac{35}{6}", r"\frac{35}6"]),
    (r"\sqrt{15}", [r"\sqrt {15}", "sqrt(15)"], [r"\sqrt{1}5", r"\sqrt{5}"]),
    (r"2^{1009}", ["2^{1009 }"], [r"2^{100}9", r"2^{10}09"]),
    ("11/2", ["5.5"], ["1 1/2", "1"]),
    (r"1+\sqrt{3}i", [r"1+i\sqrt{3}"], [r"1+\sqrt{3i}"]),
    (r"\frac{d x}{d t}=k x-a", [r"\frac{dx}{dt} = kx - a"],
     [r"2\frac{d x}{d t}=k x-a", r"\frac{d y}{d t}=k x-a", "0=kx-a"]),
    ("(1,8,19), (2,7,13)", ["(2,7,13),(1,8,19)"], ["(1,8,19)", "(8,1,19),(2,7,13)"]),
    ("(4,2,3,2)", [r"\left(4, 2, 3, 2\right)"], ["(4,2,4,2)", "(4,2,3)"]),
    (".35625", ["$.35625$", "0.35625", r"\approx .35625", r"\frac{57}{160}"], ["35625", "0.3562"]),
    # thousands, spaces and other spellings
    (r"11,\! 111,\! 111,\! 100", ["11111111100", "11,111,111,100", "11{,}111{,}111{,}100"],
     ["11111111101", "11,111"]),
    (r"\{1\pm\sqrt{5},-2\}", [r"-2, 1+\sqrt5, 1-\sqrt5", r"1\pm\sqrt{5},-2", r"\{-2,1-\sqrt{5},1+\sqrt{5}\}"],
     [r"1\pm\sqrt5", r"1+\sqrt5,-2"]),
    (r"\frac{20,000}{\pi}", [r"\frac{20000}{\pi}", r"\frac{20{,}000}{\pi}"], [r"\frac{20}{\pi}"]),
    ("np.arcsin(10/13)", [r"\arcsin(10/13)", r"\arcsin\frac{10}{13}", r"\sin^{-1}(10/13)"],
     [r"\arcsin(10/14)", r"\arccos(10/13)"]),
    ("-1./3", [r"-\frac13", "-1/3"], ["1/3", "-3", "-13"]),
    ("-3./2", ["-3/2", "-1.5"], ["3/2", "-32"]),
    # units
    (r"864 \text{ square inches}", ["864", r"864 \text{ in}^2", r"864\text{ inches}^2", r"864 \text{ sq in}"],
     [r"864 \text{ inches}", r"864\text{ square feet}", "865"]),
    (r"3 \text{ atoms}/\mathrm{m}^2", ["3", r"3 \text{ atoms/m}^2", r"3\ \mathrm{atoms}/\mathrm{m}^2"],
     [r"3 \text{ atoms}/\mathrm{m}^3"]),
    (r"\$36", ["36", r"36 \text{ dollars}", r"\$36.00"], [r"36 \text{ cents}", r"36\%", "37"]),
    (r"36\%", ["36", "0.36"], [r"\$36", r"36\text{ cents}"]),
    # one formula, written in other ways
    (r"-2 + 2i\sqrt{3}", [r"2i\sqrt3-2", r"-2+2\sqrt3 i", r"-2+2\sqrt{3}\mathrm{i}"], [r"-2-2i\sqrt3"]),
    (r"\frac{c}{\sqrt2}", [r"\frac{\sqrt2}{2}c", r"c/\sqrt{2}"], [r"\frac{c}{2}"]),
    (r"\frac{37m}{4}", [r"\frac{37}{4}m", "9.25m", "37m/4"], [r"\frac{37}{4}", r"\frac{73m}{4}"]),
    (r"y^{\prime}+ry=0", ["y'+ry=0", r"\approx y'+ry=0", "y' + r y = 0"], ["y+ry=0"]),
    (r"y^{\prime}", ["y'"], ["y", "y''"]),
    ("MR", [r"\text{MR}", r"\mathrm{MR}"], ["MC"]), (r"\text{MR}", ["MR"], ["MC"]),
    (r"c^{2}(\gamma^{2}-1)", [r"c^2(-1+\gamma^2)"], [r"c^{2}(\gamma^{2}-2)"]),
    # one answer, and no more than one
    ("3", ["x = 3", r"\approx 3", r"x \approx 3", "3.0"],
     ["4 = 3", r"3 \approx 4", "3,4", "3 or 4", "33", "-3"]),
    (r"\frac13", [r"x = \frac13 \approx 0.33"], [r"\frac13 \approx 0.34"]),
    ("0", ["0.0"], [r"0 \text{ but maybe } 4", "4"]),
    (r"\infty", [r"+\infty"], [r"\infty \quad 4", r"-\infty"]),
    ("1.5", [r"\frac32 = 1.5", r"1.5 \approx 2"], ["2 = 1.5"]),  # an answer is rounded after it is found
    ("1 + 1 = 2", ["1+1=2"], ["3 = 3"]),
    ("x = 1 + y", ["1 + y = x"], ["3 = 3"]),
    # names before a tuple or a set
    ("(3,2)", ["(x,y) = (3,2)", "(x, y) = (3, 2)", "C = (3,2)"], ["(x,y) = (2,3)", "(x,y)"]),
    ("(1,1), (3,2)", ["(x,y)=(1,1), (x,y)=(3,2)", r"(x,y) \in \{(1,1), (3,2)\}"], ["(x,y)=(1,1)"]),
    (r"\{-2\}", [r"x = \{-2\}"], [r"x = \{2\}"]),
    # symbols that math-verify does not read
    (r"\frac13 E_{1} + \frac23 E_{2}", [r"\frac23 E_2 + \frac13 E_1"], [r"\frac23 E_1 + \frac13 E_2"]),
    (r"m_{\max} = n - 1", [r"n - 1 = m_{\max}", "n-1"], [r"n = m_{\max}"]),
    (r"k \geqslant 2", ["k >= 2", "k ≥ 2"], ["k > 2", "k <= 2"]),
    # numbers below the places to which math-verify rounds
    ("2.88e-19", [r"2.88 \times 10^{-19}", r"\frac{2.88}{10^{19}}"], [r"\frac{2.88}{10^{18}}", "0"]),
    # a unit behind what is not a digit
    (r"8\pi", [r"8\pi \text{ cm}", r"8\pi\text{ cm}^3"], [r"9\pi \text{ cm}"]),
    ("x", [r"x\text{ cm}"], [r"y\text{ cm}", r"x \text{ is not an integer}", r"x\text{-axis}", r"x \text{ and y}"]),
    ("5!", [r"5!\text{ ways}", "120"], [r"4!\text{ ways}"]), ("A", [], [r"A \text{ and C}"]),
    # units as the solutions of Minerva write them
    ("25", [r"25\ \mathrm{erg\,s^{-1}}", r"25\, \frac{\text{erg}}{\text{s}}", r"25 \AA", r"25\ \Omega", "25 eV",
            r"25\, \mu\text{m}", r"25^\circ C", r"25^{\circ} \mathrm{C}", "25 nm"], [r"26\ \Omega", "25 c"]),
]


# Of each kind of answer: gold, right answers, wrong answers
KINDS = {
    "values that are the same double, or nearly": [
        (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", [r"\frac16+\frac{1}{3\cdot 2^{2006}}"], [r"\frac{2^{2005}-1}{3\cdot 2^{2006}}", r"\frac16"]),
        (r"\frac{1}{2004!}", [r"\frac{2005}{2005!}"], [r"\frac{1}{2006!}", "0"]),
        (r"10^{-400}", [r"\frac{1}{10^{400}}"], [r"10^{-401}", "0"]), ("0", [r"\ln 1"], [r"2^{-1100}", r"e^{-1000}"]),
        (r"e^{-1000}", [r"\frac{1}{e^{1000}}"], ["0", r"e^{-1001}"]), (r"2^{100000}+1", [r"1+4^{50000}"], [r"2^{100000}-1", r"2^{100000}"]),
        ("1", [r"\sin^2 3+\cos^2 3"], [r"1-2^{-60}", r"1+10^{-300}"]), (r"\sqrt2", [r"\frac{2}{\sqrt2}"], [r"\sqrt2+10^{-30}"]),
        (r"\sqrt{10^{40}+1}", [], [r"10^{20}"]), (r"\frac13", ["0.333333", "0.33333333333333333333"],
                                                   ["0.3333", "0.333334", r"\frac{33333333333333333333}{10^{20}}"]),
        ("0.1", [r"\frac{1}{10}"], [r"\frac{1}{10}+\frac{1}{10^{30}}"]), (r"\pi", ["3.14159265", "3.1415926"], ["3.14159", "3.14159266"]),
        ("100000000000000000001", [], ["100000000000000000000"]), ("3+4i", ["4i+3"], [r"3+4i+10^{-30}i", "3-4i"]),
        (r"\sin\frac{\pi}{5}", [r"\sqrt{\frac{5-\sqrt5}{8}}"], [r"\sqrt{\frac{5-\sqrt5}{7}}"]),
        (r"\binom{100}{50}", [r"\frac{100!}{50!50!}"], [r"\frac{100!}{50!50!}+1"]),
        (r"\frac{x}{2004!}", [], [r"\frac{x}{2006!}"]), ("x", [r"\frac{x^2}{x}"], [r"x+10^{-20}", r"|x|", r"\sqrt{x^2}"])],
    "letters with their values": [
        ("36", [r"\textbf{(C)}\ 36", r"\textbf{(C) } 36", r"\textbf{(C) 36}", r"\mathrm{(C)}~36", "(C) 36", "C. 36", "C) 36", "(C): 36"],
         [r"\textbf{(C)}\ 37", "C"]),
        ("C", [r"\textbf{(C)}\ 36", "(C) 36"], [r"\textbf{(D)}\ 36"]), (r"\textbf{(C)}\ 36", ["36", "C", "(C)"], ["37", "D"]),
        ("B", [r"\text{(B)}", r"\mathbf{(B)}", r"\textbf{(B) }36"], [r"\text{(C)}", r"\mathbf{(C)}"]),
        ("36", [r"\text{(B)}\quad 36", r"\textbf{(B)}\qquad 36"], [r"\text{(B)}\quad 37", r"\text{(B)}\quad 36, 37"]),
        (r"\frac12", [r"\textbf{(A)}\ \frac{1}{2}", r"\text{(A)}\ 0.5"], [r"\textbf{(A)}\ 2"]), ("-5", [r"\textbf{(A) } -5"], ["(A) 5"])],
    "colours, styles and text": [
        ("5", [r"\color{red}{5}", r"\color{blue}5", r"\textcolor{red}{5}", r"\bf 5", r"\mathbf{5}", r"\Large 5", r"{\Large{5}}", r"\underline{5}",
               r"\textbf{5}", r"\text{5}", r"\colorbox{yellow}{5}", r"\boldsymbol{5}", r"\displaystyle 5", r"{5}", r"\boxed{5}"],
         [r"\color{red}{6}", r"\mathbf{6}", r"\text{6}"]),
        (r"\frac12", [r"\mathbf{\frac12}", r"\boldsymbol{\frac{1}{2}}", r"\color{red}{\frac{1}{2}}", r"\textstyle\frac12"], [r"\mathbf{\frac13}"]),
        ("7", [r"\color[rgb]{1,0,0}7", r"\textcolor[rgb]{1,0,0}{7}", r"\mathbf 7", r"\mathbf7"], [r"\color[rgb]{1,0,0}8", r"\mathbf 8"]),
        ("x+1", [r"\boldsymbol{x+1}", r"\mathbf x+1"], [r"\boldsymbol{x-1}", r"\mathbf y+1"]), ("1,2", [r"\text{1 and 2}"], [r"\text{1 and 3}"]),
        (r"42\text{ cm}", [r"\text{42 cm}", r"\textbf{42 cm}"], [r"\text{42 m}", r"\text{43 cm}"]), ("50", [r"\text{\$50}", r"\textbf{50%}"], [])],
    "numbers side by side": [
        (r"\frac72", ["3 1/2", r"3\frac12", r"3\ \frac{1}{2}", "3.5"], ["2", "4", r"\frac32"]), ("2", [], ["3 1/2"]), ("1", [], ["1 1/2"]),
        (r"-\frac72", [r"-3\frac12", "-3 1/2"], [r"-2\frac12"]), (r"-\frac52", [], [r"-3\frac12"]), (r"\frac92x", [r"4\frac12 x"], [r"2x"]),
        ("235", [], [r"1\ 234"]), (r"\frac{470}{2}", [], [r"1\ 234"]), ("7", [], ["3 4", "{3}{4}", "3{4}", r"3\ 4"]), ("34", [], ["3 4"]),
        ("12", [], ["3 4"]), ("6", ["2(3)", "(2)(3)"], ["2 3"]), ("5", [], ["2(3)", "(2)(3)"]), ("8", [r"\frac{6}{3}(4)"], ["6(1)(2)"]),
        ("24", [r"2\cdot3(4)"], []), ("1234567", [r"1\,234\,567"], [r"1\,234\,56"]), (r"\log_2 8", [r"\log_2(8)", "3"], []),
        (r"\sin^2 x", [r"\sin^2(x)"], [])],
    "the empty set": [
        (r"\emptyset", [r"\varnothing", r"\{\}", r"\{ \}", r"\left\{\right\}", "∅"], ["0", r"\{0\}", r"\{\emptyset\}", "()"]),
        (r"\{\}", [r"\emptyset"], [r"\{1\}"])],
    "dots": [
        (r"1,2,\ldots,n", [r"1, 2, \dots, n", r"1,2,\cdots,n", "1,2,...,n", r"1,2,\dotsc,n", "1, 2, …, n"], [r"2,1,\ldots,n", "1,2,n", r"1,2,\ldots"]),
        (r"\{2,4,6,\ldots\}", ["2,4,6,...", r"\{2, 4, 6, \dots\}", r"2, 4, 6 \ldots"], [r"\{4,2,6,\dots\}", r"\{2,4,6\}"]),
        (r"n,n+1,\dots,2n", [r"n,1+n,\ldots,2n"], [r"n,n+1,\ldots,n"]), (r"1+2+\cdots+n", [r"1+2+\ldots+n"], ["1+2+n"])],
    "semicolons": [
        ("1,-2", ["1;-2", r"\{-2; 1\}", r"x=1;\ x=-2"], ["1;2", "(1;-2)"]), ("[0,1)", ["[0;1)"], ["[0;1]"]), ("13535", [], ["13;535"])],
    "alternatives that are one": [("0.5", [r"\frac12, 0.5"], [r"\frac12, 0.6", "1, 2"])],
}
EQUAL += [case for of_a_kind in KINDS.values() for case in of_a_kind]
PHYSICAL = [  # right and wrong answers where all variables are positive; where they are not, nothing of this is right
    (r"\sqrt{4\pi G\rho_0 r_0^2}", [r"2r_0\sqrt{\pi G\rho_0}"], [r"r_0\sqrt{\pi G\rho_0}"]), (r"-\tau\ln\Delta", [r"\tau\ln(1/\Delta)"], [r"\tau\ln\Delta"]),
    (r"\frac{1}{\sqrt2}c", [r"\sqrt{c^2/2}"], [r"\sqrt{c/2}"]), (r"\sqrt{x^2}", ["x"], ["-x"]), (r"\ln(ab)", [r"\ln a+\ln b"], [r"\ln a\ln b"]),
    (r"\ln(a^4)", [r"4\ln a"], [r"\ln(4a)"]), (r"(a^2)^{3/2}", ["a^3"], ["a^2"]), (r"\sqrt[4]{16k^4T^4}", ["2kT"], ["4kT"]),
    (r"v=\sqrt{\frac{k^2}{m^2}}A", [r"A\frac{k}{m}"], [r"A\frac{m}{k}"])]


@pytest.fixture(scope="module")
def compared():
    """The verdicts on all of EQUAL, from one process, which takes a second to start."""
    pairs = [(gold, answer, False) for gold, right, wrong in EQUAL for answer in (gold, *right, *wrong)]
    return dict(zip(pairs, mathematics.compare(pairs)))


@pytest.mark.parametrize("gold,right,wrong", EQUAL)
def test_equal_and_nearly_equal(compared, gold, right, wrong):
    answers = [gold, *right, *wrong]
    assert [answer for answer in answers if compared[gold, answer, False]] == [gold, *right]


def test_physical_quantities_are_positive():
    golds = [gold for gold, right, wrong in PHYSICAL for _ in (*right, *wrong)]
    answers = [answer for _, right, wrong in PHYSICAL for answer in (*right, *wrong)]
    expected = [answer in right for _, right, wrong in PHYSICAL for answer in (*right, *wrong)]
    for physical in (True, False):
        verdicts = mathematics.compare([(gold, answer, physical) for gold, answer in zip(golds, answers)])
        assert verdicts == [right and (physical or gold == r"\frac{1}{\sqrt2}c" and False) for gold, right in zip(golds, expected)]


@pytest.mark.parametrize("gold,answer,rough,right", [
    ("4.5e33", r"4.5 \times 10^{33}", True, True),
    ("4.5e33", r"\approx 4.5 \times 10^{33}\text{ erg}", True, True),
    ("1.6", "1.60001", True, True),
    ("4.5e33", "4.5e32", True, False), ("1.6", "1.61", True, False),
    ("303.03", "303.04", True, False), ("1.6", "1.60001", False, False)])
def test_rounding_counts_only_where_it_is_asked_for(gold, answer, rough, right):
    assert mathematics.same_math(gold, answer, rough) is right


def test_mathematics_that_hangs_is_wrong_and_does_not_stay():
    bombs = ["9^{9^{9^{9}}}", "\\boxed{" * 300, "x" * 900, "(" * 900, "1," * 450, r"\text{" * 150]
    halves = [[("7", answer, False) for answer in [*half, "7"]] for half in (bombs[:3], bombs[3:])]
    with ThreadPoolExecutor() as pool:  # each half has one that takes all its time
        assert list(pool.map(mathematics.compare, halves)) == [[False, False, False, True]] * 2


def test_mathematical_formats(tmp_path, executor):
    expected = {"MATH500": ("test/algebra/1.json", r"\boxed{\dfrac{1}{2}}"),
                "AIME24": ("60", "so\n\\boxed{25}"),
                "AMC23": ("3", "<answer>27</answer>"), "Minerva": ("5", "Thus the answer is $4.5e33$."),
                "OlympiadBench": ("9", r"First \boxed{5}. No: \boxed{(3,4), (1,2)}")}
    problems, responses = [], []
    for file, (name, rows) in MATHS.items():
        write(tmp_path / file, rows)
        problem, = load(name, tmp_path)
        key, right = expected[name]
        assert problem.key == key and problem.question.endswith("\\boxed{}.")
        problems += [problem] * 4
        responses += [right, r"\boxed {26}", "I give up\nnow", ""]
    verdicts = judges.judge(problems, responses, executor)
    assert [v["correct"] for v in verdicts] == [True, False, False, False] * 5
    assert [v["well_formed"] for v in verdicts] == [True, True, False, False] * 5


def test_boxes():
    assert mathematics.boxed(r"\boxed{1} and \boxed{\frac{1}{2}} .") == r"\frac{1}{2}"
    assert mathematics.boxed(r"\boxed{1") is None
    assert mathematics.boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and mathematics.boxed("none") is None
    assert mathematics.boxed(r"\boxed {7}") == "7"
    problem = mathematics.MathProblem("", "", "")
    assert problem.answer_in("So.\nFinal Answer: The final answer is $x^2$. I hope it is correct.") == "x^2"
    for said in ("The answer is: 42", "The final answer is: **42**", "The answer is **42**.", r"The answer is \(42\), since 6 · 7.",
                 "Answer:\n42", "The answer is\n$$42$$", "**Answer:** 42", "The answer is:\n\\[\n42\n\\]", "Answer:\n$$\n42\n$$",
                 "The answer is 42\nCheck this answer:", "**The answer is:** $42$."):
        assert problem.answer_in(f"We count.\n{said}") == "42"
    for power in ("2**3 = 8", "x**2 + 1"):
        assert problem.answer_in(f"The answer is {power}") == problem.answer_in(f"**Answer:** {power}") == power
    assert problem.answer_in(r"thought \boxed{2}</think> <answer>\boxed{3}</answer>") == "3"


@pytest.mark.parametrize("response,answer", [
    ("**Answer: 42**", "42"), ("**The final answer is 42.**", "42"), ("The answer is therefore 42.", "42"), ("*Answer: 42*", "42"),
    ("The answer is thus $42$.", "42"), ("__Answer: 42__", "42"), ("### Answer: 42", "42"), ("**Final Answer**\n\n$42$", "42"),
    ("**Final Answer**: 42", "42"), ("The answer to the problem is 42.", "42"), ("The answer is, therefore, 42", "42"),
    ("The final answer is 42. I hope it is correct.", "42"), ("The answer is 42, since 6 times 7 is.", "42"),
    ("The correct answer is option C", "C"), ("The answer is x^* = 3", "x^* = 3"), ("Answers: 1, 2", "1, 2"),
    (r"$\boxed 5$.", "5"), (r"\boxed\frac12", r"\frac12"), (r"$\boxed\frac{1}{2}$ then", r"\frac{1}{2}"), (r"$\boxed 42$ it is", "42"),
    (r"\boxed 42 is the answer", "42"), (r"\boxed5.", "5"), (r"\boxed -3", "-3"), (r"\framebox{204}", "204"),
    (r"$\boxed{5}$. \boxed{}", "5"), (r"\boxed{5} and \boxed{ }", "5"), (r"\boxed{5}, \boxed{\,}", "5"),
    (r"$x=\boxed{1}$ or $x=\boxed{-2}$", "1, -2"), (r"\boxed{1}, \boxed{-2}", "1, -2"), (r"x_1=\boxed{1}, x_2=\boxed{-2}.", "1, -2"),
    (r"\boxed{1}\text{ or }\boxed{-2}", "1, -2"), (r"\(\boxed{1}\) or \(\boxed{2}\) or \(\boxed{3}\)", "1, 2, 3"),
    (r"First \boxed{5}. No: \boxed{6}", "6"), (r"\boxed{5}. Then \boxed{6}", "6"), (r"\boxed{5} \boxed{6}", "6"),
    (r"\boxed{1} or \boxed{2}. No: \boxed{3}", "3"), ("_Answer: 42_", "42"), ("The answer is consequently 42.", "42"), ("The answer, therefore, is 42.", "42"), ("The answer then is 42", "42"),
    (r"\boxed{3} and \boxed{\text{}}", "3"), (r"\boxed{3}, \boxed{$$}", "3"), (r"\boxed{{}_5C_2}", "{}_5C_2"),
    ("x is 5", None), ("So we get 42", None), ("The answer, it seems, is hard", None), ("It is therefore 42", None),
    ("We answer the question: it is hard", None), ("\\boxed{1", None), ("\\boxed{}", None)])
def test_final_answers(response, answer):
    problem = mathematics.MathProblem("", "", "")
    assert problem.answer_in(f"We count.\n{response}\nThat was it.") == answer


# --- names and files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text,names", [
    ("humaneval", ["HumanEval+"]), ("math-500", ["MATH500"]),
    ("HumanEvalPlus, mbpp+", ["HumanEval+", "MBPP+"]),
    ("amc 2023,LiveCodeBench Generation", ["LCB-Generation", "AMC23"]),
    ("AIME 2024,aime25", ["AIME24", "AIME25"]), ("cruxeval", ["CRUXEval-I", "CRUXEval-O"]),
    ("livecodebench", ["LCB-Generation"]), ("lcb_execution", ["LCB-Execution"]),
    ("minerva_math", ["Minerva"]),
    ("code", ["HumanEval+", "MBPP+", "LCB-Generation"]), ("CRUXEval-i", ["CRUXEval-I"]),
    ("olympiad", ["OlympiadBench"]), ("in-distribution", ["CRUXEval-I", "CRUXEval-O", "LCB-Execution"])])
def test_names_as_people_write_them(text, names):
    assert judges.named(text) == names


def test_groups():
    assert [len(judges.named(group)) for group in ("all", "math", "heldout")] == [12, 6, 3]
    with pytest.raises(UsageError, match="no benchmark 'gsm8k'"):
        judges.named("gsm8k")


def test_files_are_found_by_their_names(tmp_path):
    for path in ("livecodebench/execution-v2/test.jsonl", "livecodebench/code_generation_lite/test.jsonl",
                 "livecodebench/code_generation_lite/test2.jsonl", "HumanEval.jsonl",
                 "HumanEvalPlus-v0.1.10.jsonl", "aime25/dataset_infos.json",
                 "MbppPlus.jsonl", "cruxeval_60.jsonl", "aime25.jsonl", "notes.jsonl", "math500_100.jsonl"):
        write(tmp_path / path, [{}])
    files = {name: [path.name for path in paths] for name, paths in judges.local_files(tmp_path).items()}
    assert files == {"LCB-Execution": ["test.jsonl"], "LCB-Generation": ["test.jsonl", "test2.jsonl"],
                     "HumanEval+": ["HumanEvalPlus-v0.1.10.jsonl"], "MBPP+": ["MbppPlus.jsonl"],
                     "CRUXEval-I": ["cruxeval_60.jsonl"], "CRUXEval-O": ["cruxeval_60.jsonl"],
                     "AIME25": ["aime25.jsonl"], "MATH500": ["math500_100.jsonl"]}


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path):
    write(tmp_path / "aime24.jsonl", [{"problem": "?", "answer": "1"}])
    write(tmp_path / "amc23.jsonl", [{"task": "?"}])
    (tmp_path / "aime25.jsonl").write_text("{not json\n")
    problems, missing = judges.load_benchmarks(judges.named("math"), tmp_path)
    assert list(problems) == ["AIME24"] and problems["AIME24"][0].key == "0"
    assert "hf download --repo-type dataset HuggingFaceH4/MATH-500" in missing["MATH500"]
    assert "a task lacks 'answer'" in missing["AMC23"] and "AIME25" in missing


def test_revisions_are_pinned():
    for name, benchmark in judges.BENCHMARKS.items():
        assert benchmark.group == "heldout" or re.fullmatch("[0-9a-f]{40}", benchmark.revision), name


