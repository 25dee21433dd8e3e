"""Measure a model: python eval.py

Alone it measures the shipped model on the shipped held-out tasks; `--run RUN` puts a trained model
beside its base, and `--benchmarks code,math` takes the paper's benchmarks (the table BENCHMARKS).
`--judge FILE --data DIR` judges answers that were made elsewhere and loads no model.

The way of an answer: load_benchmarks → Problem → question → answers.jsonl → judge → results.json and
tables. Model text runs in the sandbox and nowhere else; mathematics is parsed, in a process of its own.
"""

import argparse
import base64
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import pickle
import re
import select
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from executor import Executor, literal, parse_literal
from rewards import is_correct
from tasks import ANSWER_TAG, TASK_TYPES, Task, fenced_blocks, parse_answer, solve_prompt

HELDOUT = Path(__file__).resolve().parent / "tiny" / "heldout.jsonl"
TIMEOUT, MEMORY_MB = 10.0, 4096  # of one sandboxed run of a benchmark's tests
MODULES = "sys io os random time datetime hashlib threading secrets calendar queue".split()
EVERYTHING = 1 << 30             # characters: no limit but memory


def usage_error(message):
    from azr import UsageError  # azr imports torch, which judging does without
    return UsageError(message)


# --- held-out tasks ---------------------------------------------------------------------------------

def load_heldout(path=HELDOUT, limit=None):
    """{split: [Task]} from a file of JSON lines with `split` and the fields of a Task.

    limit: at most so many tasks of each type and split, the first ones.
    """
    splits, count = defaultdict(list), defaultdict(int)
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                key = row["split"], row["type"]
                count[key] += 1
                if limit is None or count[key] <= limit:
                    fields = {name: row[name] for name in Task.__dataclass_fields__ if name in row}
                    splits[row["split"]].append(Task.from_dict(fields))
    except OSError as error:
        raise usage_error(f"cannot read the held-out tasks {path}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise usage_error(f"{path} is not a file of held-out tasks (JSON lines with split, type and "
                          f"the fields of a task): {error}") from error
    return dict(splits)


def heldout_accuracy(policy, executor, tasks, cfg, greedy=True):
    """Accuracy on held-out tasks. → {type: (accuracy, standard error, tasks)}

    greedy: one greedy answer a task. Otherwise one at temperature 1, from a random stream of its
    own, so that measuring more often does not change a run.
    """
    import torch
    from azr import solve
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        rollouts = solve(policy, executor, tasks, cfg, greedy=greedy)
    scores = {}
    for type in TASK_TYPES:
        correct = [rollout.verdict == "correct" for rollout in rollouts if rollout.type == type]
        if correct:
            scores[type] = *mean_error(correct), len(correct)
    return scores


# --- figures ----------------------------------------------------------------------------------------

def mean_error(values):
    """(mean, its standard error) of independent values: of hits and misses, the binomial one."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def mean_score(scores):
    """The unweighted mean over the types, and its standard error."""
    values = list(scores.values())
    return (sum(score for score, *_ in values) / len(values),
            math.sqrt(sum(error ** 2 for _, error, *_ in values)) / len(values))


def pass_at_k(n, correct, k):
    """The chance that k of n samples, drawn without replacement, hold a correct one: unbiased.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def table(columns, title="held-out accuracy", markdown=False, means=None):
    """{column: {row: (accuracy, error, …)}} as text, with a row for each mean in {name: rows}."""
    rows = list(dict.fromkeys(row for scores in columns.values() for row in scores))
    means = {"mean": rows} if means is None else means
    lines = [[title, *columns]]
    for row in [*rows, *means]:
        cells = [row]
        for scores in columns.values():
            members = {name: scores[name] for name in means.get(row, [row]) if name in scores}
            score, error = mean_score(members) if len(members) == len(means.get(row, [row])) else (None, 0)
            cells.append("–" if score is None else f"{100 * score:.1f} ± {100 * error:.1f}")
        lines.append(cells)
    return layout(lines, markdown)


def layout(rows, markdown):
    """Rows of cells as a Markdown table, or with padded columns for a terminal."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [[str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
              for i, (cell, width) in enumerate(zip(row, widths))] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


# --- published formats ------------------------------------------------------------------------------

@dataclass
class Problem:
    id: str
    question: str
    gold: object      # a Task; a Program; or the gold answer of a mathematical problem
    strict: bool = False


@dataclass
class Program:
    """What a program has to do. cases() → {"base" and "plus": [(suffix, entry, [(arguments, expected)])]}

    suffix: code that goes behind the answer; entry: an expression that is called with the arguments
    (a literal list); None: the arguments are the text on standard input. Expected is a value, or UNKNOWN:
    what the benchmark's own solution returns.
    """
    name: str          # that the program must define; "" if it reads standard input
    prelude: str       # code that goes before an answer
    solution: str      # the benchmark's own, "" if it has none
    cases: object
    agree: object      # (output, expected, arguments) → bool


UNKNOWN = object()
BLOCK = "Give the whole program in one fenced block that starts with ```python."


def read_heldout(type, row):
    task = Task.from_dict({name: row[name] for name in Task.__dataclass_fields__ if name in row})
    return Problem("", solve_prompt(task), task, strict=True)


def read_io(type, row):
    """CRUXEval: code, input, output. LiveCodeBench's execution set calls its function by name."""
    code, input = row["code"], row["input"]
    if row.get("function_name", "f") != "f":
        code += f"\n\n\nf = {row['function_name']}"
        input = input.strip().removeprefix(row["function_name"]).strip()[1:-1]
    hidden = {"input": ""} if type == "abduction" else {"output": row["output"]}
    task = Task(type, code, **({"input": input, "output": row["output"]} | hidden))
    return Problem("", solve_prompt(task), task)


def read_function(_, row):
    """HumanEval+ and MBPP+: EvalPlus' release, its hub datasets, and the original HumanEval."""
    prompt, test = row["prompt"], row.get("test") or ""
    name = row.get("entry_point") or re.search(r"^\s*assertion\((\w+)\(\*inp\)", test, re.M)[1]
    own = prompt + row["canonical_solution"] if "canonical_solution" in row else row["code"]
    opening = f"def {name}(" in prompt
    question = (f"Complete the Python function below. {BLOCK}\n\n```python\n{prompt.strip()}\n```" if opening
                else f"Write a Python function `{name}`. {BLOCK}\n\n"
                + "\n".join([prompt.strip().strip('"').strip(), *(row.get("test_list") or [])[:1]]))
    atol = row.get("atol")
    if atol is None:
        found = re.findall(r"^ *(?:assertion\(.*, |assert _poly\(.*<= )([\d.e-]+)\)?$", test, re.M)
        atol = float(found[-1]) if found else 0
    agree = partial(ORACLES.get(name, close), atol=atol)
    return Problem(f"Mbpp/{row['task_id']}" if str(row["task_id"]).isdigit() else str(row["task_id"]), question,
                   Program(name, prompt if opening else "", own, partial(function_cases, row, name, test), agree))


def function_cases(row, name, test):
    if "base_input" in row:
        shape = next((shape for ids, shape in MBPP_SHAPES if str(row["task_id"])[5:] in ids.split()
                      and str(row["task_id"]).startswith("Mbpp/")), list)
        return {part: [("", name, [(literal(shape(arguments), EVERYTHING), UNKNOWN)
                                   for arguments in row[f"{part}_input"] or ()])] for part in ("base", "plus")}
    inputs = re.search(r"^ *inputs = (.*)$", test, re.M)
    if not inputs:  # the original HumanEval: one call of check
        return {"base": [("\n" + test, f"lambda: check({name})", [("[]", None)])], "plus": []}
    inputs, results = read_values(inputs[1]), re.search(r"^ *results = (.*)$", test, re.M)
    expected = read_values(results[1]) if results else [UNKNOWN] * len(inputs)
    asserts = "\n".join(["", *(row.get("test_imports") or []), *(row.get("test_list") or [])])
    return {"base": [(asserts, "lambda: None", [("[]", None)])] if asserts.strip() else [],
            "plus": [("", name, [(literal(list(x), EVERYTHING), y) for x, y in zip(inputs, expected)])]}


def read_values(text):
    return parse_literal(re.sub(r"(?<![\w'\"])inf(?![\w'\"])", "1e309", text), EVERYTHING)


def read_contest(_, row):
    """LiveCodeBench, code generation: functions of a class Solution, or programs that read and print."""
    name = json.loads(row["metadata"] or "{}").get("func_name", "")
    question = f"{row['question_content'].strip()}\n\n"
    if name:
        question += f"Complete this program. {BLOCK}\n\n```python\n{row['starter_code'].rstrip()}\n```"
    else:
        question += f"Write a Python program that reads from standard input and prints the answer. {BLOCK}"
    cases = partial(contest_cases, name, row["public_test_cases"], row["private_test_cases"])
    return Problem(row["question_id"], question,
                   Program(name, PRELUDE, "", cases, same_value if name else same_print))


def contest_cases(name, public, private):
    def group(tests):
        pairs = [(test["input"], test["output"]) for test in tests]
        if name:
            pairs = [(literal([json.loads(line) for line in i.split("\n")], EVERYTHING), json.loads(o))
                     for i, o in pairs]
        return [("", name or None, pairs)]
    return {"base": group(json.loads(public)), "plus": group(json.loads(unpack(private)))}


class TextUnpickler(pickle.Unpickler):
    """Of a pickle, only what needs no class: find_class is how a pickle runs code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"a test file asks for {module}.{name}")


def unpack(text):
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickle of one str of JSON."""
    if text.lstrip().startswith("["):
        return text
    tests = TextUnpickler(io.BytesIO(zlib.decompressobj().decompress(base64.b64decode(text), EVERYTHING))).load()
    if not isinstance(tests, str):
        raise ValueError("the private tests are no text")
    return tests


def read_math(rough, row):
    answer = row.get("final_answer", row.get("answer"))
    if answer is None:  # Minerva's original file
        answer = boxed(row["solution"])
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, float) and answer == int(answer):
        answer = int(answer)
    question = "\n".join(filter(None, [row.get("context"), row.get("problem") or row["question"]]))
    return Problem("", f"{question.strip()}\n\nPut the final answer in \\boxed{{}}.", [str(answer), bool(rough)])


@dataclass(frozen=True)
class Benchmark:
    group: str
    read: object       # row → Problem
    variant: object    # first argument of read
    repo: str
    revision: str
    aliases: str       # other names, also of local files; without capitals and punctuation
    id: str = "id"     # the column of a problem's own name; if there is none, its place counts
    split: str = "test"
    config: str | None = None
    files: tuple = ()  # where the repository's files must be named


BENCHMARKS = {
    **{f"heldout-{type}": Benchmark("heldout", read_heldout, type, "", "", "") for type in TASK_TYPES},
    "CRUXEval-I": Benchmark("io", read_io, "abduction", "cruxeval-org/cruxeval",
                            "e536997e8381421cb107d285b4ae542aa12c6c31", "cruxeval"),
    "CRUXEval-O": Benchmark("io", read_io, "deduction", "cruxeval-org/cruxeval",
                            "e536997e8381421cb107d285b4ae542aa12c6c31", "cruxeval"),
    "LCB-Execution": Benchmark("io", read_io, "deduction", "livecodebench/execution-v2",
                               "e3bbac6d5da0043c4a0b4e4f4b678f1f6497cc86",
                               "executionv2 livecodebenchexecution lcbexec execution"),
    "HumanEval+": Benchmark("code", read_function, None, "evalplus/humanevalplus",
                            "d32357cf319e50e9c8d8dab5ea876c72b0fd321b", "humaneval", id="task_id",
                            files=("data/test-00000-of-00001-5973903632b82d40.parquet",)),
    "MBPP+": Benchmark("code", read_function, None, "evalplus/mbppplus",
                       "b2d74c91837c3f2a20c1299ae98133cbe7cfa077", "mbpp", id="task_id"),
    "LCB-Generation": Benchmark("code", read_contest, None, "livecodebench/code_generation_lite",
                                "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
                                "codegenerationlite livecodebenchgeneration codegeneration livecodebench lcb lcbgen",
                                id="question_id", files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 6)))),
    "AIME24": Benchmark("math", read_math, False, "HuggingFaceH4/aime_2024",
                        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "aime2024", split="train"),
    "AIME25": Benchmark("math", read_math, False, "math-ai/aime25",
                        "563bb8404243c5f09de6ec262f2db674fe5bce9b", "aime2025"),
    "AMC23": Benchmark("math", read_math, False, "math-ai/amc23",
                       "80815d37005feb82cd7f8fbc6901d5d3eff43057", "amc2023 amc"),
    "MATH500": Benchmark("math", read_math, False, "HuggingFaceH4/MATH-500",
                         "ff5b20257d8185524591543f8ff5993951537bb8", "math500", id="unique_id"),
    "Minerva": Benchmark("math", read_math, True, "math-ai/minervamath",
                         "ee46ddc498933b1977577953250ca5c66be64f96", "minervamath minerva", id="idx"),
    "OlympiadBench": Benchmark("math", read_math, False, "Hothan/OlympiadBench",
                               "3b426ee1d587c71b495146dde9f3e995ee7ac59f", "olympiadbench olympiad",
                               split="train", config="OE_TO_maths_en_COMP"),
}
GROUPS = ("io", "code", "math")  # the paper's; heldout is ours


def squash(text):
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus"))


def names_of(name):
    """What a benchmark and its files may be called, best first."""
    own = squash(name)
    return [own, own.removesuffix("plus"), *BENCHMARKS[name].aliases.split()]


def chosen(text):
    """'code,AIME 2024' → the names of benchmarks, in the order of the table."""
    names = set()
    for part in text.split(","):
        wanted = squash(part)
        found = [name for name, benchmark in BENCHMARKS.items() if benchmark.group in
                 (GROUPS if wanted == "all" else ("io",) if wanted == "indistribution" else (wanted,))]
        found = found or [name for name in BENCHMARKS if wanted in names_of(name)]
        if not found:
            raise usage_error(f"no benchmark {part.strip()!r}; there are {', '.join(BENCHMARKS)}, and the groups "
                              "heldout, io, code, math and all")
        names.update(found)
    return [name for name in BENCHMARKS if name in names]


def load_benchmarks(names, data=None, limit=None, heldout=HELDOUT, split="easy"):
    """→ ({name: [Problem]}, {name: why it could not be had}); data: a folder instead of the hub."""
    files, problems, missing = local_files(data) if data else {}, {}, {}
    for name in names:
        benchmark = BENCHMARKS[name]
        try:
            if benchmark.group == "heldout":
                rows = (row for row in read_rows(Path(heldout))
                        if row["split"] == split and row["type"] == benchmark.variant)
            elif data:
                rows = itertools.chain.from_iterable(map(read_rows, files[name]))
            else:
                rows = hub_rows(benchmark)
            problems[name] = found = []
            for place, row in enumerate(itertools.islice(rows, limit)):
                found.append(benchmark.read(benchmark.variant, row))
                found[-1].id = found[-1].id or str(row.get(benchmark.id, row.get("id", place)))
            if not found:
                raise ValueError("there are no tasks in it")
        except Exception as error:  # the hub's client, parquet and the formats have hundreds of ways to fail
            problems.pop(name, None)
            reason = "no file there has its name" if data and name not in files else \
                f"a task lacks {error}" if isinstance(error, KeyError) else str(error).strip().split("\n")[0]
            missing[name] = reason + ("" if benchmark.group == "heldout" else (
                f"\n  Get it with: hf download --repo-type dataset {benchmark.repo} --revision "
                f"{benchmark.revision} --local-dir DIR/{names_of(name)[-1]}\n  and give --data DIR (JSON lines or "
                "parquet; the name of a file or of its folder says whose it is)"))
    return problems, missing


def local_files(data):
    """{benchmark: its files in a folder}, by the benchmark's name in the path: the last one in it counts."""
    if not Path(data).is_dir():
        raise usage_error(f"--data {data}: no such folder")
    aliases, files = {alias for name in BENCHMARKS for alias in names_of(name)}, defaultdict(list)
    for path in sorted(Path(data).rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet")):
            key = squash(str(Path(data).resolve().name / path.relative_to(data)).split(".json")[0])
            found = max((key.rfind(a) + len(a), len(a), a) for a in aliases if a in key or a == "lcb")
            if found[2] in key:
                files[found[2]].append(path)
    best = {name: next((alias for alias in names_of(name) if files.get(alias)), None) for name in BENCHMARKS}
    return {name: files[alias] for name, alias in best.items() if alias}


def read_rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    elif path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def hub_rows(benchmark):
    from datasets import load_dataset
    if not benchmark.files:
        return load_dataset(benchmark.repo, benchmark.config, split=benchmark.split, revision=benchmark.revision)
    kind = "parquet" if benchmark.files[0].endswith("parquet") else "json"
    return load_dataset(kind, split="train", data_files=[
        f"hf://datasets/{benchmark.repo}@{benchmark.revision}/{file}" for file in benchmark.files])


# --- what an answer says ----------------------------------------------------------------------------

def answer_text(response):
    """What stands behind the thought, and in <answer> tags if there are any."""
    text = response.rpartition("</think>")[2]
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip() if "<answer>" in text else text.strip()


def value_answer(problem, response):
    """The literal or the input that a response gives, or None."""
    type = problem.gold.type
    answer = parse_answer(type, response)
    if answer is None and not problem.strict:  # made elsewhere, in another form
        text = answer_text(response)
        blocks = (fenced_blocks(text, ANSWER_TAG[type]) or fenced_blocks(text, r"\w*")
                  or re.findall(r"\[ANSWER\](.*?)\[/ANSWER\]", text, re.S))
        answer = blocks[-1].strip() if blocks else text.strip("` ") if text and "\n" not in text else None
        called = answer and re.fullmatch(r"(?:assert\s+)?f\((.*?)\)\s*(?:==\s*(.*))?", answer, re.S)
        if called and (type == "abduction" or called[2]):  # f(input) == output
            answer = called[1 if type == "abduction" else 2]
    return answer


def program_answer(problem, response):
    """The program that a response gives, ready to run, or None."""
    text, goal = answer_text(response), problem.gold
    blocks = [block for block in fenced_blocks(text, r"[\w+-]*") if block.strip()]
    if not blocks and "```" not in text and re.search(r"^ *(def|import|from|class|return|print)\b", text, re.M):
        blocks = [text]
    defines = rf"^(?:async +)?(?:def|class) +{goal.name}\b|^{goal.name} *=|^ +def +{goal.name}\b" if goal.name else ""
    named = [block for block in blocks if re.search(defines, block, re.M)]
    if not blocks:
        return None
    code = (named or blocks)[-1]
    future = "".join(re.findall(r"^from __future__ import .*\n?", code, re.M))  # must come first
    return f"{future}\n{goal.prelude}\n{code.replace(future, '') if future else code}"


def math_answer(_, response):
    """The last box; without one, what is tagged as the answer or called so, or a response of one line."""
    text = answer_text(response)
    answer = boxed(text)
    if answer is None:
        said = re.findall(r"(?i:answer(?: is|:))[ *]*(.+)", text)
        answer = text if "<answer>" in response or "\n" not in text else said[-1] if said else ""
        answer = said[-1] if said and answer is text else answer
    return answer.strip() if 0 < len(answer.strip()) <= 1000 else None


def boxed(text):
    """The content of the last \\boxed{…}, braces balanced, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opening = text.find("{", start) if start >= 0 else -1
    depth = 0
    for place in range(opening, len(text)) if opening >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
        if depth == 0:
            return text[opening + 1:place]
    return None


# --- judges: [Problem], [answer or None], executor → yields one {"correct": …, "base": …} a problem -----

def judge_values(problems, answers, executor):
    for correct in is_correct([problem.gold for problem in problems], answers, executor):
        yield {"correct": correct}


CALL = '''
import zlib

def plain(value):
    """A value as literals; what has none becomes a mark that equals only its like."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int) and value.bit_length() > 14000:
        return ("\\0int", value.bit_length(), value % (2 ** 61 - 1), value % 10 ** 9)
    for kind in (int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value) if value == value else ("\\0nan",)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return (set if kind is frozenset else kind)([plain(item) for item in value])
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return ("\\0" + type(value).__name__, str(value)[:1000])

def short(value):
    text = repr(value)
    code = text.encode("utf-8", "backslashreplace")
    return value if len(text) < 90000 else ("\\0long", len(text), zlib.crc32(code), zlib.adler32(code))

def f(source, entry, cases):
    scope = {"__name__": "program"}
    exec(source, scope)
    return [short(plain(eval(entry, scope)(*case))) for case in cases]
'''
READ = '''
import io, sys, threading

def f(source, text):
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    sys.setrecursionlimit(50000)
    threading.Thread.start, threading.Thread.join = threading.Thread.run, lambda thread, timeout=None: None

    def ask(prompt=""):
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\\n")

    try:
        exec(source, {"__name__": "__main__", "input": ask, "open": lambda file, *how: sys.stdin})
    except SystemExit:
        pass
    sys.stdout.flush()
    return sys.stdout.buffer.getvalue().decode("utf-8", "backslashreplace")
'''
# What contest programs are written against: the site has these names in scope.
PRELUDE = """\
import bisect, collections, copy, functools, heapq, itertools, json, math, operator, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, dist, factorial, floor, gcd, hypot, inf, isqrt, lcm, log, log2, log10, perm, pi, sqrt
from typing import *
"""


def run_programs(executor, jobs):
    """[(source, entry, [arguments])] → [[value] or None]: None if a call of them gives no value.

    All calls of a job share a process, up to 100 of them; when one of many takes too much time or
    room, the halves get a process each. A job that has failed once is not run further.
    """
    results, failed = [[None] * len(cases) for *_, cases in jobs], set()
    waiting = [[] for _ in jobs]
    for pieces, (_, entry, cases) in zip(waiting, jobs):
        start = size = 0
        for stop, case in enumerate(cases, 1):
            size += len(case)
            if entry is None or size > 50_000 or stop - start == 100 or stop == len(cases):
                pieces.append((start, stop))
                start, size = stop, 0
    while any(waiting):
        now = [(i, *pieces.pop(0)) for i, pieces in enumerate(waiting) for _ in range(min(8, len(pieces)))]
        runs = executor.run([job_text(*jobs[i][:2], jobs[i][2][start:stop]) for i, start, stop in now])
        for (i, start, stop), run in zip(now, runs):
            value = parse_literal(run.output, EVERYTHING) if run.ok else None
            value = [value] if run.ok and jobs[i][1] is None else value
            if run.ok and isinstance(value, list) and len(value) == stop - start:
                results[i][start:stop] = value
            elif run.status in ("timeout", "unrepresentable") and stop - start > 1:
                middle = (start + stop) // 2
                waiting[i][:0] = [(start, middle), (middle, stop)]
            else:
                failed.add(i)
        for i in failed:
            waiting[i] = []
    return [None if i in failed else result for i, result in enumerate(results)]


def job_text(source, entry, cases):
    source = literal(source, EVERYTHING)
    return (READ, f"{source}, {literal(cases[0], EVERYTHING)}") if entry is None else \
        (CALL, f"{source}, {literal(entry)}, [{', '.join(cases)}]")


def judge_programs(problems, answers, executor):
    """By the benchmark's base tests; then, for those that pass, by the others."""
    cases = {id(problem): problem.gold.cases() for problem in problems}
    passed = [answer is not None for answer in answers]
    verdicts = [{"base": None} for _ in problems]
    for part in ("base", "plus"):
        expected = {}
        for problem in {id(problem): problem for problem in problems}.values():
            for number, (suffix, entry, pairs) in enumerate(cases[id(problem)][part]):
                expected[id(problem), number] = [value for _, value in pairs]
                if any(value is UNKNOWN for _, value in pairs):
                    own, = run_programs(executor, [(problem.gold.solution + suffix, entry, [x for x, _ in pairs])])
                    if own is None:
                        tqdm.write(f"{problem.id}: the benchmark's own solution fails in the sandbox; so does "
                                   "every answer", file=sys.stderr)
                    expected[id(problem), number] = own
        jobs = [(i, number, (answers[i] + suffix, entry, [x for x, _ in pairs]))
                for i, problem in enumerate(problems) if passed[i]
                for number, (suffix, entry, pairs) in enumerate(cases[id(problem)][part])]
        for (i, number, (_, _, arguments)), outputs in zip(jobs, run_programs(executor, [job for *_, job in jobs])):
            values = expected[id(problems[i]), number]
            passed[i] &= outputs is not None and values is not None and all(
                map(partial(agrees, problems[i].gold.agree), outputs, values, arguments))
        if part == "base":
            for verdict, problem, good in zip(verdicts, problems, passed):
                verdict["base"] = good if cases[id(problem)]["base"] else None
    for verdict, good in zip(verdicts, passed):
        yield verdict | {"correct": good}


def agrees(agree, output, expected, arguments):
    try:
        return bool(agree(output, expected, arguments))
    except (TypeError, ValueError, ArithmeticError, AttributeError):  # a value of another kind than was asked for
        return False


def close(output, expected, arguments, atol=0):
    """EvalPlus' rule: equal; or floats, or what a task has a tolerance for, that are close."""
    flat = expected if isinstance(expected, (list, tuple)) else [expected]
    atol = atol or (1e-6 if flat and all(type(value) is float for value in flat) else 0)
    return output == expected or atol and type(output) is type(expected) and near(output, expected, atol)


def near(a, b, atol):
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(near(x, y, atol) for x, y in zip(a, b))
    return a == b or not isinstance(b, str) and abs(a - b) <= atol + 1e-7 * abs(b)


def same_value(output, expected, arguments):
    return lists(output) == expected


def lists(value):
    return [lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def same_print(output, expected, arguments):
    """Line by line, without spaces around; or the same numbers in a line."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(ours) == len(theirs) and all(
        a == b or len(a) < EVERYTHING and list(map(Decimal, a.split())) == list(map(Decimal, b.split()))
        for a, b in zip(ours, theirs))


def as_set(output, expected, arguments, atol):
    return set(output) == set(expected)


def is_some(output, expected, arguments, atol):  # their outputs are match objects, or True
    output, expected = (x if isinstance(x, bool) else x is not None for x in (output, expected))
    return output == expected


def or_else(other):
    """Also right by another reading of the task: other(arguments) is the value by that reading."""
    return lambda output, expected, arguments, atol: (
        close(output, expected, arguments, atol) or close(output, other(*parse_literal(arguments)), "", atol))


def root(output, expected, arguments, atol):
    (coefficients,), x = parse_literal(arguments), float(output)
    return abs(sum(c * x ** power for power, c in enumerate(coefficients))) <= (atol or 1e-4)


def divisor_sums(a, b, own=0):
    return [sum(d + (n // d if d * d != n else 0) for d in range(1, math.isqrt(n) + 1) if n % d == 0) - own * n
            for n in (a, b)]


# The tasks that EvalPlus does not compare by value, by the name of their function.
ORACLES = dict(
    find_zero=root,
    **dict.fromkeys("similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum "
                    "intersection_array find_dissimilar Diff".split(), as_set),
    **dict.fromkeys("check_str text_match_three text_starta_endb".split(), is_some),
    are_equivalent=or_else(lambda a, b: len(set(divisor_sums(a, b))) == 1),
    sum_div=or_else(lambda n: 0),
    surface_Area=or_else(lambda base, height: round(
        base ** 2 + 2 * base * math.sqrt((base / 2) ** 2 + height ** 2))),
    digit_distance_nums=or_else(lambda a, b: sum(abs(int(x) - int(y)) for x, y in zip(
        *(str(n).zfill(max(len(str(a)), len(str(b)))) for n in (a, b))))))

# EvalPlus' release holds tuples and sets as lists, and complex numbers as text: how to restore them.
MBPP_SHAPES = [
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     lambda a: [tuple(x) for x in a]),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", lambda a: [[tuple(y) for y in x] for x in a]),
    ("75 413 444 753", lambda a: [[tuple(y) for y in a[0]], a[1]]),
    ("106 750", lambda a: [a[0], tuple(a[1])]),
    ("115", lambda a: [[set(x) if x and type(x) is list else {} for x in a[0]]]),
    ("124", lambda a: [float(a[0]), complex(a[1])]),
    ("250 405 446 617 720 763 808 307", lambda a: [tuple(a[0]), *a[1:]]),
    ("259 401 445", lambda a: [tuple(tuple(y) for y in x) for x in a]),
    ("278", lambda a: [tuple(tuple(y) if type(y) is list else y for y in a[0])]),
    ("722", lambda a: [{key: tuple(x) for key, x in a[0].items()}, *a[1:]]),
    ("252", lambda a: [complex(a[0])]),
    ("580 615 791", lambda a: [tuples(x) for x in a]),
]


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


# --- mathematics ------------------------------------------------------------------------------------

class MathJudge:
    """same_math in a process of its own: what hangs in there, or eats memory, is killed."""

    def __init__(self):
        self.process = None

    def __call__(self, gold, answer, rough):
        if not self.process:
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import eval; eval.serve_math()"
            self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, bufsize=0)
            self.process.stdout.readline()  # it is ready
        try:
            self.process.stdin.write(json.dumps([gold, answer, rough]).encode() + b"\n")
            if select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                line = self.process.stdout.readline()
                if line:
                    return json.loads(line)
        except BrokenPipeError:
            pass
        self.close()  # too long, or dead of its memory limit: not the gold answer
        return False

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve_math():
    """The life of that process: a line [gold, answer, rough] in, a line true or false out."""
    import logging
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    logging.disable(logging.CRITICAL)
    results, sys.stdout = sys.stdout, sys.stderr
    same_math("1", "1.0")  # imports
    print(flush=True, file=results)
    for line in sys.stdin:
        try:
            verdict = same_math(*json.loads(line))
        except (Exception, RecursionError, MemoryError):  # math-verify and sympy raise whatever there is
            verdict = False
        print(json.dumps(verdict), flush=True, file=results)


UNITS = {alias: names.split()[0] for names in (  # other units must agree by the letter
    "degree degrees", "percent %", "dollar dollars", "cm centimeter centimeters", "m meter meters",
    "km kilometer kilometers", "mm millimeter millimeters", "inch inches in", "foot feet ft", "mile miles",
    "min minute minutes", "h hour hours hr", "s second seconds sec", "day days", "year years", "unit units",
    "km/h kmh kph", "kg kilogram kilograms", "g gram grams") for alias in names.split()}
WORDS = r"\\(?:text|mbox|mathrm|textbf|textit|textrm|operatorname)\s*"


def same_math(gold, answer, rough=False):
    """Whether two answers in LaTeX are the same. rough: decimals may differ by rounding (Minerva)."""
    gold, answer = tidy(gold), tidy(answer)
    if re.sub(r"[\s{}]", "", gold) == re.sub(r"[\s{}]", "", answer):
        return True
    if not gold or not answer:
        return False
    said, meant = words(answer), words(gold)
    if re.fullmatch(WORDS + r"\{[^{}]*\}\.?|[A-Za-z][a-z]{3,}[a-z ,'-]*", gold):
        return said == meant
    (gold, unit), (answer, other) = split_unit(gold), split_unit(answer)
    if unit and other and unit != other:
        return False
    ours, theirs = parts(gold), parts(answer)
    if bool(ours) != bool(theirs):  # 13,535 is one number if the other side has no comma
        gold, answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (gold, answer))
        ours, theirs = parts(gold), parts(answer)
    if ours and theirs:
        return same_parts(*ours, *theirs, rough)
    if (ours or theirs) and not re.search(r"[<>]|\\(le|ge|lt|gt|in)", gold + answer):
        return False
    if re.search(r"\d_\{?\d", gold + answer):  # digits in another base: the texts differ
        return False
    numbers = [re.fullmatch(r"([-+]?\d*\.?\d+)(?:\\times10\^\{?([-+]?\d+)\}?)?", re.sub(r"\s", "", text))
               for text in (gold, answer)]
    if all(numbers) and rough:
        values = [float(number[1]) * 10 ** int(number[2] or 0) for number in numbers]
        digits = len(numbers[0][1].partition(".")[2])
        last = 0.5 * 10 ** (int(numbers[0][2] or 0) - digits)
        return abs(values[0] - values[1]) <= min(1e-4 * abs(values[0]), last) or values[0] == values[1]
    if all(numbers) and not (numbers[0][2] or numbers[1][2]):
        return Decimal(numbers[0][1]) == Decimal(numbers[1][1])
    from math_verify import LatexExtractionConfig, parse, verify
    gold, answer = (parse(f"$\\boxed{{{text}}}$", [LatexExtractionConfig()], parsing_timeout=None)
                    for text in (gold, answer))
    return bool(verify(gold, answer, timeout_seconds=None))


def same_parts(kind, gold, other, answer, rough):
    if {kind, other} - {"", "{}"} and kind != other or len(gold) != len(answer):
        return False
    if kind[:1] in ("(", "["):
        return all(same_math(a, b, rough) for a, b in zip(gold, answer))
    left = list(answer)
    for item in gold:  # in any order, each once
        match = next((i for i, other in enumerate(left) if same_math(item, other, rough)), None)
        if match is None:
            return False
        del left[match]
    return True


def tidy(text):
    text = text.replace("\\$", "").replace("$", "").replace("\u2212", "-").replace("\\,", " ").replace("\\!", "")
    text = re.sub(r"\\(left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])", "", text).replace("{,}", "")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\\;", " ").replace("\\ ", " ").replace("~", " ")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", r"\\text{degree}", text)
    text = re.sub(WORDS + r"\{\s*(?:and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)", ",", text)
    text = re.sub(r"(?<=\d)[eE](?=[-+]?\d+$)(\+?)([-\d]+)", r"\\times 10^{\2}", text.strip())
    text = re.sub(r"^[a-zA-Z](?:_\w)?\s*(?:\\in(?![a-z])|=(?!.*=))\s*(?=[(\[])", "", text)  # x ∈ (0, 1)
    return text.strip().rstrip(".").strip()


def words(text):
    return re.sub(r"[^a-z0-9]", "", re.sub(WORDS, "", text).lower())


def split_unit(text):
    """'10 \\text{ cm}' → ('10', 'cm')"""
    found = re.search(r"(?<=[\d})])\s*(?:" + WORDS + r"\{([^{}]*)\}|\s([a-zA-Z/]+)|\\?(%))((?:\^\{?\d\}?)?)$", text)
    unit = re.sub(r"[\s.$]", "", (found[1] or found[2] or found[3]).lower()) if found else ""
    if not unit or found[2] and unit not in UNITS:
        return text, ""
    return text[:found.start()], UNITS.get(unit, unit) + re.sub(r"[{}]", "", found[4])


def parts(text):
    """('()', ['1', '2']) of a tuple, an interval, a set or a list ('') of answers; None of one answer."""
    text = text.replace("\\{", "\x01").replace("\\}", "\x02")
    if len(items := cut(text, "\\cup")) > 1:
        return "∪", items
    if "\\pm" in text:
        items = cut(text.replace("\\pm", "+"), ",") + cut(text.replace("\\pm", "-"), ",")
        return "", list(dict.fromkeys(items))
    kind = text[:1] + text[-1:]
    whole = kind in ("()", "[]", "(]", "[)", "\x01\x02") and len(cut(text, "")) == 1
    items = cut(text[1:-1] if whole else text, ",")
    return (("{}" if kind == "\x01\x02" else kind) if whole else "", items) if len(items) > 1 or kind == "\x01\x02" \
        else None


def cut(text, separator):
    """The pieces of a text between separators that stand in no brackets; '' cuts behind each closed bracket."""
    pieces, start, depth = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{\x01") - (letter in ")]}\x02")
        if depth == 0 and (text.startswith(separator, place) if separator else letter in ")]\x02"):
            pieces.append(text[start:place + (not separator)])
            start = place + max(1, len(separator))
    pieces.append(text[start:])
    return [piece.strip().replace("\x01", "\\{").replace("\x02", "\\}") for piece in pieces if piece.strip()]


def judge_math(problems, answers, executor):
    with contextlib.closing(MathJudge()) as judge:
        for problem, answer in zip(problems, answers):
            yield {"correct": answer is not None and judge(problem.gold[0], answer, problem.gold[1])}


# --- an evaluation ----------------------------------------------------------------------------------

@contextlib.contextmanager
def sandbox(workers):
    """For benchmarks: their tests and solutions need more modules, time and room than AZR's own tasks."""
    try:
        executor = Executor(workers, TIMEOUT, MEMORY_MB, allow=MODULES, max_text=EVERYTHING)
    except TypeError:
        executor = Executor(workers, TIMEOUT)
    with executor:
        yield executor


def judge(name, problems, responses, executor):
    """[Problem], [response] → [{"correct", "base", "well_formed"}], in order, with a progress bar."""
    read = BENCHMARKS[name].read
    extract, verdict = ((math_answer, judge_math) if read is read_math else (value_answer, judge_values)
                        if read in (read_io, read_heldout) else (program_answer, judge_programs))
    answers = [extract(problem, response) for problem, response in zip(problems, responses)]
    size = 16 if read is read_contest else 256  # contests have megabytes of tests
    verdicts = []
    with tqdm(total=len(problems), desc=f"{name}: judge", unit="answer", leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(problems), size):
            for found in verdict(problems[start:start + size], answers[start:start + size], executor):
                verdicts.append(found | {"well_formed": answers[len(verdicts)] is not None})
                bar.update()
    return verdicts


def encode(policy, question, template):
    """The three templates; each is the same for the base and the trained model. → token ids

    azr: the frame that training uses, <think> opened; plain: the question alone; chat: the model's own
    chat template around the question.
    """
    if template == "azr":
        return policy.encode(question)
    if template == "plain":
        return policy.tokenizer(question + "\n\n").input_ids
    if not policy.chat:
        raise usage_error("--template chat: this model has no chat template; take azr or plain")
    text = policy.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                add_generation_prompt=True)
    return policy.tokenizer(text, add_special_tokens=False).input_ids


def answer(policy, name, problems, how, done=(), column="model"):
    """Yields the rows of answers.jsonl, `how.samples` for each problem whose id is not in `done`."""
    import torch
    from azr import generate
    todo = [problem for problem in problems if problem.id not in done]
    size = max(1, 64 // how.samples)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with tqdm(total=len(problems), initial=len(problems) - len(todo), desc=f"{name}: {column}", unit="task",
              leave=False, dynamic_ncols=True) as bar, torch.random.fork_rng(devices):
        for chunk in (todo[start:start + size] for start in range(0, len(todo), size)):
            torch.manual_seed(zlib.crc32(f"{how.seed} {name} {chunk[0].id}".encode()))
            started = time.perf_counter()
            prompts = [encode(policy, problem.question, how.template) for problem in chunk]
            responses = generate(policy, prompts, how.max_response, how.samples, greedy=not how.temperature,
                                 temperature=how.temperature or 1.0)
            seconds = (time.perf_counter() - started) / len(responses)
            for place, ids in enumerate(responses):
                text = policy.text(ids)
                yield {"column": column, "benchmark": name, "id": chunk[place // how.samples].id, "response": text,
                       "tokens": len(ids), "seconds": round(seconds, 4),
                       "truncated": not (ids[-1] in policy.end_ids or "</answer>" in text)}
            bar.update(len(chunk))


def score(problems, rows, verdicts):
    """The figures of one benchmark. A problem without an answer counts as answered wrong."""
    samples = defaultdict(list)
    for row, verdict in zip(rows, verdicts):
        samples[row["id"]].append(verdict)
    n = max(1, min(map(len, samples.values()), default=1))
    wrong = {"correct": False, "base": False, "well_formed": False}
    answers = {problem.id: samples.get(problem.id) or [wrong] * n for problem in problems}
    flat = [verdict for verdicts in answers.values() for verdict in verdicts]
    passes = {k: mean_error([pass_at_k(len(v), sum(x["correct"] for x in v), k) for v in answers.values()])
              for k in sorted({n, *(2 ** i for i in range(n.bit_length()))})}

    def share(name, items):
        values = [item[name] for item in items if item.get(name) is not None]
        return sum(values) / len(values) if values else None
    return {"accuracy": passes[1][0], "stderr": passes[1][1], "n": len(answers), "samples": n,
            "unanswered": len(answers) - len(samples), "pass@k": {k: list(value) for k, value in passes.items()},
            "base_tests": share("base", flat), "well_formed": share("well_formed", flat),
            "truncated": share("truncated", rows), "response_tokens": share("tokens", rows),
            "response_characters": sum(len(row["response"]) for row in rows) / max(1, len(rows)),
            "tokens": sum(row.get("tokens") or 0 for row in rows),
            "seconds": round(sum(row.get("seconds") or 0 for row in rows), 1),
            "correct": {key: [verdict["correct"] for verdict in value] for key, value in answers.items()}}


def report(results, markdown=False):
    """{column: {benchmark: score}} as two tables: accuracies side by side, and the rest."""
    columns = {column: {name: (s["accuracy"], s["stderr"]) for name, s in scores.items()}
               for column, scores in results.items()}
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    groups = {f"mean {group}": [name for name in names if BENCHMARKS[name].group == group]
              for group in ("heldout", *GROUPS)}
    first, *others = columns
    for other in others:  # both answered the same problems, so the error of the difference is smaller
        columns[f"{other} − {first}"] = {name: difference(results[first][name], results[other][name])
                                         for name in names if name in results[first] and name in results[other]}
    text = table(columns, "pass@1, %", markdown, {name: rows for name, rows in groups.items() if len(rows) > 1})
    lines = [["", "model", "tasks", "samples", "pass@k, %", "base tests", "well formed", "truncated", "tokens",
              "seconds"]]
    for name in names:
        for column, s in ((column, scores[name]) for column, scores in results.items() if name in scores):
            shares = ["–" if s[key] is None else f"{100 * s[key]:.1f}%"
                      for key in ("base_tests", "well_formed", "truncated")]
            tokens = f"{s['response_characters']:.0f} chars" if s["response_tokens"] is None else \
                f"{s['response_tokens']:.0f}"
            lines.append([name, column, s["n"], s["samples"], " ".join(
                f"{k}: {100 * value:.1f}" for k, (value, _) in s["pass@k"].items()), *shares, tokens, s["seconds"]])
    return text + "\n\n" + layout(lines, markdown)


def difference(base, other):
    deltas = [sum(other["correct"][key]) / len(other["correct"][key]) - sum(flags) / len(flags)
              for key, flags in base["correct"].items() if key in other["correct"]]
    return mean_error(deltas)


def evaluate_benchmarks(policy, problems, max_response=2048, workers=None, template="azr"):
    """{name: (accuracy, standard error, tasks)} of greedy answers; problems: from load_benchmarks."""
    how = SimpleNamespace(samples=1, temperature=0, max_response=max_response, template=template, seed=0)
    scores = {}
    with sandbox(workers) as executor:
        for name, tasks in problems.items():
            rows = list(answer(policy, name, tasks, how))
            s = score(tasks, rows, judge(name, tasks, [row["response"] for row in rows], executor))
            scores[name] = s["accuracy"], s["stderr"], s["n"]
    return scores


class Answers:
    """answers.jsonl of an evaluation: rows are added as they come, and a killed one goes on from them."""

    def __init__(self, folder, settings):
        self.path, self.rows = Path(folder) / "answers.jsonl", []
        kept = Path(folder) / "settings.json"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if kept.exists() and json.loads(kept.read_text()) != settings:
                raise usage_error(f"{folder} holds answers made with other settings ({kept.name} there); "
                                  "give another --out")
            kept.write_text(json.dumps(settings, indent=1) + "\n")
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            count = defaultdict(int)
            for row in rows:
                count[self.key(row)] += 1
            self.rows = [row for row in rows if count[self.key(row)] == settings.get("samples", count[self.key(row)])]
            fresh = self.path.with_suffix(".new")
            fresh.write_text("".join(map(self.line, self.rows)), encoding="utf-8")
            os.replace(fresh, self.path)
            self.file = open(self.path, "a", encoding="utf-8")
        except (OSError, json.JSONDecodeError) as error:
            raise usage_error(f"cannot use the folder {folder}: {error}") from error

    @staticmethod
    def key(row):
        return row["column"], row["benchmark"], row["id"]

    @staticmethod
    def line(row):
        return json.dumps(row, ensure_ascii=False) + "\n"

    def add(self, row):
        self.rows.append(row)
        self.file.write(self.line(row))
        self.file.flush()

    def of(self, column, name):
        return [row for row in self.rows if (row["column"], row["benchmark"]) == (column, name)]


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="eval.py", description="Measure a model on benchmarks, base and trained side by side.")
    add = parser.add_argument
    add("--model", help="tiny (shipped, the default), a local folder or a Hugging Face name")
    add("--adapter", help="a PEFT adapter folder: the trained model, beside its base")
    add("--run", help="a run folder of train.py: its model, before and after training")
    add("--benchmarks", default="heldout", help="names and groups with commas: heldout (the default), io "
        "(in-distribution), code, math, all, or " + ", ".join(name for name in BENCHMARKS if "heldout" not in name))
    add("--data", metavar="DIR", help="a folder with the benchmarks' files; default: the Hugging Face hub")
    add("--judge", metavar="FILE", help='judge these answers, lines of {"benchmark", "id", "response"}; no model')
    add("--limit", type=int, help="only the first so many tasks of each benchmark")
    add("--template", choices=("azr", "plain", "chat"), default="azr",
        help="azr: the frame of training (default); plain: the question alone; chat: the model's chat template")
    add("--samples", type=int, default=1, help="answers to each task (1)")
    add("--temperature", type=float, help="0 is greedy, the default for one sample; for more it is 1")
    add("--max-response", type=int, help="tokens of a response; default: as trained, 128 for tiny, else 4096")
    add("--seed", type=int, default=0, help="random seed of sampling (0)")
    add("--heldout", default=str(HELDOUT), help="JSON lines of held-out tasks; default: the tiny model's")
    add("--split", default="easy", help="which split of that file (easy)")
    add("--out", metavar="DIR", help="where answers.jsonl, results.json and results.md go; default: a folder in "
        "runs/ with a name of its own for each setting, so that the same command goes on where it was stopped")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--quantize", choices=("auto", "4bit", "none"), help="4-bit base weights; auto (default): as trained")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights")
    add("--device", help="cuda, cuda:1, cpu; default: cuda where there is one")
    add("--generate-batch", type=int, default=0, help="responses sampled at once; default: as free memory allows")
    add("--workers", type=int, help="sandbox workers; default: all cores")
    options = parser.parse_args(arguments)
    options.temperature = (0.0 if options.samples == 1 else 1.0) if options.temperature is None else options.temperature
    for name, least in (("samples", 1), ("limit", 1), ("workers", 1), ("max_response", 1), ("temperature", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            raise usage_error(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if options.samples > 1 and not options.temperature:
        raise usage_error(f"--samples {options.samples} at --temperature 0 would all be the same answer")
    return options


def main(arguments=None):
    try:
        evaluate(parse(arguments))
    except ValueError as error:
        if type(error).__name__ != "UsageError":
            raise
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the answers so far are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    return 0


def evaluate(options):
    given = read_answers(options.judge) if options.judge else None
    names = chosen(options.benchmarks) if not given or options.benchmarks != "heldout" else \
        [name for name in BENCHMARKS if name in given]
    problems, missing = load_benchmarks(names, options.data, options.limit, options.heldout, options.split)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not problems:
        raise usage_error("none of the benchmarks can be had (see above)")
    if given:
        settings, columns = {"judge": str(Path(options.judge).resolve())}, None
    else:
        columns, cfg = models(options)
        settings = {"model": cfg["model"], "columns": list(columns), "adapter": options.adapter, "run": options.run,
                    **{name: getattr(options, name) for name in
                       ("template", "samples", "temperature", "seed", "heldout", "split", "quantize", "dtype")},
                    "max_response": cfg["max_response"]}
        options.max_response = cfg["max_response"]
    stem = Path(options.judge).stem if given else Path(options.run or cfg["model"]).name
    out = Path(options.out or f"runs/eval-{stem}-{zlib.crc32(json.dumps(settings).encode()):08x}")
    answers = Answers(out, settings)
    if given:
        answers.rows = [row for name in problems for row in given.get(name, [])]
    results = {}
    with sandbox(options.workers) as executor:
        for column, load in (columns or {"answers": None}).items():
            if load and any({p.id for p in tasks} - {row["id"] for row in answers.of(column, name)}
                            for name, tasks in problems.items()):
                policy, weights = load()
                with weights:
                    for name, tasks in problems.items():
                        done = {row["id"] for row in answers.of(column, name)}
                        for row in answer(policy, name, tasks, options, done, column):
                            answers.add(row)
            results[column] = {name: judged(name, tasks, answers.of(column, name), executor)
                               for name, tasks in problems.items()}
    write = {"settings": settings, "limit": options.limit, "results": results,
             "missing": {name: reason.split("\n")[0] for name, reason in missing.items()}}
    (out / "results.json").write_text(json.dumps(write, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(report(results, markdown=True) + "\n", encoding="utf-8")
    print(report(results, options.markdown) + f"\n\nfolder  {out}")
    return results


def judged(name, problems, rows, executor):
    """The score of some rows of answers.jsonl; rows of other problems (--limit) do not count."""
    known = {problem.id: problem for problem in problems}
    rows = [row for row in rows if row["id"] in known]
    verdicts = judge(name, [known[row["id"]] for row in rows], [row["response"] for row in rows], executor)
    return score(problems, rows, verdicts)


def read_answers(path):
    """--judge: {benchmark: rows}"""
    found = defaultdict(list)
    try:
        for number, row in enumerate(read_rows(Path(path)), 1):
            for name in chosen(str(row["benchmark"])):
                found[name].append({"column": "answers", "benchmark": name, "id": str(row["id"]),
                                    "response": str(row["response"])})
    except (OSError, UnicodeDecodeError) as error:
        raise usage_error(f"--judge {path}: {getattr(error, 'strerror', None) or error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise usage_error(f'--judge {path}: after line {len(found)} comes none of the form {{"benchmark": …, "id": …, '
                          f'"response": …}}: {error}') from error
    if not found:
        raise usage_error(f"--judge {path}: there are no answers in it")
    return found


def models(options):
    """({column: a function that loads (policy, context of its weights)}, {"model", "max_response"})"""
    from azr import base_weights, load_policy
    run, trained = Path(options.run or ""), {}
    if options.run:
        try:
            trained = json.loads((run / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise usage_error(f"{run} is not a run folder: cannot read its config.json") from error
        if not (run / "adapter").is_dir() and not (run / "model").is_dir():
            raise usage_error(f"{run} has no trained weights yet (no folder adapter or model)")
    name = options.model or trained.get("model", "tiny")
    adapter = options.adapter or (str(run / "adapter") if options.run and (run / "adapter").is_dir() else None)
    quantize = options.quantize or trained.get("quantize", "auto")
    if name == "tiny":
        import torch
        torch.set_num_threads(1)  # its matrices are too small for more

    def load(source, rank=0):
        return load_policy(source, quantize, rank, options.dtype, options.device, adapter, rows=options.generate_batch)
    if adapter:  # one model in memory, its adapter off and on
        once = []
        def both():
            once or once.append(load(name, trained.get("lora_rank", 1)))
            return once[0]
        columns = {"base": lambda: (both(), base_weights(both())),
                   "trained": lambda: (both(), contextlib.nullcontext())}
    else:
        columns = {"base": lambda: (load(name), contextlib.nullcontext())}
        if options.run:
            columns["trained"] = lambda: (load(str(run / "model")), contextlib.nullcontext())
    return columns, {"model": name, "max_response": options.max_response or trained.get(
        "max_response", 128 if name == "tiny" else 4096)}


if __name__ == "__main__":
    sys.exit(main())
