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
import itertools
import json
import math
import os
import pickletools
import re
import select
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from executor import Executor, literal, parse_literal
from rewards import is_correct
from tasks import ANSWER_TAG, TASK_TYPES, Task, UsageError, fenced_blocks, parse_answer, solve_prompt

HELDOUT = Path(__file__).resolve().parent / "tiny" / "heldout.jsonl"
EVERYTHING = 1 << 30             # characters: no limit but memory
TIMEOUT, MEMORY_MB = 10.0, 4096  # of one sandboxed run of a benchmark's tests
MODULES = "sys io os random time datetime hashlib threading secrets calendar queue".split()  # that they need
progress = partial(tqdm, leave=False, dynamic_ncols=True)


# --- held-out tasks ---------------------------------------------------------------------------------

def load_heldout(path=HELDOUT, limit=None):
    """{split: [Task]} from a file of JSON lines with `split` and the fields of a Task.

    limit: at most so many tasks of each type and split, the first ones.
    """
    splits, count = defaultdict(list), Counter()
    try:
        for row in read_rows(Path(path)):
            key = row["split"], row["type"]
            count[key] += 1
            if limit is None or count[key] <= limit:
                fields = {name: row[name] for name in Task.__dataclass_fields__ if name in row}
                splits[row["split"]].append(Task.from_dict(fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot read the held-out tasks {path} (JSON lines with split, type and the "
                         f"fields of a task): {error!r}") from error
    return dict(splits)


def heldout_accuracy(policy, executor, tasks, cfg):
    """Accuracy on held-out tasks, one greedy answer each. → {type: (accuracy, standard error, tasks)}"""
    from azr import solve
    correct = defaultdict(list)
    for rollout in solve(policy, executor, tasks, cfg, greedy=True):
        correct[rollout.type].append(rollout.verdict == "correct")
    return {type: (*mean_error(correct[type]), len(correct[type])) for type in TASK_TYPES if type in correct}


# --- figures ----------------------------------------------------------------------------------------

def mean_error(values):
    """(mean, its standard error) of independent values; of hits and misses, the binomial one."""
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


def paired_difference(before, after):
    """(mean, standard error) of after − before over the same problems: {id: [correct]} each."""
    return mean_error([sum(flags) / len(flags) - sum(before[id]) / len(before[id]) for id, flags in after.items()])


def table(columns, title="held-out accuracy", markdown=False, means=None):
    """{column: {row: (accuracy, error, …)}} as text, with a further row for each mean in {name: rows}.

    A column named "difference" is written with its signs.
    """
    rows = {row: [row] for scores in columns.values() for row in scores}
    lines = [[title, *columns]]
    for row, members in (rows | ({"mean": list(rows)} if means is None else means)).items():
        cells = [mean_score({name: scores[name] for name in members}) if {*members} <= {*scores} else None
                 for scores in columns.values()]
        signs = ("+" if column == "difference" else "" for column in columns)
        lines.append([row, *(f"{100 * c[0]:{sign}.1f} ± {100 * c[1]:.1f}" if c else "–" for c, sign in zip(cells, signs))])
    return layout(lines, markdown)


def layout(rows, markdown):
    """Rows of cells as a Markdown table, or with padded columns for a terminal."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    rows = [[f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    if markdown:
        rows.insert(1, ["-" * (width - bool(i)) + ":" * bool(i) for i, width in enumerate(widths)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def score(problems, rows, verdicts):
    """The figures of one benchmark. A problem without an answer counts as answered wrong."""
    samples = defaultdict(list)
    for row, verdict in zip(rows, verdicts, strict=True):
        samples[row["id"]].append(verdict)
    n = min(map(len, samples.values()), default=1)
    has_base = any(verdict.get("base") is not None for verdict in verdicts)
    wrong = [{"correct": False, "base": False if has_base else None, "well_formed": False}] * n
    answers = {problem.id: samples.get(problem.id, wrong) for problem in problems}
    correct = {id: [verdict["correct"] for verdict in verdicts] for id, verdicts in answers.items()}
    passes = {k: mean_error([pass_at_k(len(flags), sum(flags), k) for flags in correct.values()])
              for k in sorted({n, *(2 ** i for i in range(n.bit_length()))})}

    def share(name, items):
        """(mean, standard error) over problems, whose samples are not independent; None if nobody says."""
        values = [[item[name] for item in ours if item.get(name) is not None] for ours in items.values()]
        return mean_error([sum(ours) / len(ours) for ours in values if ours]) if any(values) else None
    given = defaultdict(list)
    for row in rows:
        given[row["id"]].append(row | {"characters": len(row["response"])})
    return {"accuracy": passes[1][0], "stderr": passes[1][1], "n": len(answers), "samples": n,
            "unanswered": len(answers) - len(samples), "pass@k": passes,
            "base_tests": share("base", answers), "well_formed": share("well_formed", answers),
            "truncated": share("truncated", given), "response_tokens": share("tokens", given),
            "response_characters": share("characters", given),
            "tokens": sum(row.get("tokens", 0) for row in rows),
            "seconds": round(sum(row.get("seconds", 0) for row in rows), 1), "correct": correct}


def report(results, markdown=False):
    """{column: {benchmark: score}} as two tables: accuracies side by side, and the rest."""
    columns = {column: {name: (s["accuracy"], s["stderr"]) for name, s in scores.items()}
               for column, scores in results.items()}
    if len(results) == 2:
        before, after = results.values()
        columns["difference"] = {name: paired_difference(s["correct"], after[name]["correct"])
                                 for name, s in before.items() if name in after}
    names = list(next(iter(results.values())))
    groups = {group: [name for name in names if BENCHMARKS[name].group == group] for group in GROUPS}
    means = {f"mean of {group}": members for group, members in groups.items() if len(members) > 1}
    lines = [["", "model", "tasks", "unanswered", "samples", "pass@k, %", "base tests", "well formed",
              "truncated", "length", "tokens", "seconds"]]
    for name, (column, scores) in itertools.product(names, results.items()):
        s = scores[name]
        shares = ["–" if s[key] is None else f"{100 * s[key][0]:.1f} ± {100 * s[key][1]:.1f}%"
                  for key in ("base_tests", "well_formed", "truncated")]
        unit = "tokens" if s["tokens"] else "characters"
        length = s[f"response_{unit}"]
        passes = ", ".join(f"{k}: {100 * value:.1f} ± {100 * error:.1f}" for k, (value, error) in s["pass@k"].items())
        lines.append([name, column, s["n"], s["unanswered"], s["samples"], passes, *shares,
                      f"{length[0]:.0f} ± {length[1]:.0f} {unit}" if length else "–", s["tokens"], s["seconds"]])
    return table(columns, "pass@1, %", markdown, means) + "\n\n" + layout(lines, markdown)


# --- published formats ------------------------------------------------------------------------------

@dataclass
class Problem:
    id: str
    question: str
    gold: object       # a Task; a Program; or [answer, rough] for mathematics (see same_math)


@dataclass
class Program:
    """What a program has to do. cases() → {"base" and "plus": (suffix, entry, arguments, expected)}

    suffix: code behind the answer; entry: an expression that is called with each of the arguments (texts
    of lists), or None: the arguments are texts on standard input. expected: a value for each of them, or
    None: what the benchmark's own solution returns.
    """
    name: str      # what the program must define; "" if it reads standard input
    prelude: str   # code before the answer
    solution: str  # the benchmark's own; "" if it gives none
    cases: object
    agree: object  # (output, expected, arguments) → whether the output is right


FENCE = "Give the whole program in one fenced block that starts with ```python."


def read_io(type, row):
    """CRUXEval has code, input and output; LiveCodeBench's execution set calls its function by name."""
    code, input, name = row["code"], row["input"], row.get("function_name", "f")
    if name != "f":
        code, input = f"{code}\n\n\nf = {name}", input.strip().removeprefix(name).strip()[1:-1]
    task = Task(type, code, "" if type == "abduction" else input, row["output"])
    return solve_prompt(task), task


def read_function(row):
    """HumanEval+ and MBPP+: EvalPlus' release and its hub datasets, and the original HumanEval."""
    prompt, test = row["prompt"], row.get("test") or ""
    name = row.get("entry_point") or re.search(r"^ *assertion\((\w+)\(\*inp\)", test, re.M)[1]
    opening = f"def {name}(" in prompt
    if opening:
        question = f"Complete the Python function below. {FENCE}\n\n```python\n{prompt.strip()}\n```"
    else:
        hints = [prompt.strip().strip('"').strip(), *(row.get("test_list") or [])[:1]]
        question = f"Write a Python function `{name}`. {FENCE}\n\n" + "\n".join(hints)
    written = re.findall(r"^ *assert.*(?:,|<=) (\d[\d.e-]*)\)?$", test, re.M)
    atol = row["atol"] if "atol" in row else max(map(float, written), default=0)
    own = prompt + row["canonical_solution"] if "canonical_solution" in row else row["code"]
    return question, Program(name, prompt if opening else "", own, partial(function_cases, row, name, test),
                             partial(ORACLES.get(name, close), atol=atol))


def function_cases(row, name, test):
    def calls(inputs):
        return "", name, [literal(list(x), EVERYTHING) for x in inputs or ()], None
    if "base_input" in row:  # EvalPlus' release
        family, _, number = row["task_id"].partition("/")
        shape = next((f for ids, f in MBPP_SHAPES if family == "Mbpp" and number in ids.split()), list)
        return {part: calls(map(shape, row[f"{part}_input"] or ())) for part in ("base", "plus")}
    inputs = re.search(r"^ *inputs = (.*)$", test, re.M)
    if not inputs:           # the original HumanEval
        return {"base": (f"\n{test}", f"lambda: check({name})", ["[]"], [None]), "plus": calls([])}
    inputs = parse_literal(re.sub(r"(?<![\w'\"])inf(?![\w'\"])", "1e309", inputs[1]), EVERYTHING)
    asserts = "\n".join(["", *(row.get("test_imports") or []), *(row.get("test_list") or [])])
    return {"base": (asserts, "lambda: None", ["[]"], [None]) if asserts else calls([]),
            "plus": calls(inputs)}


def read_contest(row):
    """LiveCodeBench's generation set: functions of a class Solution, or programs that read and print."""
    name = json.loads(row["metadata"] or "{}").get("func_name", "")
    task = (f"Complete this program. {FENCE}\n\n```python\n{row['starter_code'].rstrip()}\n```" if name else
            f"Write a Python program that reads from standard input and prints the answer. {FENCE}")
    cases = partial(contest_cases, name, row["public_test_cases"], row["private_test_cases"])
    agree = partial(alike(lists), atol=0) if name else same_print
    return f"{row['question_content'].strip()}\n\n{task}", Program(name, PRELUDE, "", cases, agree)


def contest_cases(name, public, private):
    def calls(tests):
        tests = json.loads(tests)
        inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
        if not name:
            return "", None, inputs, outputs
        inputs = [literal(list(map(json.loads, text.split("\n"))), EVERYTHING) for text in inputs]
        entry = f"Solution().{name} if 'Solution' in globals() else {name}"
        return "", entry, inputs, list(map(json.loads, outputs))
    return {"base": calls(public), "plus": calls(unpack(private))}


def unpack(text):
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickle of one str of JSON."""
    if text.lstrip().startswith("["):
        return text
    pickled = zlib.decompress(base64.b64decode(text))  # read, never run: loading a pickle can run code
    tests, = [value for code, value, _ in pickletools.genops(pickled) if "UNICODE" in code.name]
    return tests


def read_math(row, rough=False):
    answer = row.get("final_answer", row.get("answer"))
    if answer is None:  # Minerva's own file has only solutions
        answer = boxed(row["solution"]) if "solution" in row else row["answer"]
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    question = "\n".join(filter(None, [row.get("context"), row.get("problem") or row["question"]]))
    return f"{question.strip()}\n\nPut the final answer in \\boxed{{}}.", [str(answer), rough]


@dataclass(frozen=True)
class Benchmark:
    group: str       # heldout is ours; the paper's are io (in-distribution), code and math
    read: object     # row → (question, gold), see Problem
    repo: str = ""   # on the Hugging Face hub
    revision: str = ""
    aliases: str = ""  # other names, also those of local files; squashed
    split: str = "test"
    config: str | None = None
    files: tuple = ()  # in the repository, where it does not say itself which files are the split


GROUPS = ("heldout", "io", "code", "math")
BENCHMARKS = {
    **{f"heldout-{type}": Benchmark("heldout", type) for type in TASK_TYPES},
    "CRUXEval-I": Benchmark("io", partial(read_io, "abduction"), "cruxeval-org/cruxeval",
                            "e536997e8381421cb107d285b4ae542aa12c6c31", "cruxeval"),
    "CRUXEval-O": Benchmark("io", partial(read_io, "deduction"), "cruxeval-org/cruxeval",
                            "e536997e8381421cb107d285b4ae542aa12c6c31", "cruxeval"),
    "LCB-Execution": Benchmark("io", partial(read_io, "deduction"), "livecodebench/execution-v2",
                               "e3bbac6d5da0043c4a0b4e4f4b678f1f6497cc86", "lcbexec execution executionv2"),
    "HumanEval+": Benchmark("code", read_function, "evalplus/humanevalplus",
                            "d32357cf319e50e9c8d8dab5ea876c72b0fd321b", "humaneval",
                            files=("data/test-00000-of-00001-5973903632b82d40.parquet",)),
    "MBPP+": Benchmark("code", read_function, "evalplus/mbppplus",
                       "b2d74c91837c3f2a20c1299ae98133cbe7cfa077", "mbpp"),
    "LCB-Generation": Benchmark("code", read_contest, "livecodebench/code_generation_lite",  # v1 to v5
                                "0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
                                "lcb lcbgen codegeneration codegenerationlite",
                                files=("test.jsonl", *(f"test{i}.jsonl" for i in range(2, 6)))),
    "AIME24": Benchmark("math", read_math, "HuggingFaceH4/aime_2024",
                        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", split="train"),
    "AIME25": Benchmark("math", read_math, "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
    "AMC23": Benchmark("math", read_math, "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "amc"),
    "MATH500": Benchmark("math", read_math, "HuggingFaceH4/MATH-500",
                         "ff5b20257d8185524591543f8ff5993951537bb8"),
    "Minerva": Benchmark("math", partial(read_math, rough=True), "math-ai/minervamath",
                         "ee46ddc498933b1977577953250ca5c66be64f96", "minervamath"),
    "OlympiadBench": Benchmark("math", read_math, "Hothan/OlympiadBench",
                               "3b426ee1d587c71b495146dde9f3e995ee7ac59f", "olympiad",
                               split="train", config="OE_TO_maths_en_COMP"),
}
IDS = ("task_id", "unique_id", "id", "idx", "question_id")  # columns of a task's own name


def names_of(name):
    """What a benchmark and its files may be called, best first."""
    return [squash(name), squash(name).removesuffix("plus"), *BENCHMARKS[name].aliases.split()]


def squash(text):
    """'AIME 2024' → 'aime24', 'MBPP+' → 'mbppplus'"""
    text = re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus"))
    return re.sub(r"20(?=2\d)", "", text).replace("livecodebench", "lcb")


def chosen(text):
    """'code,AIME 2024' → the names of benchmarks, in the order of the table."""
    names = set()
    for part in map(squash, text.split(",")):
        groups = {"all": GROUPS[1:], "indistribution": ["io"]}.get(part, [part])
        found = [name for name in BENCHMARKS if BENCHMARKS[name].group in groups or part in names_of(name)]
        if not found:
            raise UsageError(f"no benchmark {part!r}; there are {', '.join(BENCHMARKS)}, and the "
                             "groups heldout, io (in-distribution), code, math and all")
        names.update(found)
    return [name for name in BENCHMARKS if name in names]


def load_benchmarks(names, data=None, limit=None, heldout=HELDOUT, split="easy"):
    """→ ({name: [Problem]}, {name: why it could not be had}); data: a folder instead of the hub."""
    files, problems, missing = local_files(data) if data else {}, {}, {}
    for name in names:
        benchmark = BENCHMARKS[name]
        if benchmark.group == "heldout":
            splits = load_heldout(heldout, limit)
            if split not in splits:
                raise UsageError(f"no split {split!r} in {heldout}; it has {', '.join(splits)}")
            tasks = enumerate(task for task in splits[split] if task.type == benchmark.read)
            problems[name] = [Problem(str(i), solve_prompt(task), task) for i, task in tasks]
            continue
        try:
            if data and name not in files:
                raise ValueError("no file there has its name")
            rows = itertools.chain.from_iterable(map(read_rows, files[name])) if data else hub_rows(benchmark)
            problems[name] = []
            for place, row in enumerate(itertools.islice(rows, limit)):
                id = str(next((row[column] for column in IDS if column in row), place))
                id = f"Mbpp/{id}" if name == "MBPP+" and id.isdigit() else id
                problems[name].append(Problem(id, *benchmark.read(row)))
            if not problems[name]:
                raise ValueError("there are no tasks in it")
        except Exception as error:  # the hub's client, parquet and JSON have a hundred ways to fail
            problems.pop(name, None)
            reason = (f"a task lacks {error}" if isinstance(error, KeyError) else str(error)).split("\n")[0]
            missing[name] = (
                f"{reason}\n  Get it with: hf download --repo-type dataset {benchmark.repo} --revision "
                f"{benchmark.revision} --local-dir DIR/{names_of(name)[-1]}\n  and give --data DIR "
                "(JSON lines or parquet; the name of a file or of its folder says whose it is)")
    return problems, missing


def local_files(data):
    """{benchmark: its files}: whose a file is, the last name of a benchmark in its path says."""
    if not Path(data).is_dir():
        raise UsageError(f"--data {data}: no such folder")
    aliases, files = {alias for name in BENCHMARKS for alias in names_of(name)}, defaultdict(list)
    for path in sorted(Path(data).rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            key = squash(str(Path(data).resolve().name / path.relative_to(data)).split(".jsonl")[0])
            places = [(key.rfind(alias) + len(alias), len(alias), alias) for alias in aliases if alias in key]
            files[max(places, default=(0, 0, None))[2]].append(path)
    best = {name: next((alias for alias in names_of(name) if alias in files), None) for name in BENCHMARKS}
    return {name: files[alias] for name, alias in best.items() if alias}


def read_rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def hub_rows(benchmark):
    from datasets import load_dataset
    repo, revision, files = benchmark.repo, benchmark.revision, benchmark.files
    if not files:
        return load_dataset(repo, benchmark.config, split=benchmark.split, revision=revision)
    return load_dataset("parquet" if files[0].endswith("parquet") else "json", split="train", data_files=[
        f"hf://datasets/{repo}@{revision}/{file}" for file in files])


# --- what an answer says ----------------------------------------------------------------------------

def answer_text(response):
    """What stands behind the thought, and in <answer> tags if there are any."""
    text = response.rpartition("</think>")[2]
    return (text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text).strip()


def value_answer(problem, response):
    """The literal or the input that a response gives, in the form of training or in another, or None."""
    type, text = problem.gold.type, answer_text(response)
    answer = parse_answer(type, response)
    if answer is None:
        blocks = (fenced_blocks(text, ANSWER_TAG[type]) or fenced_blocks(text, r"\w*")
                  or re.findall(r"\[ANSWER\](.*?)\[/ANSWER\]", text, re.S))
        answer = blocks[-1].strip() if blocks else text.strip("` ") if text and "\n" not in text else None
    called = re.fullmatch(r"(?:assert\s+)?f\((.*?)\)\s*(?:==\s*(.*))?", answer or "", re.S)
    return (called and called[1 if type == "abduction" else 2]) or answer  # f(input) == output


def program_answer(problem, response):
    """The program that a response gives, ready to run, or None: the last block that defines what it must."""
    text, name = answer_text(response), problem.gold.name
    blocks = [block for block in fenced_blocks(text, r"[\w+-]*") if block.strip()]
    if not blocks and "```" not in text and re.search(r"^ *(?:def|import|from|class|return)\b", text, re.M):
        blocks = [text]
    if not blocks:
        return None
    definition = rf"\b(?:def|class) +{name}\b|^{name} *="
    code = ([block for block in blocks if name and re.search(definition, block, re.M)] or blocks)[-1]
    future = "".join(re.findall(r"^from __future__ import .*\n?", code, re.M))  # must come first
    return f"{future}\n{problem.gold.prelude}\n{code.replace(future, '')}"


def math_answer(_, response):
    """The last box; without one, what is tagged as the answer or called so, or a response of one formula."""
    text = answer_text(response)
    answer = boxed(text)
    if answer is None:
        said = re.findall(r"(?i:answer(?: is|:))[ *]*(.+)", text)
        plain = "<answer>" in response or "\n" not in text and (len(text) < 20 or re.search(r"[\d\\]", text))
        answer = said[-1] if said else text if plain else ""
    return answer.strip() if 0 < len(answer.strip()) <= 1000 else None


def boxed(text):
    """The content of the last \\boxed{…}, braces balanced, or None."""
    _, *boxes = re.split(r"\\(?:boxed|fbox)\{", text)
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", boxes[-1] if boxes else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return boxes[-1][:brace.start()]
    return None


# --- judges: ([Problem], [answer or None], executor) → one {"correct", "base"} for each, as they come ---

def judge_values(problems, answers, executor):
    for correct in is_correct([problem.gold for problem in problems], answers, executor):
        yield {"correct": correct}


CALL = '''
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

def output(value, limit):
    """The value, or of a long one the hash, which is the same in all runs."""
    if isinstance(value, list) and 10 * len(value) > limit:
        try:
            return ("\\0list", len(value), hash(tuple(value)))
        except TypeError:
            pass
    value = plain(value)
    text = repr(value)
    return value if len(text) < limit else ("\\0long", len(text), hash(text))

def f(source, entry, limit, cases):
    scope = {"__name__": "program"}
    exec(source, scope)
    return [output(eval(entry, scope)(*case), limit) for case in cases]
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
STARRED = "bisect collections functools heapq itertools math typing".split()
PRELUDE = "\n".join([  # contest programs are written where these names are known
    "import copy, json, operator, re, string, " + ", ".join(STARRED),
    *(f"from {module} import *" for module in STARRED), "del pow  # the one of math\n"])


def run_programs(executor, jobs):
    """[(source, entry, [arguments], limit)] → [[value] or None]: None if one of its calls gives no value.

    Of values longer than limit only a hash comes back. A hundred calls share a process; those that take
    too much time or room together are run one by one. No job is run further once a call of it has failed.
    """
    results, waiting = [], []
    for _, entry, arguments, _ in jobs:
        places, size = range(len(arguments)), 100 if entry else 1
        results.append([None] * len(places))
        waiting.append([places[start:start + size] for start in places[::size]])
    while any(waiting):
        now = [(i, piece) for i, pieces in enumerate(waiting) for piece in pieces[:4]]
        waiting = [pieces[4:] for pieces in waiting]
        calls = []
        for i, piece in now:
            source, entry, arguments, limit = jobs[i]
            source, texts = literal(source, EVERYTHING), arguments[piece.start:piece.stop]
            calls.append((CALL, f"{source}, {entry!r}, {limit}, [{', '.join(texts)}]") if entry else
                         (READ, f"{source}, {literal(texts[0], EVERYTHING)}"))
        for (i, piece), run in zip(now, executor.run(calls)):
            if results[i] is None:
                continue
            values = parse_literal(run.output, EVERYTHING) if run.ok else None
            values = values if jobs[i][1] else [values]
            if run.ok and isinstance(values, list) and len(values) == len(piece):
                results[i][piece.start:piece.stop] = values
            elif run.status in ("timeout", "memory", "killed", "unrepresentable") and len(piece) > 1:
                waiting[i][:0] = [piece[place:place + 1] for place in range(len(piece))]
            else:
                results[i], waiting[i] = None, []
    return results


def judge_programs(problems, answers, executor):
    """By the benchmark's base tests; then, for those that pass, by the others."""
    golds = {problem.id: problem.gold for problem in problems}
    cases = {id: gold.cases() for id, gold in golds.items()}
    passed, base = [answer is not None for answer in answers], []
    for part in ("base", "plus"):
        left = [i for i, good in enumerate(passed) if good]
        expected = {problems[i].id: cases[problems[i].id][part][-1] for i in left}
        unknown = [id for id, values in expected.items() if values is None]
        jobs = []
        for id, source in [*((id, golds[id].solution) for id in unknown),
                           *((problems[i].id, answers[i]) for i in left)]:
            suffix, entry, arguments, values = cases[id][part]
            jobs.append((source + suffix, entry, arguments, 100_000 if values is None else EVERYTHING))
        outputs = run_programs(executor, jobs)
        for id in unknown:
            expected[id] = outputs.pop(0)
            if expected[id] is None:
                tqdm.write(f"{id}: the benchmark's own solution does not run in the sandbox, so every answer "
                           "counts as wrong", file=sys.stderr)
        for i, values in zip(left, outputs):
            id = problems[i].id
            passed[i] = None not in (values, expected[id]) and all(
                map(partial(agrees, golds[id].agree), values, expected[id], cases[id][part][2]))
        base = base or list(passed)
    for problem, good, simple in zip(problems, passed, base):
        yield {"correct": good, "base": simple if cases[problem.id]["base"][2] else None}


def agrees(agree, output, expected, arguments):
    try:
        return output == expected or bool(agree(output, expected, arguments))
    except (TypeError, ValueError, ArithmeticError):  # a value of another kind than was asked for
        return False


def close(output, expected, arguments, atol=0):
    """EvalPlus' rule: equal; or floats, or what a task has a tolerance for, that are close."""
    flat = expected if isinstance(expected, (list, tuple)) else [expected]
    atol = atol or (1e-6 if flat and all(type(value) is float for value in flat) else 0)
    return output == expected or atol > 0 and type(output) is type(expected) and near(output, expected, atol)


def near(a, b, atol):
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(near, a, b, [atol] * len(b)))
    return a == b or not isinstance(b, bool) and abs(a - b) <= atol + 1e-7 * abs(b)


def alike(view):
    """Right if it looks the same to view."""
    return lambda output, expected, arguments, atol: view(output) == view(expected)


def lists(value):
    return [lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def root(output, expected, arguments, atol):
    (coefficients,), x = parse_literal(arguments), float(output)
    return abs(sum(c * x ** power for power, c in enumerate(coefficients))) <= (atol or 1e-4)


def or_else(other):
    """Also right by another reading of the task, by which the value is other(*arguments)."""
    return lambda output, expected, arguments, atol: (
        close(output, expected, arguments, atol) or close(output, other(*parse_literal(arguments)), "", atol))


def all_divisors(n):
    return sum(d + (n // d if d * d != n else 0) for d in range(1, math.isqrt(n) + 1) if n % d == 0)


# The tasks that EvalPlus does not compare by value, by their functions' names. Of are_equivalent it takes
# any answer; we take both readings of 'divisors', with and without the number itself.
ORACLES = dict(
    find_zero=root, sum_div=or_else(lambda n: 0),
    **dict.fromkeys("similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum "
                    "intersection_array find_dissimilar Diff".split(), alike(set)),
    **dict.fromkeys("check_str text_match_three text_starta_endb".split(),
                    alike(lambda found: found is not None and found is not False)),
    are_equivalent=or_else(lambda a, b: all_divisors(a) == all_divisors(b)),
    surface_Area=or_else(lambda base, height: round(base ** 2 + 2 * base * math.hypot(base / 2, height))),
    digit_distance_nums=or_else(lambda a, b: sum(abs(int(x) - int(y)) for x, y in itertools.zip_longest(
        str(a)[::-1], str(b)[::-1], fillvalue=0))))

# EvalPlus' release holds tuples and sets as lists, and complex numbers as text: how to restore them.
MBPP_SHAPES = [
    ("2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
     lambda a: [tuple(x) for x in a]),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", lambda a: [[tuple(y) for y in x] for x in a]),
    ("75 413 444 753", lambda a: [[tuple(y) for y in a[0]], a[1]]),
    ("106 750", lambda a: [a[0], tuple(a[1])]),
    ("115", lambda a: [[set(x) if x and type(x) is list else {} for x in a[0]]]),
    ("124", lambda a: [float(a[0]), complex(a[1])]),
    ("250 307 405 446 617 720 763 808", lambda a: [tuple(a[0]), *a[1:]]),
    ("252", lambda a: [complex(a[0])]),
    ("278", lambda a: [tuple(tuple(y) if type(y) is list else y for y in a[0])]),
    ("259 401 445 580 615 791", lambda a: [tuples(x) for x in a]),
    ("722", lambda a: [{key: tuple(x) for key, x in a[0].items()}, *a[1:]]),
]


def tuples(value):
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def same_print(output, expected, arguments):
    """Line by line, without the spaces around; or the same numbers in a line."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(ours) == len(theirs) and all(a == b or [*map(Decimal, a.split())] == [*map(Decimal, b.split())]
                                            for a, b in zip(ours, theirs))


# --- mathematics ------------------------------------------------------------------------------------

def judge_math(problems, answers, executor):
    with contextlib.closing(MathJudge()) as judge:
        for problem, answer in zip(problems, answers):
            yield {"correct": answer is not None and judge(problem.gold[0], answer, problem.gold[1])}


class MathJudge:
    """same_math in a process of its own: what hangs in there or eats memory is killed, and is wrong."""

    process = None

    def __call__(self, gold, answer, rough=False):
        if not self.process:
            self.process = subprocess.Popen([sys.executable, "-c", "import eval; eval.serve_math()"],
                                            cwd=Path(__file__).parent, bufsize=0, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE)
            self.process.stdout.readline()  # it is ready
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([gold, answer, rough]).encode() + b"\n")
            if select.select([self.process.stdout], [], [], TIMEOUT / 2)[0]:
                if verdict := self.process.stdout.readline():
                    return json.loads(verdict)
        self.close()
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
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    logging.disable(logging.CRITICAL)
    results, sys.stdout = sys.stdout, sys.stderr
    same_math("a", "b")  # imports
    print(flush=True, file=results)
    for line in sys.stdin:
        verdict = False
        with contextlib.suppress(Exception):  # formulas that make no sense raise whatever there is
            verdict = same_math(*json.loads(line))
        print(json.dumps(verdict), flush=True, file=results)


WORDS = r"\\(?:text|mbox|mathrm|textbf|textit|textrm|operatorname)(?![a-z])\s*"
UNITS = {alias: names.split()[0] for names in (  # other units must agree by the letter
    "degree degrees", "percent %", "dollar dollars", "cm centimeter centimeters", "m meter meters",
    "km kilometer kilometers", "mm millimeter millimeters", "inch inches in", "foot feet ft", "mile miles",
    "min minute minutes", "h hour hours hr", "s second seconds sec", "day days", "year years", "unit units",
    "km/h kmh kph", "kg kilogram kilograms", "g gram grams") for alias in names.split()}


def same_math(gold, answer, rough=False):
    """Whether two answers in LaTeX say the same. rough: decimals may differ by rounding, as Minerva's do.

    Tuples, intervals, sets and lists are compared part by part here, texts by the letter, and single
    formulas by math-verify, which takes (1, 2) for an interval and words for products of letters.
    """
    texts = [tidy(gold), tidy(answer)]
    names = [re.match(r"([a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*=(?=[^=<>]+$)", text) for text in texts]
    if all(names) or any(names) and "".join(texts).count("=") == 1:  # x = 5 is 5, and it is not y = 5
        if all(names) and squeeze(names[0][1]) != squeeze(names[1][1]):
            return False
        texts = [tidy(text[name.end():] if name else text) for name, text in zip(names, texts)]
    gold, answer = texts
    if not gold or not answer or squeeze(gold) == squeeze(answer):
        return gold != "" and answer != ""
    if re.fullmatch(WORDS + r"\{[^{}]*\}|[A-Za-z][a-z]{3,}[a-z ,'-]*", gold):
        said, meant = (re.sub(r"[^a-z0-9]", "", re.sub(WORDS, "", text).lower()) for text in (answer, gold))
        return said == meant
    (gold, unit), (answer, other) = split_unit(gold), split_unit(answer)
    if unit and other and unit != other:
        return False
    if "percent" in (unit, other) and unit != other:  # 15% is 15 or 0.15
        pair = (f"({gold})/100", answer) if unit == "percent" else (gold, f"({answer})/100")
        return same_math(gold, answer, rough) or same_math(*pair, rough)
    ours, theirs = parts(gold), parts(answer)
    if bool(ours) != bool(theirs):  # 13,535 is one number if the other side is one
        gold, answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) for text in (gold, answer))
        ours, theirs = parts(gold), parts(answer)
    if ours and theirs:
        return same_parts(*ours, *theirs, rough)
    if (ours or theirs) and not re.search(r"[<>]|\\(?:le|ge|lt|gt)", gold + answer):
        return False
    if re.search(r"\d_\{?\d", gold + answer):  # digits in another base, and the texts differ
        return False
    numbers = [re.sub(r"\\(?:times|cdot)10\^\{?([-+]?\d+)\}?$", r"e\1", re.sub(r"\s", "", text))
               for text in (gold, answer)]
    if all(re.fullmatch(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", number) for number in numbers):
        a, b = map(Decimal, numbers)
        last_digit = Decimal(1).scaleb(a.as_tuple().exponent)
        return abs(a - b) <= (min(abs(a) / 10000, last_digit / 2) if rough else 0)
    # to sympy dx/dt is 0, as x is no function of t
    gold, answer = (re.sub(r"\\frac\{\s*d\s*(\\?[a-zA-Z]+)\s*\}\{\s*d\s*(\w)\s*\}", r"\1_{d\2}", text)
                    for text in (gold, answer))
    from math_verify import LatexExtractionConfig, parse, verify
    gold, answer = (parse(f"$\\boxed{{{text}}}$", [LatexExtractionConfig()], parsing_timeout=None)
                    for text in (gold, answer))
    return bool(verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))


def same_parts(kind, gold, other, answer, rough):
    if kind != other and {kind, other} != {"", r"\{\}"} or len(gold) != len(answer):
        return False
    if kind[:1] in ("(", "["):
        return all(same_math(a, b, rough) for a, b in zip(gold, answer))
    left = list(answer)
    for item in gold:  # in any order, each once
        match = next((candidate for candidate in left if same_math(item, candidate, rough)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def tidy(text):
    for written, plain in (("\\$", ""), ("$", ""), ("\u2212", "-"), ("\\!", ""), ("{,}", ""), ("~", " ")):
        text = text.replace(written, plain)
    text = re.sub(r"\\(left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])", "", text).strip().rstrip(". ")
    text = re.sub(r"\\[dtc]frac", r"\\frac", re.sub(r"(?<!\\)\\[,; ]", " ", text))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", r"\\text{degree}", text)
    text = re.sub(WORDS + r"\{\s*(?:and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)", ",", text)
    text = re.sub(r"(?<=\d)[eE]\+?(-?\d+)$", r"\\times 10^{\1}", text)
    return re.sub(r"^[a-zA-Z]\s*\\in(?![a-z])\s*", "", text)  # x ∈ (0, 1)


def squeeze(text):
    """Without the spaces and braces that say nothing: \\frac{1}{23} is not \\frac{12}{3}, nor is 1 1/2 11/2."""
    return re.sub(r"\{(\w|\\[a-zA-Z]+)\}", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))


def split_unit(text):
    """'10 \\text{ cm}^2' → ('10', 'cm^2')"""
    found = re.search(
        r"(?<=[\d})])\s*(?:" + WORDS + r"\{([^{}]*)\}|\s([a-zA-Z/]+)|\\?(%))(\^\{?\d\}?)?$", text)
    unit = re.sub(r"[\s.]", "", (found[1] or found[2] or found[3] or "").lower()) if found else ""
    if not unit or found[2] and unit not in UNITS:
        return text, ""
    return text[:found.start()], UNITS.get(unit, unit) + squeeze(found[4] or "")


def parts(text):
    r"""('()', ['1', '2']) of a tuple or an interval, '\{\}' of a set, '' of a list; None of one formula."""
    if len(union := cut(text, r"\cup")) > 1:
        return "∪", union
    if r"\pm" in text:
        return "", list(dict.fromkeys(item for sign in "+-" for item in cut(text.replace(r"\pm", sign))))
    opening, inner, closing = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", text, re.S).groups()
    kind = opening + closing
    if kind not in ("()", "[]", "(]", "[)", r"\{\}") or len(cut(text)) > 1:
        kind, inner = "", text
    items = cut(inner)
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


# --- an evaluation ----------------------------------------------------------------------------------

JUDGES = {"heldout": (lambda problem, response: parse_answer(problem.gold.type, response), judge_values),
          "io": (value_answer, judge_values), "code": (program_answer, judge_programs),
          "math": (math_answer, judge_math)}


def sandbox(workers):
    """For benchmarks, whose tests and solutions need more modules, time and room than AZR's own tasks."""
    return Executor(workers, TIMEOUT, MEMORY_MB, allow=MODULES, max_text=EVERYTHING)


def judge(name, problems, responses, executor):
    """[Problem], [response] → [{"correct", "base", "well_formed"}], in order."""
    benchmark, verdicts = BENCHMARKS[name], []
    extract, verdicts_of = JUDGES[benchmark.group]
    answers = list(map(extract, problems, responses))
    size = 16 if benchmark.read is read_contest else 256  # contests have megabytes of tests
    for start in progress(range(0, len(problems), size), f"{name}: judge"):
        chunk = slice(start, start + size)
        verdicts += verdicts_of(problems[chunk], answers[chunk], executor)
    return [verdict | {"well_formed": answer is not None} for verdict, answer in zip(verdicts, answers)]


def encode(policy, question, template):
    """A question as token ids, by one of three templates, the same for the base and the trained model.

    azr: the frame of training, which ends in <think>; plain: the question and an empty line; chat: the
    model's own chat template around the question.
    """
    if template == "azr":
        return policy.encode(question)
    if template == "plain":
        return policy.tokenizer(question + "\n\n").input_ids
    if not policy.chat:
        raise UsageError("--template chat: this model has no chat template; take azr or plain")
    text = policy.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                add_generation_prompt=True)
    return policy.tokenizer(text, add_special_tokens=False).input_ids


def answer(policy, name, problems, how, done=(), column="model"):
    """Yields the rows of answers.jsonl, `how.samples` for each problem whose id is not in `done`."""
    import torch
    from azr import generate
    todo = [problem for problem in problems if problem.id not in done]
    size = max(1, 128 // how.samples)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress(
            desc=f"{name}: {column}", total=len(problems), initial=len(problems) - len(todo)) as bar:
        for chunk in (todo[start:start + size] for start in range(0, len(todo), size)):
            torch.manual_seed(zlib.crc32(f"{how.seed} {name} {chunk[0].id}".encode()))
            started = time.perf_counter()
            prompts = [encode(policy, problem.question, how.template) for problem in chunk]
            responses = generate(policy, prompts, how.max_response, how.samples, greedy=not how.temperature,
                                 temperature=how.temperature or 1.0)
            seconds = (time.perf_counter() - started) / len(responses)
            for place, ids in enumerate(responses):
                text, id = policy.text(ids), chunk[place // how.samples].id
                yield {"column": column, "benchmark": name, "id": id, "response": text, "tokens": len(ids),
                       "seconds": round(seconds, 4),
                       "truncated": not (ids[-1] in policy.end_ids or "</answer>" in text)}
            bar.update(len(chunk))


def evaluate_benchmarks(policy, problems, max_response=2048, workers=None, template="azr"):
    """{name: (accuracy, standard error, tasks)} of greedy answers; problems: from load_benchmarks."""
    how = SimpleNamespace(samples=1, temperature=0, max_response=max_response, template=template, seed=0)
    scores = {}
    with sandbox(workers) as executor:
        for name, tasks in problems.items():
            figures = judged(name, tasks, list(answer(policy, name, tasks, how)), executor)
            scores[name] = figures["accuracy"], figures["stderr"], figures["n"]
    return scores


def evaluate(options):
    given = read_answers(options.judge) if options.judge else {}
    columns, model = ({"answers": None}, None) if given else models(options)
    names = chosen(options.benchmarks or ",".join(name for _, name in given) or "heldout")
    problems, missing = load_benchmarks(names, options.data, options.limit, options.heldout, options.split)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not problems:
        raise UsageError("none of the benchmarks can be had, for the reasons above")
    kept = "run adapter template samples temperature seed max_response heldout split quantize dtype".split()
    settings = {"judge": options.judge} if given else {
        "model": model, **{name: getattr(options, name) for name in kept}}
    stem = Path(options.judge or options.run or model).stem
    out = Path(options.out or f"runs/eval-{stem}-{zlib.crc32(json.dumps(settings).encode()):08x}")
    out.mkdir(parents=True, exist_ok=True)
    rows = given or generate_answers(columns, problems, options, out, settings)
    with sandbox(options.workers) as executor:
        results = {column: {name: judged(name, tasks, rows.get((column, name), []), executor)
                            for name, tasks in problems.items()} for column in columns}
    whole = {"settings": settings, "limit": options.limit, "results": results, "missing": missing}
    (out / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(report(results, markdown=True) + "\n", encoding="utf-8")
    print(f"{report(results, options.markdown)}\n\nresults.json and results.md  {out}")


def generate_answers(columns, problems, how, folder, settings):
    """{(column, name): rows}: those of answers.jsonl, and new ones, which are added to it as they come."""
    path, kept, rows = folder / "answers.jsonl", folder / "settings.json", defaultdict(list)
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise UsageError(f"{folder} holds answers with other settings (see {kept}); give another --out")
    kept.write_text(json.dumps(settings, indent=1) + "\n")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # none that was cut in the middle
    samples = defaultdict(list)
    for row in map(json.loads, lines):
        samples[row["column"], row["benchmark"], row["id"]].append(row)
    fresh = path.with_suffix(".new")
    with open(fresh, "w") as file:
        for (column, name, _), found in samples.items():
            if len(found) == how.samples:
                rows[column, name] += found
                file.writelines(json.dumps(row) + "\n" for row in found)
    os.replace(fresh, path)
    with open(path, "a", buffering=1) as file:
        for column, load in columns.items():
            done = {name: {row["id"] for row in rows[column, name]} for name in problems}
            if all(problem.id in done[name] for name, tasks in problems.items() for problem in tasks):
                continue
            policy, weights = load()
            with weights:
                for name, tasks in problems.items():
                    for row in answer(policy, name, tasks, how, done[name], column):
                        rows[column, name].append(row)
                        file.write(json.dumps(row) + "\n")
    return rows


def judged(name, problems, rows, executor):
    """The figures of one benchmark's rows; those of problems that are not asked for do not count."""
    known = {problem.id: problem for problem in problems}
    if strangers := [row["id"] for row in rows if row["id"] not in known]:
        print(f"{name}: {len(strangers)} answers to others, as {strangers[0]}, are left out", file=sys.stderr)
    rows = [row for row in rows if row["id"] in known]
    verdicts = judge(name, [known[row["id"]] for row in rows], [row["response"] for row in rows], executor)
    return score(problems, rows, verdicts)


def read_answers(path):
    """The file of --judge → {("answers", benchmark): rows}"""
    found, number = defaultdict(list), 0
    try:
        for number, row in enumerate(read_rows(Path(path)), 1):
            for name in chosen(row["benchmark"]):
                found["answers", name].append({"id": str(row["id"]), "response": str(row["response"] or "")})
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--judge {path}: after line {number}: {error!r}; a line is an object with "
                         "benchmark, id and response") from error
    if not found:
        raise UsageError(f"--judge {path}: there are no answers in it")
    return found


def models(options):
    """→ ({column: a function that loads (policy, context of its weights)}, model's name); fills options."""
    import torch
    from azr import base_weights, load_policy
    run, trained = Path(options.run or ""), {}
    if options.run:
        try:
            trained = json.loads((run / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{run} is not a run folder: cannot read its config.json") from error
        if not {"adapter", "model"} & {path.name for path in run.iterdir()}:
            raise UsageError(f"{run} has no trained weights yet: no folder adapter or model")
    name, adapter = options.model or trained.get("model", "tiny"), options.adapter
    if (run / "adapter").is_dir() and options.run and not adapter:
        adapter = str(run / "adapter")
    if not options.max_response:
        options.max_response = trained.get("max_response", 128 if name in ("tiny", "tiny/longer") else 4096)
    if name in ("tiny", "tiny/longer"):
        torch.set_num_threads(1)  # its matrices are too small for more

    @cache
    def load(source):
        return load_policy(source, options.quantize or trained.get("quantize", "auto"), 1 if adapter else 0,
                           options.dtype, options.device, adapter, rows=options.generate_batch)
    whole = contextlib.nullcontext()
    base, columns = "base" if options.run or adapter else "model", {}
    columns[base] = lambda: (load(name), base_weights(load(name)) if adapter else whole)
    if base == "base":  # with an adapter there is one model in memory
        columns["trained"] = lambda: (load(name if adapter else str(run / "model")), whole)
    return columns, name


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="eval.py", description="Measure a model on benchmarks, base and trained side by side.")
    add = parser.add_argument
    add("--model", help="tiny (shipped, the default), a local folder or a Hugging Face name")
    add("--adapter", help="a PEFT adapter folder: the trained model, beside its base")
    add("--run", help="a run folder of train.py: its model, before and after training")
    add("--benchmarks", help="names and groups with commas; groups are heldout (the default), io "
        "(in-distribution), code, math and all; names are " + ", ".join(BENCHMARKS))
    add("--data", metavar="DIR", help="a folder with the benchmarks' files; default: the Hugging Face hub")
    add("--judge", metavar="FILE", help='judge the answers in it: lines of {"benchmark", "id", "response"}')
    add("--limit", type=int, help="only the first so many tasks of each benchmark")
    add("--template", choices=("azr", "plain", "chat"), default="azr",
        help="azr: the frame of training (default); plain: the question alone; chat: the model's template")
    add("--samples", type=int, default=1, help="answers to each task (1)")
    add("--temperature", type=float, help="0 is greedy, the default for one sample; for more it is 1")
    add("--max-response", type=int, help="tokens of a response; default: as trained, 128 for tiny, else 4096")
    add("--seed", type=int, default=0, help="random seed of sampling (0)")
    add("--heldout", default=str(HELDOUT), help="JSON lines of held-out tasks; default: the tiny model's")
    add("--split", default="easy", help="which split of that file (easy)")
    add("--out", metavar="DIR", help="where answers.jsonl, results.json and results.md go; default: a folder "
        "in runs/ for these very settings, so that the same command goes on where it was stopped")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--quantize", choices=("auto", "4bit", "none"), help="4-bit base weights; default: as trained")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights")
    add("--device", help="cuda, cuda:1, cpu; default: cuda where there is one")
    add("--generate-batch", type=int, default=0, help="responses sampled at once; default: as memory allows")
    add("--workers", type=int, help="sandbox workers; default: all cores")
    options = parser.parse_args(arguments)
    options.temperature = float(options.samples > 1) if options.temperature is None else options.temperature
    for name in ("samples", "limit", "workers", "max_response", "temperature"):
        value, least = getattr(options, name), int(name != "temperature")
        if value is not None and not least <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if options.samples > 1 and not options.temperature:
        raise UsageError(f"--samples {options.samples} at --temperature 0 are all the same answer")
    return options


def main(arguments=None):
    try:
        evaluate(parse(arguments))
    except UsageError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the answers are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
