"""Measure a model: python eval.py

Without options it measures the shipped model on the shipped held-out tasks. `--run RUN` compares a trained
model with its base, and `--benchmarks code,math` takes the paper's benchmarks (judges/__init__.py has them).
`--judge FILE --data DIR` judges answers that were made elsewhere, and loads no model.

    evaluate          benchmarks, answers, verdicts, results.json
    generate_answers  answers.jsonl, benchmark by benchmark
    encode            a problem as a prompt, by one of five templates
    score, tables     accuracy, pass@k, base and trained side by side

Formats and judges are in judges/. Model text runs only in the sandbox. Mathematics is parsed in a separate
process.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

import judges
from judges import BENCHMARKS, GROUPS, judge, load_benchmarks, named, sandbox
from run import (average, checked, flag, layout, printable_output, read_config, read_rows, replace_file,
                 table)
from rewards import mean_error
from tasks import UsageError, solve_prompt

# Fields of a line of answers.jsonl, of a line of a file for --judge, and of a run's config.json
ANSWER = dict.fromkeys("column benchmark id question response".split(), str) | {
    "tokens": int, "truncated": bool}
FOREIGN = {"benchmark": str, "id": (str, int), "response": (str, type(None))}
CONFIG = {"model": str, "quantize": str, "max_response": int, "heldout": str}
FILES = "settings.json answers.jsonl results.json".split()
FREE = "benchmarks workers generate_batch out".split()  # options that do not affect the answers
COUNTS = "n unanswered samples".split()
MEANS = "base well_formed truncated tokens".split()  # base: correct by the tests of HumanEval and MBPP alone
EXAMPLE_FRAMES = "examples", "brief"  # of training, with worked examples
CHUNK = 128  # problems between two steps of the progress bar


# --- figures ----------------------------------------------------------------------------------------
# Samples of one problem are not independent, so means and errors are taken over problems.

def pass_at_k(n, correct, k):
    """Unbiased pass@k: the probability that k of n samples, drawn without replacement, include a correct one.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def paired_difference(before, after):
    """(mean, standard error) of after − before over the same problems: {key: [correct]} each."""
    return mean_error([statistics.fmean(hits) - statistics.fmean(before[key]) for key, hits in after.items()])


def score(problems, rows):
    """The figures of one benchmark: accuracy with its standard error, pass@k, counts, means over the rows.

    rows: answers to these problems, with their verdicts. A problem without an answer counts as wrong. A mean
    is None if no row has this value.
    """
    hits = defaultdict(list)
    for row in rows:
        hits[row["id"]].append(row["correct"])
    n = min(map(len, hits.values()), default=1)
    correct = {problem.key: hits.get(problem.key, [False] * n) for problem in problems}
    passes = {}
    for k in sorted({n, *(2 ** i for i in range(n.bit_length()))}):
        passes[k] = mean_error([pass_at_k(len(tries), tries.count(True), k) for tries in correct.values()])
    accuracy, error = passes[1]
    means = {name: average(row.get(name) for row in rows) for name in MEANS}
    return {"accuracy": accuracy, "stderr": error, "n": len(correct), "samples": n,
            "unanswered": len(correct) - len(hits), "pass@k": passes, "correct": correct, **means}


# --- tables -----------------------------------------------------------------------------------------

def tables(results):
    """{column: {benchmark: score}} as two tables: accuracies side by side, and all other figures."""
    columns, means, details = {}, {}, [["", "model", "pass@k", *COUNTS, *MEANS]]
    for column, scores in results.items():
        columns[column] = {name: figures["pass@k"][1] for name, figures in scores.items()}
    if {"base", "trained"} <= results.keys():
        base, trained = results["base"], results["trained"]
        columns["difference"] = {name: paired_difference(base[name]["correct"], trained[name]["correct"])
                                 for name in base}
    for group in GROUPS:
        members = [name for name in scores if BENCHMARKS[name].group == group]
        if len(members) > 1:
            means[f"mean of {group}"] = members
    for name in scores:
        for column in results:
            figures = results[column][name]
            passes = ", ".join(f"{k}: {share:.1%}" for k, (share, _) in figures["pass@k"].items())
            row = [name, column, passes]
            for key in (*COUNTS, *MEANS):
                row.append("–" if figures[key] is None else round(figures[key], 3))
            details.append(row)
    return f'{layout(table(columns, "pass@1, %", means))}\n\n{layout(details)}'


# --- answers ----------------------------------------------------------------------------------------

def encode(policy, problem, template, think=None):
    """A problem's question as token ids, the same for the base and the trained model.

    azr: training's long frame, which ends in <think>. examples, brief: training's frames of worked examples,
    if the problem is a Task (`policy` was loaded with the frame that it needs). plain: the question and an
    empty line. chat: the model's own chat template around the question. think: the template's
    enable_thinking, which templates without that switch ignore. Raises UsageError without a chat template.
    """
    question = problem.question
    if template == "plain":
        return policy.encode_text(question + "\n\n")
    if template == "chat":
        if not policy.chat:
            raise UsageError("--template chat: this model has no chat template; use azr or plain")
        text = policy.chat_text(question, thinking=think)
        return policy.tokenizer(text, add_special_tokens=False).input_ids
    if template in EXAMPLE_FRAMES and hasattr(problem, "task"):
        question = solve_prompt(problem.task, template)
    return policy.encode(question)


def generate_answers(problems, options, out, settings):
    """Answers of every column to every benchmark. → {(column, benchmark): rows of answers.jsonl}

    A benchmark is written once all its questions are answered, and is not sampled again. One that was
    interrupted before that is sampled again from the start.
    """
    from model import load_policy
    answers = defaultdict(list)
    for row in read_rows(out / "answers.jsonl", ANSWER):
        answers[row["column"], row["benchmark"]].append(row)
    for column, model in options.columns.items():
        policy = None  # freed before the next is loaded, because two may not fit into memory
        for name, tasks in problems.items():
            questions = [problem.question for problem in tasks] * options.samples
            if sorted(questions) == sorted(row["question"] for row in answers[column, name]):
                continue  # already answered
            if not policy:
                policy = load_policy(
                    model, options.quantize, 0, options.dtype, options.device, options.adapter,
                    trained=False, frame=options.template if options.template in EXAMPLE_FRAMES else "long")
                if column == "base" and options.adapter:
                    policy.model.base_model.disable_adapter_layers()
            answers[column, name] = sample(policy, column, name, tasks, options)
            lines = []
            for rows in answers.values():
                lines += [json.dumps(row) + "\n" for row in rows]
            replace_file(out / "settings.json", settings)
            replace_file(out / "answers.jsonl", "".join(lines).encode())
    return answers


def sample(policy, column, name, problems, options):
    """`options.samples` answers to each problem of a benchmark, next to each other. → rows of answers.jsonl

    The seed is set, and the sampler made, for this benchmark alone. Therefore its answers do not depend on
    the benchmarks before it.
    """
    from sampling import Sampler
    sampler, rows = Sampler(policy, options.generate_batch), []
    torch.manual_seed(options.seed)
    for start in tqdm(range(0, len(problems), CHUNK), f"{name}: {column}", leave=False):
        chunk = problems[start:start + CHUNK]
        prompts = [encode(policy, problem, options.template, options.think) for problem in chunk]
        responses = sampler.generate(prompts, options.max_response, options.samples, options.temperature)
        for place, (ids, _) in enumerate(responses):
            problem, text = chunk[place // options.samples], policy.text(ids)
            has_ended = ids[-1] in policy.end_ids or "</answer>" in text
            rows.append({"column": column, "benchmark": name, "id": problem.key, "question": problem.question,
                         "response": text, "tokens": len(ids), "truncated": not has_ended})
    return rows


def read_answers(path):
    """The file of --judge → {("answers", benchmark): rows}. Raises UsageError."""
    answers, lines = defaultdict(list), 0
    try:
        for row in judges.read_rows(Path(path)):
            checked(row, FOREIGN)
            for name in named(row["benchmark"]):
                answers["answers", name].append({"id": str(row["id"]), "response": row["response"] or ""})
            lines += 1
    except judges.READING_ERRORS as error:
        raise UsageError(f"cannot read line {lines + 1} of {path}: {str(error) or type(error).__name__}; "
                         f"a line is an object with {', '.join(FOREIGN)}") from error
    if not answers:
        raise UsageError(f"--judge {path}: there are no answers in it")
    return answers


# --- the folder -------------------------------------------------------------------------------------

@contextlib.contextmanager
def held(out, settings):
    """Lock the folder of an evaluation with these settings. A folder that stays empty is removed again.

    The kernel releases the lock of a killed process. The lock file then stays, but blocks nobody. Raises
    UsageError if the folder is in use, or has files of other settings or of another program.
    """
    lock = filelock.FileLock(out / "lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UsageError(f"cannot use the folder {out}: {error}; give another --out, or wait if another "
                         "evaluation is at work there") from error
    try:
        present = [path for path in map(out.joinpath, FILES) if path.exists()]  # settings.json is the first
        if present and present[0].read_bytes() != settings:
            raise UsageError(f"{out} holds answers with other settings (see settings.json there), or files "
                             "that are not from eval.py; give another --out")
        yield
    finally:
        (out / "lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):  # it is not empty
            out.rmdir()


def settings_of(options):
    """The settings that must match for answers to be kept: options, and change times of the weights' files.

    Change times, because further training rewrites these files, whereas a checksum of a large model would
    take as long as loading it. A name on the hub has no local files, and counts as one model. → JSON
    """
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings["changed"] = {}
    for folder in filter(None, [*options.columns.values(), options.adapter]):
        for path in sorted(Path(folder).glob("[!.]*.*")):
            settings["changed"][str(path)] = path.stat().st_mtime_ns
    return to_json(settings)


def to_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


# --- an evaluation ----------------------------------------------------------------------------------

def evaluate(options):
    """Answers, verdicts and figures of every column and benchmark. Raises UsageError."""
    given = read_answers(options.judge) if options.judge else {}
    names = named(options.benchmarks or ",".join(name for _, name in given) or "heldout")
    with sandbox(options.workers) as executor:
        tasks = heldout_tasks(names, options, executor)
        problems, missing = load_benchmarks(names, options.data, options.limit, tasks)
        for name, reason in missing.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        if not problems:
            raise UsageError("no benchmark data found, for the reasons above")
        settings = settings_of(options)
        name = f"{Path(options.judge or options.run or options.model).stem}-{zlib.crc32(settings):08x}"
        out = Path(options.out or f"runs/eval-{name}")
        with held(out, settings):
            answers = given or generate_answers(problems, options, out, settings)
            results = defaultdict(dict)
            for column in options.columns:
                for name in problems:
                    results[column][name] = judged(name, problems[name], answers[column, name], executor)
            replace_file(out / "settings.json", settings)
            replace_file(out / "results.json", to_json(
                {"limit": options.limit, "results": results, "missing": missing}))
    print(f"{tables(results)}\n\nresults.json  {out}")


def heldout_tasks(names, options, executor):
    """The held-out tasks that the group heldout needs. A user's own are checked. Raises UsageError."""
    if not any(name.startswith("heldout") for name in names):
        return []
    from azr import load_heldout
    splits = load_heldout(options.heldout, executor=executor)
    split = options.split or ("easy" if "easy" in splits else next(iter(splits), "easy"))
    if split not in splits:
        raise UsageError(f"--split {split}: the held-out tasks have the splits {', '.join(splits)}")
    return splits[split]


def judged(name, problems, rows, executor):
    """The figures of one benchmark's rows. Answers to problems that were not asked do not count."""
    known = {problem.key: problem for problem in problems}
    asked = [row for row in rows if row["id"] in known]
    if len(asked) < len(rows):
        print(f"{name}: {len(rows) - len(asked)} answers are to no problem that was asked, and do not count",
              file=sys.stderr)
    verdicts = judge([known[row["id"]] for row in asked], [row["response"] for row in asked], executor, name)
    return score(problems, [row | verdict for row, verdict in zip(asked, verdicts)])


# --- the command line -------------------------------------------------------------------------------

def number(low, high=10 ** 9, kind=int):
    """An argparse type: the numbers of a range."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def parse(arguments):
    """The command line → options. Raises UsageError or ArgumentError."""
    parser = argparse.ArgumentParser(
        exit_on_error=False, description="Measure a model, or a base and a trained one side by side.")
    add = parser.add_argument
    add("--model", default="tiny", help="tiny (shipped, the default), a local folder or a Hugging Face name")
    add("--adapter", help="a PEFT adapter folder: the trained model, beside its base")
    add("--run", help="a run folder of train.py: its model, before and after training")
    add("--only", choices=("base", "trained"), help="with --adapter or --run: measure one of the two models")
    add("--benchmarks", help="names and groups with commas; groups are heldout (the default), io "
        "(in-distribution), code, math and all (of these three); names are " + ", ".join(BENCHMARKS))
    add("--data", help="a folder with the benchmarks' files; default: the Hugging Face hub")
    add("--judge", help='judge the answers in this file: lines of {"benchmark", "id", "response"}')
    add("--limit", type=number(1), help="only the first so many tasks of each benchmark")
    add("--template", choices="azr examples brief plain chat".split(), default="azr",
        help="azr: training's --frame long (default); examples, brief: its frames of these names (default "
             "for a run that had one); plain: the question alone; chat: the model's template")
    add("--think", action=argparse.BooleanOptionalAction,
        help="with --template chat: its switch enable_thinking, if it has one; default: the template's own")
    add("--samples", type=number(1), default=1, help="answers to each task (1)")
    add("--temperature", type=number(0, 100, float),
        help="0 is greedy, the default for one sample; for more it is 1")
    add("--max-response", type=number(1),
        help="tokens of a response; default: as trained, 128 for tiny, else 4096")
    add("--seed", type=number(0), default=0, help="random seed of sampling (0)")
    add("--heldout", default="tiny", help="held-out tasks: a file of JSON lines, tiny, or cruxeval; default: "
        "the run's, else tiny")
    add("--split", help="which split of them; default: easy, else the first")
    add("--out", help="a folder for answers.jsonl and results.json; default: one in runs/ for these very "
        "settings, so that the same command keeps the benchmarks that are finished")
    add("--quantize", choices="auto 4bit none".split(), default="auto", help="4-bit base weights; default: "
        "the run's, else auto: on a GPU, with an adapter")
    add("--dtype", choices="auto bf16 fp16 fp32".split(), default="auto", help="of the weights; default: the "
        "run's, else auto")
    add("--device", help="cuda, cuda:1 or cpu; default: cuda where there is one")
    add("--generate-batch", type=number(0), default=0, help="responses sampled at once; 0: as memory allows")
    add("--workers", type=number(1, 512), help="sandbox workers; default: all cores")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == "":
            raise UsageError(f"{flag(name)} is empty; give it a value or leave it out")
    if options.run:
        parser.set_defaults(**defaults_of(Path(options.run)))
        options = parser.parse_args(arguments)
    options.columns = {"model": options.model}
    if options.judge:
        options.columns = {"answers": None}
    elif options.run or options.adapter:
        options.columns = {"base": options.model,
                           "trained": options.model if options.adapter else f"{options.run}/model"}
        if options.only:
            options.columns = {options.only: options.columns[options.only]}
        if options.only == "base":
            options.adapter = None
    options.max_response = options.max_response or (128 if options.model in ("tiny", "tiny/longer") else 4096)
    if options.temperature is None:
        options.temperature = 1.0 if options.samples > 1 else 0.0
    if options.samples > 1 and not options.temperature:
        raise UsageError(f"--samples {options.samples} at --temperature 0 are all the same answer")
    if options.only and not (options.run or options.adapter):
        raise UsageError(f"--only {options.only} needs --run or --adapter")
    if options.think is not None and options.template != "chat":
        raise UsageError("--think and --no-think need --template chat")
    return options


def defaults_of(run):
    """{option: default} as the run was trained. Raises UsageError."""
    config = read_config(run, CONFIG)
    defaults = {name: config[name] for name in CONFIG}
    defaults["dtype"] = config.get("dtype", "auto")  # older runs do not say
    if config.get("frame") in EXAMPLE_FRAMES:
        defaults["template"] = config["frame"]
    if (run / "adapter").is_dir():
        defaults["adapter"] = str(run / "adapter")
    elif not (run / "model").is_dir():
        raise UsageError(f"{run} has no trained weights yet: there is no folder adapter or model in it")
    return defaults


def main(arguments=None):
    printable_output()
    try:
        evaluate(parse(arguments))
        return 0
    except (UsageError, argparse.ArgumentError) as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "stopped; finished benchmarks are kept for the next time"
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, message = 1, (f"{str(error) or 'out of memory'}; finished benchmarks are kept for the next "
                            "time; if the GPU is full, give a smaller --generate-batch")
    print(f"eval.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
