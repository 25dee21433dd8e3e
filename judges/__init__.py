"""Public benchmarks: what they are called, where they are had, and how answers to them are judged.

    load_benchmarks   {name: [problem]}, from local files or the Hugging Face hub
    judge             [problem], [response] → one {"correct", "base", "well_formed"} for each

A problem has a key, a question, `answer_in(response)` and `judge(problems, answers, executor)`; values.py,
code.py and math.py each have one kind, and the published formats that are read into it.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

from tqdm import tqdm

from executor import Executor
from rewards import reaching_the_hub
from tasks import TASK_TYPES, UsageError

from .code import EVERYTHING, read_contest, read_function
from .math import read_math
from .values import read_execution, read_heldout

TIMEOUT, MEMORY_MB = 10.0, 4096  # of one sandboxed run of a benchmark's tests
# that they need, or that programs import without need
MODULES = ("sys io os random time datetime hashlib threading _thread secrets calendar queue argparse atexit builtins "
           "codecs doctest fileinput gc inspect logging pathlib signal traceback unittest warnings weakref").split()
GROUPS = ("heldout", "io", "code", "math")
FORMATS = {"inputs": partial(read_execution, "abduction"), "outputs": partial(read_execution, "deduction"),
           "function": read_function, "contest": read_contest, "math": read_math,
           "rough": partial(read_math, physical=True)}
# The group heldout is ours; the paper's are io (in-distribution), code and math. Column names: what else a
# benchmark and its files are called, best first. Column files: where the repository does not say which are
# the split. A dash is nothing.
TABLE = """
    name group format repository revision split configuration names files
    CRUXEval-I io inputs cruxeval-org/cruxeval e536997e8381421cb107d285b4ae542aa12c6c31 test - cruxeval -
    CRUXEval-O io outputs cruxeval-org/cruxeval e536997e8381421cb107d285b4ae542aa12c6c31 test - cruxeval -
    LCB-Execution io outputs livecodebench/execution-v2 e3bbac6d5da0043c4a0b4e4f4b678f1f6497cc86 test - \
lcbexec,execution,executionv2 -
    HumanEval+ code function evalplus/humanevalplus d32357cf319e50e9c8d8dab5ea876c72b0fd321b test - \
humaneval data/test-00000-of-00001-5973903632b82d40.parquet
    MBPP+ code function evalplus/mbppplus b2d74c91837c3f2a20c1299ae98133cbe7cfa077 test - mbpp -
    LCB-Generation code contest livecodebench/code_generation_lite 0fe84c3912ea0c4d4a78037083943e8f0c4dd505 \
test - lcb,lcbgen,codegeneration,codegenerationlite test.jsonl,test2.jsonl,test3.jsonl,test4.jsonl,test5.jsonl
    AIME24 math math HuggingFaceH4/aime_2024 2fe88a2f1091d5048c0f36abc874fb997b3dd99a train - - -
    AIME25 math math math-ai/aime25 563bb8404243c5f09de6ec262f2db674fe5bce9b test - - -
    AMC23 math math math-ai/amc23 80815d37005feb82cd7f8fbc6901d5d3eff43057 test - amc -
    MATH500 math math HuggingFaceH4/MATH-500 ff5b20257d8185524591543f8ff5993951537bb8 test - - -
    Minerva math rough math-ai/minervamath ee46ddc498933b1977577953250ca5c66be64f96 test - minervamath -
    OlympiadBench math math Hothan/OlympiadBench 3b426ee1d587c71b495146dde9f3e995ee7ac59f train \
OE_TO_maths_en_COMP olympiad -
"""
# All that the hub's client, parquet, JSON and the formats raise for what cannot be had or is damaged
READING_ERRORS = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
                  ImportError, zlib.error)
KEYS = ("task_id", "unique_id", "id", "idx", "question_id")  # columns of a task's own name


HEAD, *LINES = [line.split() for line in TABLE.strip().split("\n")]
Benchmark = namedtuple("Benchmark", HEAD, defaults=[""] * 7)
BENCHMARKS = {f"heldout-{kind}": Benchmark(f"heldout-{kind}", "heldout") for kind in TASK_TYPES} | {
    name: Benchmark(name, *("" if word == "-" else word for word in words)) for name, *words in LINES}


def squash(text):
    """'AIME 2024' → 'aime24', 'MBPP+' → 'mbppplus'"""
    text = re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus"))
    return re.sub(r"20(?=2\d)", "", text).replace("livecodebench", "lcb")


def aliases(benchmark):
    """What it and its files may be called, best first, squashed."""
    own = squash(benchmark.name)
    return [own, own.removesuffix("plus"), *filter(None, benchmark.names.split(","))]


def named(text):
    """'code,AIME 2024' → the benchmarks' names, in the order of the table. Raises UsageError."""
    names = set()
    for part in map(squash, text.split(",")):
        groups = {"all": GROUPS[1:], "indistribution": ["io"]}.get(part, [part])
        found = [name for name, b in BENCHMARKS.items() if b.group in groups or part in aliases(b)]
        if not found:
            raise UsageError(f"no benchmark {part!r}; there are {', '.join(BENCHMARKS)}, and the "
                             "groups heldout, io (in-distribution), code, math and all")
        names.update(found)
    return [name for name in BENCHMARKS if name in names]


def load_benchmarks(names, data=None, limit=None, heldout=()):
    """→ ({name: [problem]}, {name: why it could not be had})

    data: a folder instead of the hub. limit: the first so many of each. heldout: tasks of the group heldout.
    """
    files, problems, missing = local_files(data) if data else {}, {}, {}
    for name in names:
        benchmark = BENCHMARKS[name]
        if benchmark.group == "heldout":
            tasks = (read_heldout(str(place), task) for place, task in enumerate(heldout)
                     if name.endswith(task.type))
            if found := list(itertools.islice(tasks, limit)):
                problems[name] = found
            else:
                missing[name] = "the held-out tasks have none of this type"
            continue
        try:
            if data and name not in files:
                raise ValueError("no file there has its name")
            rows = itertools.chain.from_iterable(map(read_rows, files[name])) if data else hub_rows(benchmark)
            read, found = FORMATS[benchmark.format], []
            for place, row in enumerate(itertools.islice(rows, limit)):
                key = next((row[column] for column in KEYS if column in row), place)
                found.append(read(str(key), row))
            if not found:
                raise ValueError("there are no tasks in it")
            problems[name] = found
        except READING_ERRORS as error:
            reason = (f"a task lacks {error}" if isinstance(error, KeyError) else str(error)).split("\n")[0]
            missing[name] = (
                f"{reason}\n  Get it with: hf download --repo-type dataset {benchmark.repository} --revision "
                f"{benchmark.revision} --local-dir DIR/{aliases(benchmark)[-1]}\n  and give --data DIR "
                "(JSON lines or parquet; the name of a file or of its folder says whose it is)")
    return problems, missing


def local_files(data):
    """{benchmark: its files}: whose a file is, the last name of a benchmark in its path says."""
    if not Path(data).is_dir():
        raise UsageError(f"--data {data}: no such folder")
    names = sorted({alias for benchmark in BENCHMARKS.values() for alias in aliases(benchmark)}, key=len)
    files = defaultdict(list)
    for path in sorted(Path(data).rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            place = str(Path(data).resolve().name / path.relative_to(data)).split(".jsonl")[0]
            for name in re.findall("|".join(names[::-1]), squash(place))[-1:]:
                files[name].append(path)
    return {name: files[alias] for name, benchmark in BENCHMARKS.items()
            for alias in aliases(benchmark)[::-1] if alias in files}  # the best is the last to be set


def hub_rows(benchmark):
    """The rows of a benchmark from the Hugging Face hub."""
    with reaching_the_hub() as datasets:
        if not benchmark.files:
            return datasets.load_dataset(benchmark.repository, benchmark.configuration or None,
                                         split=benchmark.split, revision=benchmark.revision)
        from huggingface_hub import hf_hub_download
        paths = [hf_hub_download(benchmark.repository, file, repo_type="dataset", revision=benchmark.revision)
                 for file in benchmark.files.split(",")]
    return itertools.chain.from_iterable(read_rows(Path(path)) for path in paths)


def read_rows(path):
    """The rows of a file: parquet, JSON lines, or these compressed."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def sandbox(workers=None):
    """For benchmarks, whose tests and solutions need more modules, time and room than AZR's own tasks."""
    return Executor(workers, TIMEOUT, MEMORY_MB, allow=MODULES, max_text=EVERYTHING)


def judge(problems, responses, executor, label=""):
    """[problem] of one benchmark, [response] → [{"correct", "base", "well_formed"}], in order.

    base: whether the benchmark's base tests pass; not there or None where it has none.
    """
    answers = [problem.answer_in(response.replace("\r\n", "\n"))
               for problem, response in zip(problems, responses, strict=True)]
    verdicts, size = [], problems[0].batch if problems else 1
    for start in tqdm(range(0, len(problems), size), f"{label}: judge", leave=False, dynamic_ncols=True):
        chunk = slice(start, start + size)
        verdicts += problems[0].judge(problems[chunk], answers[chunk], executor)
    return [verdict | {"well_formed": answer is not None} for verdict, answer in zip(verdicts, answers)]
