"""Public benchmarks: their names, their sources, and the judges of their answers.

    load_benchmarks   {name: [problem]}, from local files or the Hugging Face hub
    judge             [problem], [response] → one {"correct", "base", "well_formed"} for each

A problem has a key, a question, `answer_in(response)` and `judge(problems, answers, executor)`. values.py,
code.py and math.py each have one kind of problem, and readers of the published formats.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

from tqdm import tqdm

from executor import Executor
from tasks import UsageError

from .code import EVERYTHING, read_contest, read_function
from .math import read_math
from .values import read_execution, read_heldout

# modules that benchmarks need, or that programs import without need
MODULES = """sys io os random time datetime hashlib threading _thread secrets calendar queue argparse atexit
    builtins codecs doctest fileinput gc inspect logging pathlib signal traceback unittest warnings
    weakref""".split()
GROUPS = "heldout io code math".split()
FORMATS = {"inputs": partial(read_execution, "abduction"), "outputs": partial(read_execution, "deduction"),
           "function": read_function, "contest": read_contest, "math": read_math,
           "physics": partial(read_math, physical=True)}
# Errors that the hub's client, parquet, JSON and the formats raise for data that is unavailable or damaged
READING_ERRORS = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
                  ImportError, zlib.error)
KEYS = "task_id unique_id id idx question_id".split()  # columns that may hold a task's id


# group: heldout is ours. io (in-distribution), code and math are the paper's. groups: words that select it
# together with others. names: squashed names of it and its files, best first. files: those of the split, if
# the repository does not say which they are.
Benchmark = namedtuple(
    "Benchmark", "name group groups names format repository revision split configuration files")
BENCHMARKS = {row["name"]: Benchmark(**row)
              for row in json.loads(Path(__file__).with_name("benchmarks.json").read_text())}


def squash(text):
    """'AIME 2024' → 'aime24', 'MBPP+' → 'mbppplus'"""
    return re.sub(r"[^a-z0-9]|20(?=2\d)", "", text.lower().replace("+", "plus"))


def named(text):
    """'code,AIME 2024' → the benchmarks' names, in the order of the table. Raises UsageError."""
    names = set()
    for part in map(squash, text.split(",")):
        found = [name for name, b in BENCHMARKS.items() if part in b.groups + b.names]
        if not found:
            raise UsageError(f"no benchmark {part!r}; there are {', '.join(BENCHMARKS)}, and the "
                             "groups heldout, io (in-distribution), code, math and all")
        names.update(found)
    return [name for name in BENCHMARKS if name in names]


def load_benchmarks(names, data=None, limit=None, heldout=()):
    """→ ({name: [problem]}, {name: the reason why it is not available})

    data: a folder instead of the hub. limit: the first N of each. heldout: tasks of the group heldout.
    """
    files, problems, missing = local_files(data) if data else None, {}, {}
    for name in names:
        benchmark, reason = BENCHMARKS[name], "there are no tasks in it"
        try:
            found = [*itertools.islice(read_problems(benchmark, files, heldout), limit)]
        except READING_ERRORS as error:
            found, text = [], str(error).split("\n")[0]
            reason = f"a task lacks {text}" if isinstance(error, KeyError) else text
        if found:
            problems[name] = found
        elif benchmark.group == "heldout":
            missing[name] = "the held-out tasks have none of this type"
        else:
            missing[name] = f"""{reason}
  Get it with: hf download --repo-type dataset {benchmark.repository} --revision \
{benchmark.revision} --local-dir DIR/{benchmark.names[-1]}
  and give --data DIR (JSON lines or parquet; the name of a file or of its folder says whose it is)"""
    return problems, missing


def read_problems(benchmark, files, heldout):
    """Yields a benchmark's problems: from its files (None: the hub), or the held-out tasks of its type."""
    if benchmark.group == "heldout":
        for place, task in enumerate(heldout):
            if benchmark.name.endswith(task.type):
                yield read_heldout(str(place), task)
        return
    if files is not None and benchmark.name not in files:
        raise ValueError("no file there has its name")
    rows = hub_rows(benchmark) if files is None else map(read_rows, files[benchmark.name])
    for place, row in enumerate(itertools.chain.from_iterable(rows)):
        key = next((row[column] for column in KEYS if column in row), place)
        yield FORMATS[benchmark.format](str(key), row)


def local_files(data):
    """{benchmark: its files}. A file belongs to the benchmark whose name comes last in the file's path."""
    data = Path(data)
    if not data.is_dir():
        raise UsageError(f"--data {data}: no such folder")
    names = sorted(itertools.chain(*(b.names for b in BENCHMARKS.values())), key=len, reverse=True)
    files, found = {}, {}
    for path in sorted(data.rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            place = squash(str(data.resolve().name / path.relative_to(data)))
            for name in re.findall("|".join(names), place)[-1:]:
                files.setdefault(name, []).append(path)
    for benchmark in BENCHMARKS.values():
        for alias in filter(files.get, benchmark.names):
            found.setdefault(benchmark.name, files[alias])
    return found


def hub_rows(benchmark):
    """The rows of a benchmark from the Hugging Face hub, in parts."""
    from azr import reaching_the_hub  # here, because judging local files needs no model
    with reaching_the_hub() as datasets:
        if not benchmark.files:
            return [datasets.load_dataset(benchmark.repository, benchmark.configuration,
                                          split=benchmark.split, revision=benchmark.revision)]
        from huggingface_hub import hf_hub_download
        return [read_rows(Path(hf_hub_download(benchmark.repository, file, repo_type="dataset",
                                               revision=benchmark.revision))) for file in benchmark.files]


def read_rows(path):
    """The rows of a file: parquet, JSON lines, or these compressed."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64):
            yield from batch.to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, filter(str.strip, lines))


def sandbox(workers=None):
    """For benchmarks, whose tests and solutions need more modules, memory and text than AZR's own tasks."""
    return Executor(workers, timeout=10.0, memory_mb=4096, allow=MODULES, max_text=EVERYTHING)


def judge(problems, responses, executor, label=""):
    """[problem] of one benchmark, [response] → [{"correct", "base", "well_formed"}], in order.

    base: whether the benchmark's base tests pass (missing or None if it has none).
    """
    answers = [problem.answer_in(response.replace("\r\n", "\n"))
               for problem, response in zip(problems, responses, strict=True)]
    verdicts, size = [], problems[0].batch if problems else 1
    for start in tqdm(range(0, len(problems), size), f"{label}: judge", leave=False):
        chunk = slice(start, start + size)
        verdicts += problems[0].judge(problems[chunk], answers[chunk], executor)
    return [verdict | {"well_formed": answer is not None} for verdict, answer in zip(verdicts, answers)]
