"""Benchmarks: every published format with invented tasks, the judges, resuming, judging from a file."""

import base64
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib

import pytest
from conftest import ROOT, make_random_model

import eval as e
from executor import Executor


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fence(code, tag="python"):
    return f"Let me see.\n```{tag}\n{code}\n```\n"


def load(name, data):
    problems, missing = e.load_benchmarks([name], data)
    assert not missing, missing
    return problems[name]


def correct(name, problems, responses, executor):
    return [verdict["correct"] for verdict in e.judge(name, problems, responses, executor)]


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
    broken = [code + f"\n\nold = {problem.gold.name}\ndef {problem.gold.name}(*a):\n    return [old(*a)]"
              for code, problem in zip(good, problems)]
    assert correct(name, problems, map(fence, good), executor) == [True] * len(rows)
    assert correct(name, problems, map(fence, broken), executor) == [False] * len(rows)
    bodies = [fence(row["canonical_solution"]) for row in rows if "canonical_solution" in row]
    assert not bodies or all(correct(name, problems, bodies, executor))
    assert problems[0].id == (rows[0]["task_id"] if isinstance(rows[0]["task_id"], str) else "Mbpp/904")
    assert all(problem.gold.name in problem.question for problem in problems)


def test_base_tests_alone_are_not_enough(tmp_path):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    problems = load("HumanEval+", tmp_path)
    answers = [HALF + "    return x / 2", HALF + "    return max(x, 0) / 2", HALF + "    return x / 2 + 1e-9",
               HALF + "    return x / 2 + 1e-3", HALF + "    return str(x / 2)", HALF + "    return",
               HALF + "    import os\n    return os.getpid()", HALF + "    while True: pass"]
    with Executor(2, timeout=1.0) as executor:
        verdicts = e.judge("HumanEval+", problems * len(answers), map(fence, answers), executor)
    assert [(v["base"], v["correct"]) for v in verdicts] == [
        (True, True), (True, False), (True, True), *[(False, False)] * 5]
    # the original tests compare with 5: a value, which is no tolerance where the row itself says that there is none
    strict = RELEASE[0] | {"test": "def check(f):\n    assert f([]) == (0, 5)\n"}
    write(tmp_path / "strict" / "HumanEvalPlus.jsonl", [strict])
    with Executor(1) as executor:
        (verdict,) = e.judge("HumanEval+", load("HumanEval+", tmp_path / "strict"), [fence(HALF + "    return x / 2 + 1")], executor)
    assert not verdict["base"] and not verdict["correct"]
    malformed = ["I do not know.", "", "```python\ndef half(x):\n    return x", "x / 2",
                 "</think><answer></answer>"]
    for verdict in e.judge("HumanEval+", problems * len(malformed), malformed, None):
        assert verdict == {"base": False, "correct": False, "well_formed": False}


def test_programs_cannot_pass_by_cheating(tmp_path, executor):
    write(tmp_path / "HumanEvalPlus.jsonl", RELEASE[:1])
    problems = load("HumanEval+", tmp_path)
    cheats = ["class Yes:\n    def __eq__(self, other): return True\ndef half(x):\n    return Yes()",
              "raise SystemExit(0)\ndef half(x): pass",
              "def half(x):\n    return x / 2\nprint('a' * 10 ** 7)\n1 / 0",
              "def half(x):\n    return {'0': float('nan')}"]
    assert not any(correct("HumanEval+", problems * len(cheats), map(fence, cheats), executor))


def test_values_that_are_not_literals_agree_only_with_their_like(executor):
    program = ("import fractions, collections, enum\nclass E(enum.IntEnum):\n    A = 3\n"
               "def g(x):\n    return [fractions.Fraction(1, 3), frozenset([x]), float('nan'), 4,"
               " collections.Counter('aa'), E.A, 10 ** 5000 + x, collections.namedtuple('P', 'a')(x)][x]")
    outputs, again = e.run_programs(executor, [(program, "g", [f"[{i}]" for i in range(8)], 10 ** 6)] * 2)
    assert outputs == again and outputs[6][0] == "\0int" and outputs[:6] + outputs[7:] == [
        ("\0Fraction", "1/3"), {1}, ("\0nan",), 4, {"a": 2}, 3, (7,)]


def test_one_slow_call_does_not_fail_the_others():
    program = "def g(x):\n    for i in range(1 if x % 40 else 2_000_000):\n        x += i - i\n    return x"
    with Executor(1, timeout=0.6) as quick:
        outputs = e.run_programs(quick, [(program, "g", [f"[{i}]" for i in range(400)], 99),
                                         ("def g(x):\n    while x == 7: pass", "g", ["[6]", "[7]"], 99)])
    assert outputs == [list(range(400)), None]


@pytest.mark.parametrize("name,output,expected,arguments,right", [
    ("find_zero", 2.00001, None, "[[-4, 0, 1]]", True), ("find_zero", 2.1, None, "[[-4, 0, 1]]", False),
    ("find_char_long", ["b", "a"], ["a", "b"], "", True), ("Diff", [1], [2], "", False),
    ("check_str", ("\0Match", ""), True, "", True), ("check_str", None, True, "", False),
    ("surface_Area", 35, 0, "[3, 4]", True), ("surface_Area", 34, 0, "[3, 4]", False),
    ("digit_distance_nums", 17, 0, "[192, 9]", True), ("digit_distance_nums", 8, 0, "[19, 92]", False),
    ("check_str", [], True, "", True), ("sum_div", 0, 3, "[4]", True),
    ("are_equivalent", True, False, "[36, 57]", False)])
def test_tasks_with_more_than_one_answer(name, output, expected, arguments, right):
    assert e.ORACLES[name](output, expected, arguments, atol=1e-3) == right


@pytest.mark.parametrize("output,expected,atol,right", [
    ([1.0, 2.0000001], [1.0, 2.0], 0, True), ([1, 2], [1, 3], 0, False), (1, True, 0, True),
    (False, True, 100.0, False), ((1.0,), [1.0000001], 0, False),
    ([[1.0], [2.00001]], [[1.0], [2.0]], 1e-4, True)])
def test_tolerance(output, expected, atol, right):
    assert e.close(output, expected, "", atol) == right


def test_contests_with_functions(tmp_path, executor):
    write(tmp_path / "code_generation_lite" / "test5.jsonl", CONTEST)
    problem = load("LCB-Generation", tmp_path)[1]
    head = "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        "
    answers = [head + "return [pow(x * k, 1, 99) for x in xs]", head + "return tuple(x * k for x in xs)",
               "def twice(xs, k):\n    return [gcd(0, x * k) for x in xs]",
               head + "return [x * 2 for x in xs]"]
    verdicts = e.judge("LCB-Generation", [problem] * 4, map(fence, answers), executor)
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
            "t = threading.Thread(target=main)\nt.start()\nt.join()"]
    bad = ["print(3)", "print(sum(map(float, input().split())))", "import os\nos.system('echo 3')",
           "raise SystemExit"]
    with e.sandbox(2) as executor:
        assert correct("LCB-Generation", [problem] * 5, map(fence, good), executor) == [True] * 5
        assert not any(correct("LCB-Generation", [problem] * 4, map(fence, bad), executor))


def test_benchmarks_may_use_more_modules():
    program = ("import hashlib, random, datetime, os, sys, time\ndef g():\n    random.seed(1)\n"
               "    return hashlib.md5(b'a').hexdigest()[:4], sys.maxsize > 1, datetime.date(20, 1, 1).year")
    hostile = "import os\ndef g():\n    return os.listdir('/')"
    with e.sandbox(1) as executor:
        outputs = e.run_programs(executor, [(program, "g", ["[]"], 99), (hostile, "g", ["[]"], 99)])
    assert outputs == [[("0cc1", True, 20)], None]


def test_private_tests_are_read_without_running_them():
    class Evil:
        def __reduce__(self):
            return os.system, ("echo broken",)
    pack = lambda value: base64.b64encode(zlib.compress(pickle.dumps(value))).decode()  # noqa: E731
    assert e.unpack('[{"input": "1"}]') == '[{"input": "1"}]' and e.unpack(pack("[1]")) == "[1]"
    for value in (Evil(), [1], {"a": Evil()}):
        with pytest.raises(ValueError):
            e.unpack(pack(value))


# --- input and output --------------------------------------------------------------------------------

def test_input_and_output(tmp_path, executor):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa
    write(tmp_path / "cruxeval.jsonl", CRUX)
    (tmp_path / "execution-v2").mkdir()
    pyarrow.write_table(pa.Table.from_pylist(EXECUTION), tmp_path / "execution-v2" / "test-00000.parquet")
    problems = {name: load(name, tmp_path) for name in ("CRUXEval-I", "CRUXEval-O", "LCB-Execution")}
    assert [p.id for p in problems["CRUXEval-I"]] == ["sample_0", "sample_1"] and \
        problems["LCB-Execution"][0].id == "sample_7"
    assert "'ab', 2" not in problems["CRUXEval-I"][0].question
    assert "'abab'" not in problems["CRUXEval-O"][0].question
    assert "f = countIt" in problems["LCB-Execution"][0].question
    assert "xs = [1, 2, (1)], k = 1" in problems["LCB-Execution"][0].question

    def verdicts(name, place, answers):
        return correct(name, [problems[name][place]] * len(answers), answers, executor)
    inputs = ["'ab', 2", "f('ab', 2)", "assert f('abab', 1) == 'abab'", "2, 'ab'", "`'ab', n=2`", "'ab'"]
    assert verdicts("CRUXEval-I", 0, inputs) == [True] * 5 + [False]
    outputs = ["'abab'", '"abab"', "f('ab', 2) == 'abab'", fence("'abab'", "output"),
               "[ANSWER]'abab'[/ANSWER]", "so</think> <answer>'abab'</answer>", "'ab' * 2",
               "abab", "It is\n'abab'", ""]
    assert verdicts("CRUXEval-O", 0, outputs) == [True] * 6 + [False] * 4
    assert verdicts("CRUXEval-O", 1, ["{True: None, 2: None}", "{1: None, 2: None}"]) == [True, False]
    assert verdicts("LCB-Execution", 0, ["2", "3"]) == [True, False]


# --- mathematics -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def same():
    judge = e.MathJudge()
    yield judge
    judge.close()


@pytest.mark.parametrize("gold,right,wrong", [
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
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", [r"\begin{pmatrix}-\frac13\\\frac23\end{pmatrix}"],
     [r"\begin{pmatrix} -1/3 \\ 1/3 \end{pmatrix}", r"\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}"]),
    ("p - q", ["-q + p"], ["q - p", "p"]),
    (r"3\sqrt{13}", [r"\sqrt{117}"], [r"3\sqrt{12}", "10.8"]),
    (r"\frac{3}{56}", [r"\dfrac{3}{56}", r"\frac 3{56}", "3/56"], [r"\frac{35}{6}", r"\frac{35}6"]),
    (r"\sqrt{15}", [r"\sqrt {15}", "sqrt(15)"], [r"\sqrt{1}5", r"\sqrt{5}"]),
    (r"2^{1009}", ["2^{1009 }"], [r"2^{100}9", r"2^{10}09"]),
    ("11/2", ["5.5"], ["1 1/2", "1"]),
    (r"1+\sqrt{3}i", [r"1+i\sqrt{3}"], [r"1+\sqrt{3i}"]),
    (r"\frac{d x}{d t}=k x-a", [r"\frac{dx}{dt} = kx - a"], [r"2\frac{d x}{d t}=k x-a", r"\frac{d y}{d t}=k x-a", "0=kx-a"]),
    ("(1,8,19), (2,7,13)", ["(2,7,13),(1,8,19)"], ["(1,8,19)", "(8,1,19),(2,7,13)"]),
])
def test_equal_and_nearly_equal(gold, right, wrong, same):
    assert [form for form in [gold, *right] if not same(gold, form, False)] == []
    assert [form for form in wrong if same(gold, form, False)] == []


@pytest.mark.parametrize("gold,answer,rough,right", [
    ("4.5e33", r"4.5 \times 10^{33}", True, True), ("1.6", "1.60001", True, True),
    ("4.5e33", "4.5e32", True, False), ("1.6", "1.61", True, False),
    ("303.03", "303.04", True, False), ("1.6", "1.60001", False, False)])
def test_rounding_counts_only_where_it_is_asked_for(gold, answer, rough, right, same):
    assert same(gold, answer, rough) is right


def test_mathematics_that_hangs_is_wrong_and_does_not_stay(same, monkeypatch):
    monkeypatch.setattr(e, "TIMEOUT", 2)
    for bomb in ("9^{9^{9^{9}}}", "\\boxed{" * 300, "x" * 900):
        assert same("7", bomb, False) is False
    assert same("7", "7", False)


def test_mathematical_formats(tmp_path, executor):
    expected = {"MATH500": ("test/algebra/1.json", r"\boxed{\dfrac{1}{2}}"),
                "AIME24": ("60", "so\n\\boxed{25}"),
                "AMC23": ("3", "<answer>27</answer>"), "Minerva": ("5", "Thus the answer is $4.5e33$."),
                "OlympiadBench": ("9", r"First \boxed{5}. No: \boxed{(3,4), (1,2)}")}
    for file, (name, rows) in MATHS.items():
        write(tmp_path / file, rows)
        problem, = load(name, tmp_path)
        id, right = expected[name]
        assert problem.id == id and problem.question.endswith("\\boxed{}.")
        verdicts = e.judge(name, [problem] * 4, [right, r"\boxed{26}", "I give up\nnow", ""], executor)
        assert [v["correct"] for v in verdicts] == [True, False, False, False]
        assert [v["well_formed"] for v in verdicts] == [True, True, False, False]


def test_boxes():
    assert e.boxed(r"\boxed{1} and \boxed{\frac{1}{2}} .") == r"\frac{1}{2}" and e.boxed(r"\boxed{1") is None
    assert e.boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and e.boxed("none") is None
    assert e.math_answer(None, r"thought \boxed{2}</think> <answer>\boxed{3}</answer>") == "3"


# --- figures -----------------------------------------------------------------------------------------

def test_pass_at_k_against_brute_force():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert math.isclose(e.pass_at_k(n, right, k), sum(map(any, draws)) / len(draws))


def test_standard_errors():
    share, error = e.mean_error([True] * 30 + [False] * 70)
    assert share == 0.3 and math.isclose(error, math.sqrt(0.3 * 0.7 / 100))
    mean, error = e.mean_score({"a": (0.2, 0.03, 10), "b": (0.4, 0.04, 10)})
    assert math.isclose(mean, 0.3) and math.isclose(error, 0.025)


def test_scores_count_what_is_missing_as_wrong():
    problems = [e.Problem(str(i), "", None) for i in range(4)]
    rows = [{"id": "0", "response": "ab"}, {"id": "0", "response": "ab"}, {"id": "1", "response": ""},
            {"id": "1", "response": "ab"}]
    verdicts = [{"correct": c, "well_formed": w} for c, w in ((1, 1), (0, 1), (0, 0), (0, 1))]
    score = e.score(problems, rows, verdicts)
    assert score["accuracy"] == 0.5 / 4 and score["pass@k"][2][0] == 0.25 and score["unanswered"] == 2
    assert score["n"] == 4 and score["truncated"] is None
    # of the four problems 1, 1/2, 0 and 0 of the samples are well formed: mean 3/8, variance 11/64
    assert score["well_formed"] == (3 / 8, pytest.approx(math.sqrt(11 / 64 / 4)))
    assert score["response_characters"] == (1.5, pytest.approx(0.5 / math.sqrt(2)))
    assert score["base_tests"] is None


def test_base_and_trained_differ_pairwise():
    before = {"1": [True, False], "2": [False, False], "3": [True, True], "4": [False, False]}
    after = {"1": [True, True], "2": [True, True], "3": [True, True], "4": [False, False]}
    assert e.paired_difference(before, after) == (3 / 8, pytest.approx(math.sqrt(11 / 64 / 4)))
    problems = [e.Problem(id, "", None) for id in before]
    columns = {column: {"AIME24": e.score(problems, [{"id": id, "response": "a"} for id, flags in answers.items() for _ in flags],
                                          [{"correct": flag, "well_formed": True} for flags in answers.values() for flag in flags])}
               for column, answers in (("base", before), ("trained", after))}
    first, second = e.report(columns).splitlines()[:2]
    assert first.split() == ["pass@1,", "%", "base", "trained", "difference"] and second.endswith("+37.5 ± 20.7")
    assert "difference" not in e.report({"base": columns["base"]})


def test_tables():
    columns = {"base": {"a": (0.5, 0.1, 4), "b": (0.25, 0.1, 4)}, "trained": {"a": (1.0, 0.0, 4)}}
    lines = e.table(columns).splitlines()
    assert lines[1].split() == "a 50.0 ± 10.0 100.0 ± 0.0".split() and lines[3].split()[0] == "mean"
    assert lines[2].endswith("–") and lines[3].endswith("–")
    assert e.table(columns, markdown=True).splitlines()[1].startswith("| ----")


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
    assert e.chosen(text) == names


def test_groups():
    assert len(e.chosen("all")) == 12 and len(e.chosen("math")) == 6 and len(e.chosen("heldout")) == 3
    from azr import UsageError
    with pytest.raises(UsageError, match="no benchmark 'gsm8k'"):
        e.chosen("gsm8k")


def test_files_are_found_by_their_names(tmp_path):
    for path in ("livecodebench/execution-v2/test.jsonl", "livecodebench/code_generation_lite/test.jsonl",
                 "livecodebench/code_generation_lite/test2.jsonl", "HumanEval.jsonl",
                 "HumanEvalPlus-v0.1.10.jsonl", "aime25/dataset_infos.json",
                 "MbppPlus.jsonl", "cruxeval_60.jsonl", "aime25.jsonl", "notes.jsonl", "math500_100.jsonl"):
        write(tmp_path / path, [{}])
    files = {name: [path.name for path in paths] for name, paths in e.local_files(tmp_path).items()}
    assert files == {"LCB-Execution": ["test.jsonl"], "LCB-Generation": ["test.jsonl", "test2.jsonl"],
                     "HumanEval+": ["HumanEvalPlus-v0.1.10.jsonl"], "MBPP+": ["MbppPlus.jsonl"],
                     "CRUXEval-I": ["cruxeval_60.jsonl"], "CRUXEval-O": ["cruxeval_60.jsonl"],
                     "AIME25": ["aime25.jsonl"], "MATH500": ["math500_100.jsonl"]}


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path):
    write(tmp_path / "aime24.jsonl", [{"problem": "?", "answer": "1"}])
    write(tmp_path / "amc23.jsonl", [{"task": "?"}])
    (tmp_path / "aime25.jsonl").write_text("{not json\n")
    problems, missing = e.load_benchmarks(e.chosen("math"), tmp_path)
    assert list(problems) == ["AIME24"] and problems["AIME24"][0].id == "0"
    assert "hf download --repo-type dataset HuggingFaceH4/MATH-500" in missing["MATH500"]
    assert "a task lacks 'answer'" in missing["AMC23"] and "AIME25" in missing


def test_revisions_are_pinned():
    for name, benchmark in e.BENCHMARKS.items():
        assert benchmark.group == "heldout" or re.fullmatch("[0-9a-f]{40}", benchmark.revision), name


# --- the command -------------------------------------------------------------------------------------

def run(*arguments, **how):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, arguments)], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **how)


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data" / "aime24.jsonl", [
        {"id": i, "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(300)])
    write(tmp_path / "data" / "HumanEvalPlus.jsonl", RELEASE[:2])
    return tmp_path / "data"


def test_judging_answers_made_elsewhere(data, tmp_path, monkeypatch):
    write(tmp_path / "answers.jsonl", [
        *({"benchmark": "AIME 2024", "id": i, "response": f"\\boxed{{{i + 1}}}"} for i in range(299)),
        {"benchmark": "humaneval+", "id": "HumanEval/900", "response": fence(HALF + "    return x / 2")},
        {"benchmark": "humaneval+", "id": "HumanEval/900", "response": fence(HALF + "    return x")},
        {"benchmark": "humaneval+", "id": "HumanEval/901", "response": "no idea"},
        {"benchmark": "humaneval+", "id": "HumanEval/901", "response": "none"}])
    (tmp_path / "no").mkdir()  # judging must do without what cannot be imported
    for name in ("torch", "transformers", "datasets", "peft"):
        (tmp_path / "no" / f"{name}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "no"))
    done = run("--judge", tmp_path / "answers.jsonl", "--data", data, "--out", tmp_path / "out", "--markdown")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["answers"]
    assert results["AIME24"]["accuracy"] == 299 / 300 and results["AIME24"]["unanswered"] == 1
    assert results["HumanEval+"]["accuracy"] == 0.25 and results["HumanEval+"]["pass@k"]["2"][0] == 0.5
    assert results["HumanEval+"]["well_formed"] == [0.5, pytest.approx(0.5 / math.sqrt(2))] and "| HumanEval+ |" in done.stdout
    assert "| AIME24" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("arguments,message", [
    (["--benchmarks", "gsm8k"], "no benchmark 'gsm8k'"), (["--judge", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--samples", "4", "--temperature", "0"], "all the same"), (["--limit", "0"], "--limit is 0"),
    (["--benchmarks", "math", "--data", "nowhere"], "--data nowhere"),
    (["--run", "nowhere"], "not a run folder")])
def test_usage_errors(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert e.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("eval.py: ") and error.count("\n") == 1


def test_a_killed_evaluation_goes_on(random_model, data, tmp_path, capsys):
    arguments = ["--model", random_model, "--benchmarks", "aime24", "--data", data, "--out", tmp_path / "out",
                 "--max-response", "40", "--samples", "2", "--temperature", "0.9", "--device", "cpu"]
    killed = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *map(str, arguments)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = tmp_path / "out" / "answers.jsonl"
    for _ in range(600):
        if answers.exists() and answers.stat().st_size:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = answers.read_text().splitlines()
    assert 0 < len(before) < 600
    answers.write_text("\n".join(before[:20]) + "\n" + before[20][:30])  # a line cut in the middle
    assert e.main(list(map(str, arguments))) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [json.loads(line) for line in before[:20]] == rows[:20]
    assert sorted(row["id"] for row in rows) == sorted(str(i) for i in range(300) for _ in range(2))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["model"]["AIME24"]
    assert results["n"] == 300 and results["samples"] == 2
    assert results["tokens"] == sum(row["tokens"] for row in rows)
    assert e.main([*map(str, arguments), "--seed", "5"]) == 2 and "other settings" in capsys.readouterr().err


@pytest.fixture
def heldout(tmp_path):
    task = {"split": "easy", "program": "def f(x):\n    return x + 1", "input": "1", "output": "2",
            "inputs": ["1", "2", "3"], "outputs": ["2", "3", "4"], "message": "adds"}
    write(tmp_path / "heldout.jsonl", [task | {"type": type} for type in e.TASK_TYPES for _ in range(3)])
    return tmp_path / "heldout.jsonl"


def test_base_and_adapter_side_by_side(policy, random_model, heldout, tmp_path, capsys):
    run_folder = tmp_path / "run"
    policy.model.save_pretrained(run_folder / "adapter")
    config = {"model": random_model, "max_response": 12, "lora_rank": 4, "quantize": "none"}
    (run_folder / "config.json").write_text(json.dumps(config))
    arguments = ["--run", str(run_folder), "--heldout", str(heldout), "--limit", "2", "--device", "cpu",
                 "--temperature", "1"]
    assert e.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())["results"]
    assert list(results) == ["base", "trained"] and results["base"]["heldout-deduction"]["n"] == 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["response"] for row in rows[:6]} != {row["response"] for row in rows[6:]}


def test_a_run_that_trained_all_weights(random_model, heldout, tmp_path):
    run_folder = tmp_path / "run"
    make_random_model(run_folder / "model", seed=5)
    (run_folder / "config.json").write_text(json.dumps(
        {"model": random_model, "max_response": 12, "lora_rank": 0, "quantize": "auto"}))
    assert e.main(["--run", str(run_folder), "--heldout", str(heldout), "--device", "cpu",
                   "--out", str(tmp_path / "a")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert {row["column"] for row in rows} == {"base", "trained"}
    assert rows[0]["response"] != rows[-1]["response"]


def test_templates(policy):
    assert policy.decode(e.encode(policy, "What?", "azr")).endswith("<think>")
    assert policy.decode(e.encode(policy, "What?", "plain")) == "What?\n\n"
    from azr import UsageError
    with pytest.raises(UsageError, match="no chat template"):
        e.encode(policy, "What?", "chat")
    policy.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    policy.chat = True
    assert policy.decode(e.encode(policy, "What?", "chat")) == "[What?]>"


def test_benchmarks_during_training(policy, data):
    problems, _ = e.load_benchmarks(e.chosen("aime24,humaneval"), data, limit=3)
    scores = e.evaluate_benchmarks(policy, problems, max_response=8, workers=1)
    assert {name: score[2] for name, score in scores.items()} == {"HumanEval+": 2, "AIME24": 3}


def test_heldout_accuracy_is_the_same_either_way(policy, heldout, executor):
    from types import SimpleNamespace
    cfg = SimpleNamespace(max_response=12)
    scores = e.heldout_accuracy(policy, executor, e.load_heldout(heldout)["easy"], cfg)
    assert {type: score[2] for type, score in scores.items()} == {type: 3 for type in e.TASK_TYPES}


def test_the_shipped_model(tmp_path):
    done = run("--limit", "2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "heldout-induction" in done.stdout and (tmp_path / "out" / "results.json").exists()
