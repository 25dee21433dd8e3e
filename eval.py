"""Measure a model: python eval.py

Alone it measures the shipped model on the shipped held-out tasks. `--run RUN` puts a trained model beside its
base, and `--benchmarks code,math` takes the paper's benchmarks (judges/__init__.py lists them).
`--judge FILE --data DIR` judges answers that were made elsewhere, and loads no model.

The path of an answer: load_benchmarks → problem → question → answers.jsonl → judge → results.json and tables.
Model text runs in the sandbox and nowhere else; mathematics is parsed in a process of its own.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import statistics
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import judges
from judges import BENCHMARKS, GROUPS, judge, load_benchmarks, named, sandbox
from report import checked, layout, read_config, read_rows, replace_file, table
from rewards import load_heldout, mean_error
from tasks import FRAME, UsageError, solve_prompt

# What a line of answers.jsonl, a line of a file for --judge, and a run's config.json must have
ANSWER = {"column": str, "benchmark": str, "id": str, "response": str, "tokens": int, "truncated": bool}
FOREIGN = {"benchmark": str, "id": (str, int), "response": (str, type(None))}
CONFIG = {"model": str, "quantize": str, "max_response": int, "heldout": str}
FILES = "settings.json answers.jsonl results.json results.md".split()
RANGES = {"samples": (1, 10_000), "limit": (1, 1_000_000_000), "workers": (1, 512),
          "max_response": (1, 1_000_000), "temperature": (0, 100), "generate_batch": (0, 1_000_000),
          "seed": (0, sys.maxsize)}
DETAILS = "n unanswered samples pass@k base_tests well_formed truncated response_tokens".split()
SETTINGS = ("judge model run adapter template samples temperature seed max_response heldout split quantize "
            "dtype").split()  # that decide what the answers are


# --- figures ----------------------------------------------------------------------------------------

def pass_at_k(n, correct, k):
    """The chance that k of n samples, drawn without replacement, hold a correct one: unbiased.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def paired_difference(before, after):
    """(mean, standard error) of after − before over the same problems: {key: [correct]} each."""
    return mean_error([statistics.fmean(hits) - statistics.fmean(before[key]) for key, hits in after.items()])


def score(problems, rows):
    """The figures of one benchmark from rows with verdicts. A problem without one counts as wrong."""
    samples = defaultdict(list)
    for row in rows:
        samples[row["id"]].append(row)
    n = min(map(len, samples.values()), default=1)
    has_base = any(row.get("base") is not None for row in rows)
    wrong = [{"correct": False, "base": False if has_base else None, "well_formed": False}] * n
    answers = {problem.key: samples.get(problem.key, wrong) for problem in problems}
    correct = {key: [verdict["correct"] for verdict in tries] for key, tries in answers.items()}
    passes = {k: mean_error([pass_at_k(len(hits), sum(hits), k) for hits in correct.values()])
              for k in sorted({n, *(2 ** i for i in range(n.bit_length()))})}

    def share(name, items):
        """(mean, standard error) over problems, whose samples are not independent; None if nothing says."""
        means = [statistics.fmean(item[name] for item in tries) for tries in items.values()
                 if tries[0].get(name) is not None]
        return mean_error(means) if means else None

    return {"accuracy": passes[1][0], "stderr": passes[1][1], "n": len(answers), "samples": n,
            "unanswered": len(answers) - len(samples), "pass@k": passes,
            "base_tests": share("base", answers), "well_formed": share("well_formed", answers),
            "truncated": share("truncated", samples), "response_tokens": share("tokens", samples),
            "correct": correct}


def tables(results, markdown=False):
    """{column: {benchmark: score}} as two tables: accuracies side by side, and all other figures."""
    columns = {column: {name: score["pass@k"][1] for name, score in scores.items()}
               for column, scores in results.items()}
    if len(results) == 2:
        before, after = results.values()
        columns["difference"] = {name: paired_difference(s["correct"], after[name]["correct"])
                                 for name, s in before.items()}
    names = list(next(iter(results.values())))
    groups = {group: [name for name in names if BENCHMARKS[name].group == group] for group in GROUPS}
    means = {f"mean of {group}": members for group, members in groups.items() if len(members) > 1}
    lines = [["", "model", *(key.replace("_", " ") for key in DETAILS)]]
    lines += [[name, column, *(cell(key, scores[name][key]) for key in DETAILS)]
              for name in names for column, scores in results.items()]
    return f'{table(columns, "pass@1, %", means, markdown)}\n\n{layout(lines, markdown)}'


def cell(key, figure):
    """A figure as text: shares in percent, lengths as they are."""
    if isinstance(figure, dict):
        return ", ".join(f"{k}: {cell(key, share)}" for k, share in figure.items())
    if isinstance(figure, tuple):
        mean, error = figure
        if key == "response_tokens":
            return f"{mean:.0f} ± {error:.0f}"
        return f"{100 * mean:.1f} ± {100 * error:.1f}%"
    return "–" if figure is None else figure


# --- answers ----------------------------------------------------------------------------------------

def encode(policy, question, template, task=None):
    """A question as token ids, by one of four templates, the same for the base and the trained model.

    azr: training's long frame, which ends in <think>; examples: training's frame of worked examples, if the
    problem is a Task, and never a chat template; plain: the question and an empty line; chat: the model's own
    chat template around the question.
    """
    if template == "examples":
        question = solve_prompt(task, "examples") if task else question
        return policy.tokenizer(FRAME.replace("{question}", question)).input_ids
    if template == "azr":
        return policy.encode(question)
    if template == "plain":
        return policy.tokenizer(question + "\n\n").input_ids
    if not policy.chat:
        raise UsageError("--template chat: this model has no chat template; use azr or plain")
    text = policy.tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                add_generation_prompt=True)
    return policy.tokenizer(text, add_special_tokens=False).input_ids


def sample(loaded, source, column, name, problems, options):
    """Yields rows of answers.jsonl, `options.samples` a problem, in chunks that have their own seed."""
    from parallel import of_first
    size = max(1, 128 // options.samples)
    for start in tqdm(range(0, len(problems), size), f"{name}: {column}", leave=False, dynamic_ncols=True):
        chunk = problems[start:start + size]
        seed = zlib.crc32(f"{options.seed} {name} {chunk[0].key}".encode())
        for place, rollout in enumerate(answer(loaded, *of_first((options, source, column, chunk, seed)))):
            yield {"column": column, "benchmark": name, "id": chunk[place // options.samples].key,
                   "response": rollout.response, "tokens": len(rollout.response_ids),
                   "truncated": rollout.truncated}


def answer(loaded, options, source, column, problems, seed):
    """`options.samples` responses to each problem, of which each rank makes its share. → [Rollout]"""
    import torch

    import azr
    from parallel import rank, spread
    policy = load(loaded, source, options)
    torch.manual_seed(seed + rank())
    asked = [azr.Rollout("solve", "", encode(policy, problem.question, options.template,
                                             getattr(problem, "task", None))) for problem in problems]
    how = options.max_response, options.samples, not options.temperature, options.temperature or 1.0
    try:
        is_switched_off = column == "base" and source[1]  # the adapter
        with policy.model.disable_adapter() if is_switched_off else contextlib.nullcontext():
            return spread(asked, lambda mine: azr.sample(policy, mine, *how))
    except torch.OutOfMemoryError as error:
        raise MemoryError("out of GPU memory; go on with a smaller --generate-batch") from error


def generate_answers(columns, problems, options, folder):
    """{(column, benchmark): rows}: those that the folder holds, and new ones, which it gets as they come."""
    rows, loaded = folder.answers(options.samples), {}
    for column, source in columns.items():
        for name, tasks in problems.items():
            done = {row["id"] for row in rows[column, name]}
            todo = [problem for problem in tasks if problem.key not in done]
            if not todo:
                continue
            # a model or a template that cannot be had is refused before anything is written
            encode(load(loaded, source, options), "", options.template)
            folder.start()
            with open(folder.path / "answers.jsonl", "a", buffering=1) as file:
                for row in sample(loaded, source, column, name, todo, options):
                    rows[column, name].append(row)
                    file.write(json.dumps(row) + "\n")
    return rows


def load(loaded, source, options):
    """The policy of (model, adapter), kept in `loaded`: one alone, since two may not fit into memory."""
    from azr import load_policy
    if source not in loaded:
        model, adapter = source
        loaded.clear()
        loaded[source] = load_policy(model, options.quantize, 1 if adapter else 0, options.dtype,
                                     options.device, adapter, rows=options.generate_batch, trained=False)
    return loaded[source]


def follow():
    """What a rank behind the first does: its share of each request, until there is none."""
    from parallel import of_first
    loaded = {}
    while request := of_first(None):
        answer(loaded, *request)


def evaluate_together(options):
    """`evaluate` by the ranks that torchrun has started."""
    import parallel
    with parallel.joined():
        if parallel.rank() > 0:
            return follow()
        try:
            evaluate(options)
        finally:
            parallel.of_first(None)


def read_answers(path):
    """The file of --judge → {("answers", benchmark): rows}. Raises UsageError."""
    rows, found = [], defaultdict(list)
    try:
        for row in judges.read_rows(Path(path)):
            rows.append(checked(row, FOREIGN))
    except (OSError, EOFError, KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise UsageError(f"cannot read line {len(rows) + 1} of {path}: {str(error) or type(error).__name__}; "
                         f"a line is an object with {', '.join(FOREIGN)}") from error
    for row in rows:
        for name in named(row["benchmark"]):
            found["answers", name].append({"id": str(row["id"]), "response": row["response"] or ""})
    if not found:
        raise UsageError(f"--judge {path}: there are no answers in it")
    return found


@contextlib.contextmanager
def locked(path):
    """A folder, made if need be, that no second evaluation enters; if it stays empty it is removed again."""
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--out {path}: there is a file of that name") from error
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        yield
    except BlockingIOError as error:
        raise UsageError(f"another evaluation uses {path}; wait for it, or give another --out") from error
    finally:
        os.close(lock)
        if is_new and not any(path.iterdir()):
            path.rmdir()


@dataclass(frozen=True)
class Folder:
    """An evaluation's folder: settings.json, answers.jsonl (as they come), results.json and results.md."""

    path: Path
    settings: str  # what settings.json holds

    def check(self):
        """Raises UsageError if the folder holds what is not of these settings."""
        held = [path for path in map(self.path.joinpath, FILES) if path.exists()]  # settings.json comes first
        if held and held[0].read_bytes() != self.settings.encode():
            raise UsageError(f"{self.path} holds answers with other settings (see settings.json there), or "
                             "files that are not from eval.py; give another --out")

    def start(self):
        self.replace("settings.json", self.settings)

    def answers(self, samples):
        """{(column, benchmark): rows} of the problems that have all their samples; others are asked again."""
        path, groups, kept = self.path / "answers.jsonl", defaultdict(list), defaultdict(list)
        for row in read_rows(path, ANSWER):
            groups[row["column"], row["benchmark"], row["id"]].append(row)
        for (column, name, _), rows in groups.items():
            if len(rows) == samples:
                kept[column, name] += rows
        if path.exists():
            self.replace(path.name, "".join(json.dumps(row) + "\n" for rows in kept.values() for row in rows))
        return kept

    def replace(self, name, text):
        replace_file(self.path / name, text.encode())


# --- an evaluation ----------------------------------------------------------------------------------

def evaluate(options):
    given = read_answers(options.judge) if options.judge else {}
    if not given:
        fill_in(options)
    names = named(options.benchmarks or ",".join(name for _, name in given) or "heldout")
    with sandbox(options.workers) as executor:
        tasks = heldout(names, options, executor)
        problems, missing = load_benchmarks(names, options.data, options.limit, tasks)
        for name, reason in missing.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        if not problems:
            raise UsageError("no benchmark data found, for the reasons above")
        settings = {name: getattr(options, name) for name in SETTINGS}
        settings["contents"] = contents(options, tasks)
        stem = Path(options.judge or options.run or options.model).stem
        out = Path(options.out or f"runs/eval-{stem}-{zlib.crc32(json.dumps(settings).encode()):08x}")
        with locked(out):
            folder = Folder(out, json.dumps(settings, indent=1) + "\n")
            folder.check()
            columns = {"answers": None} if given else columns_of(options)
            rows = given or generate_answers(columns, problems, options, folder)
            results = {column: {name: judged(name, tasks, rows.get((column, name), []), executor)
                                for name, tasks in problems.items()} for column in columns}
            folder.start()
            whole = {"settings": settings, "limit": options.limit, "results": results, "missing": missing}
            folder.replace("results.json", json.dumps(whole, indent=1) + "\n")
            folder.replace("results.md", tables(results, markdown=True) + "\n")
    print(f"{tables(results, options.markdown)}\n\nresults.json and results.md  {out}")


def heldout(names, options, executor):
    """The held-out tasks that the group heldout needs; a user's own are checked. Raises UsageError."""
    if not any(BENCHMARKS[name].group == "heldout" for name in names):
        return []
    splits = load_heldout(options.heldout or "tiny", executor=executor)
    split = options.split or ("easy" if "easy" in splits else next(iter(splits), "easy"))
    if split not in splits:
        raise UsageError(f"--split {split}: the held-out tasks have the splits {', '.join(splits)}")
    return splits[split]


def judged(name, problems, rows, executor):
    """The figures of one benchmark's rows; those of problems that are not asked for do not count."""
    known = {problem.key: problem for problem in problems}
    if strangers := [row["id"] for row in rows if row["id"] not in known]:
        print(f"{name}: {len(strangers)} answers to problems that were not asked, such as {strangers[0]!r}, "
              "do not count", file=sys.stderr)
    rows = [row for row in rows if row["id"] in known]
    verdicts = judge([known[row["id"]] for row in rows], [row["response"] for row in rows], executor, name)
    return score(problems, [row | verdict for row, verdict in zip(rows, verdicts, strict=True)])


def fill_in(options):
    """Options that were not given: as the run was trained, else what suits the model. Raises UsageError."""
    config = {"model": "tiny", "quantize": "auto"}
    if options.run:
        run = Path(options.run)
        config = read_config(run, CONFIG)
        if (run / "adapter").is_dir():
            options.adapter = options.adapter or str(run / "adapter")
        elif not (run / "model").is_dir():
            raise UsageError(f"{run} has no trained weights yet: there is no folder adapter or model in it")
    for name in CONFIG:
        setattr(options, name, getattr(options, name) or config.get(name))
    options.template = options.template or ("examples" if config.get("frame") == "examples" else "azr")
    options.max_response = options.max_response or (128 if options.model in ("tiny", "tiny/longer") else 4096)


def contents(options, tasks):
    """Checksums of the trained weights and of the held-out tasks' file: with others, answers are others."""
    paths = {"trained": options.adapter or options.run and f"{options.run}/model",
             "heldout": options.heldout if tasks else None}
    no_files = (None, "tiny", "cruxeval")
    return {name: checksum(Path(path)) for name, path in paths.items() if path not in no_files}


def checksum(path):
    """crc32 over a file, or over all files of a folder."""
    total = 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as lines:
                while chunk := lines.read(2 ** 24):
                    total = zlib.crc32(chunk, total)
    return total


def columns_of(options):
    """{column: (model to load, adapter or None)}; in the column base the adapter is switched off."""
    model, adapter = options.model, options.adapter
    if not (options.run or adapter):
        return {"model": (model, None)}
    return {"base": (model, adapter),
            "trained": (model if adapter else str(Path(options.run) / "model"), adapter)}


# --- the command line -------------------------------------------------------------------------------

def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="eval.py", description="Measure a model on benchmarks, base and trained side by side.")
    add = parser.add_argument
    add("--model", help="tiny (shipped, the default), a local folder or a Hugging Face name")
    add("--adapter", help="a PEFT adapter folder: the trained model, beside its base")
    add("--run", help="a run folder of train.py: its model, before and after training")
    add("--benchmarks", help="names and groups with commas; groups are heldout (the default), io "
        "(in-distribution), code, math and all (of these three); names are " + ", ".join(BENCHMARKS))
    add("--data", metavar="DIR", help="a folder with the benchmarks' files; default: the Hugging Face hub")
    add("--judge", metavar="FILE", help='judge the answers in it: lines of {"benchmark", "id", "response"}')
    add("--limit", type=int, help="only the first so many tasks of each benchmark")
    add("--template", choices=("azr", "examples", "plain", "chat"),
        help="azr: training's --frame long (default); examples: its --frame examples (default for a run that "
             "had it); plain: the question alone; chat: the model's template")
    add("--samples", type=int, default=1, help="answers to each task (1)")
    add("--temperature", type=float, help="0 is greedy, the default for one sample; for more it is 1")
    add("--max-response", type=int, help="tokens of a response; default: as trained, 128 for tiny, else 4096")
    add("--seed", type=int, default=0, help="random seed of sampling (0)")
    add("--heldout", metavar="FILE", help="held-out tasks: JSON lines, tiny, or cruxeval; default: the run's")
    add("--split", help="which split of them; default: easy, else the first")
    add("--out", metavar="DIR", help="where answers.jsonl, results.json and results.md go; default: a folder "
        "in runs/ for these very settings, so that the same command goes on where it was stopped")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--quantize", choices=("auto", "4bit", "none"), help="4-bit base weights; default: the run's, else "
        "auto: on a GPU, with an adapter")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights")
    add("--device", help="cuda, cuda:1 or cpu; default: cuda where there is one")
    add("--generate-batch", type=int, default=0, help="responses sampled at once; 0: as memory allows")
    add("--workers", type=int, help="sandbox workers; default: all cores")
    return check(parser.parse_args(arguments))


def check(options):
    """The options, with the temperature set. Raises UsageError for values that cannot work."""
    if options.temperature is None:
        options.temperature = float(options.samples > 1)
    for name, value in vars(options).items():
        flag, (low, high) = "--" + name.replace("_", "-"), RANGES.get(name, (0, 0))
        if value == "":
            raise UsageError(f"{flag} is empty; give it a value or leave it out")
        if name in RANGES and value is not None and not low <= value <= high:
            raise UsageError(f"{flag} is {value}; it must be between {low} and {high}")
    if options.samples > 1 and not options.temperature:
        raise UsageError(f"--samples {options.samples} at --temperature 0 are all the same answer")
    return options


def main(arguments=None):
    try:
        run = evaluate_together if int(os.environ.get("WORLD_SIZE", 1)) > 1 else evaluate
        run(parse(arguments))
    except UsageError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the answers are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    except (OSError, MemoryError) as error:
        print(f"eval.py: {error or 'out of memory'}; the answers so far are kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
