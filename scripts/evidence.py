"""Runs, tables and pictures of docs/evidence-details.md: does self-play go past its base? Does it pay to train the proposer?

    python scripts/evidence.py                    # every run, one after the other: hours
    python scripts/evidence.py --only self-play   # some rows of the table
    python scripts/evidence.py --jobs 2           # two runs at a time
    python scripts/evidence.py --draw             # only tables and pictures, from docs/evidence.zip

A run that is complete is not done again; one that was stopped goes on. The rows "another base" first make that base from
nothing with `tiny/make.py` (half an hour each). The rows "scarce (0)", "(1)" and "(2)" are the second question, each from a
base that seldom proposes what is hard for it; the row with "proposer not trained" makes pairs with it, seed by seed.

Each run is `train.py`, or `scripts/controls.py` where a control replaces a part of it, with the flags that are printed; then
`eval.py` answers the held-out tasks of both splits, greedy, and the harder split eight times at temperature 1 (of the second
question's models only the latter). A control that follows a run needs it complete. Differences are paired by task, and
their standard errors are over tasks. docs/evidence.zip keeps of each run what the tables and pictures need of its metrics,
solve rates and answers: one file of JSON lines a run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import filelock
import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from azr import load_heldout
from eval import pass_at_k
from model import TINY
from rewards import mean_error
from run import flag
from tables import markdown
from tasks import TASK_TYPES, fingerprint
from train import Config

MAKING = defaultdict(Lock)  # of two jobs on one base, one makes it
ARCHIVE = ROOT / "docs" / "evidence.zip"
BASE = "tiny/longer"
RECIPE = (f"--model {BASE} --samples 8 --batch 16 --train-on-estimates --baseline task --lora-rank 0 --lr 3e-4 --lr-final 0.1 "
          "--max-response 112 --entropy-coef 0.001 --steps 100 --eval-every 20 --heldout-splits easy,hard --workers 1").split()
# a constant rate: so two runs can be compared at any step, and a run can go on later with more steps
LONG = ("--max-response 160 --lr 1.5e-4 --lr-final 1 --eval-every 20 --heldout-splits 1,2,3,4,5,6")


class Row(NamedTuple):
    """changes: of the recipe; None: of a feature that was taken out after commit 09afc7c. base: a folder in --out.
    control: what scripts/controls.py replaces; {followed} is the run of the same seed that trains its proposer."""

    changes: str | None
    seeds: range
    base: str = BASE
    control: str = ""


ROWS = {
    "self-play": Row("", range(10)),
    "shuffled rewards": Row("--shuffle-rewards", range(2)),
    "proposer not trained": Row("--no-train-proposer", range(2)),
    "no references": Row("--references 0", range(2)),
    "no deduction": Row("--types abduction,induction", range(2)),
    "no abduction": Row("--types deduction,induction", range(2)),
    "no induction": Row("--types deduction,abduction", range(2)),
    "six-group baseline": Row("--baseline group", range(2)),
    "estimates not trained on": Row("--no-train-on-estimates", range(2)),  # beside the row above: no two tries of a task
    "no deduplication": Row("--no-dedup", range(2)),
    "rejection sampling": Row(None, range(2)),
    "padding is a repeat": Row(None, range(2)),
    "messages must help": Row(None, range(2)),
    "another base (1)": Row("", range(2), "base-1/longer"),
    "another base (2)": Row("", range(2), "base-2/longer"),
}
# Pairs from bases that seldom propose what is hard for them, made with seeds 0, 1 and 2. A step with an untrained proposer tries
# fewer new tasks, and shorter ones: with more steps both sample about as many tokens.
ROWS |= {f"scarce{name} ({base})": Row(f"{LONG} {changes}", range(5), f"scarce-{base}") for base in range(3)
         for name, changes in {"": "--steps 140", ", proposer not trained": "--steps 270 --no-train-proposer"}.items()}
# Controls and variants of these runs, and remedies where training the proposer brings nothing.
CONTROLS = {f"scarce, {name} ({base})": Row(f"{LONG} --steps 140 {changes}", seeds, f"scarce-{base}", control)
            for base, seeds, name, changes, control in [
    (0, range(1, 3), "shuffled rewards", "--shuffle-rewards", ""),
    (0, range(1, 3), "lengths imposed", "--no-train-proposer", "--tasks lengths --follow {followed}"),
    (0, range(1, 3), "drawn from the grammar", "--no-train-proposer", "--tasks grammar --follow {followed}"),
    (0, range(1, 3), "rewarded by variance", "", "--reward variance"),
    (0, range(1, 3), "rewarded for novelty", "", "--reward novelty"),
    (0, range(1, 3), "no references", "--references 0", ""),
    (0, range(1, 3), "no deduplication", "--no-dedup", ""),
    (0, range(1, 3), "six references", "--references 6 --max-prompt 1024", ""),
    (0, range(1, 3), "four tries", "--samples 4", ""),
    (1, range(2), "replayed", "--no-train-proposer", "--tasks replayed --follow {followed}"),
    (1, range(2), "idle statements refused", "", "--refuse-idle"),
    (1, range(2), "drawn from the grammar", "--no-train-proposer", "--tasks grammar --follow {followed}"),
    (1, range(2), "solver weighs four times", "--solve-weight 4", ""),
    (1, range(2), "six-group baseline", "--baseline group", ""),
    (1, range(2), "judged again", "", "--judge-again"),
    (1, range(2), "sixteen tries", "--samples 16", ""),
]}
ROWS |= CONTROLS
CURVES = {"self-play": "tab:blue", "shuffled rewards": "tab:gray"}  # the rows that the picture shows, step by step
HARDER = (4, 5, 6)  # statements
TRIES, PROPOSALS = 8, 3 * 16  # of a task, and of a step, in the recipe
KEYS = ("step", "entropy", "truncated", "diversity/unique_ast", "lr", "flags", "seconds/total")
STARTS = ("heldout", "response_tokens/solve")


def commands():
    """The rows that this version of train.py can run."""
    return [name for name, row in ROWS.items() if row.changes is not None]


def flags_of(name, seed, out):
    row = ROWS[name]
    recipe = list(RECIPE)
    if name not in CURVES:
        recipe += ["--eval-every", "0"]
    if row.base != BASE:  # a folder: the shipped models' defaults have to be spelled out
        presets = {knob.name: knob.metadata["presets"] for knob in fields(Config)}
        recipe = [*(f"{flag(knob)}={10 ** 6 if tiny is None else tiny}" for knob, (tiny, card, _) in presets.items()
                    if tiny != card and not isinstance(tiny, bool)), *recipe]
        heldout = out / row.base / "statements.jsonl" if scarce(row.base) else heldout_of(row.base, out)
        recipe += ["--model", str(out / row.base), "--heldout", str(heldout)]
    return [*recipe, *row.changes.split(), "--seed", str(seed)]


def script_of(name, seed, out):
    """[the script that makes a row's run, and what a control replaces]"""
    row = ROWS[name]
    control = row.control.format(followed=out / slug(f"scarce ({row.base[-1]})", seed)).split()
    return ["scripts/controls.py", *control] if control else ["train.py"]


def scarce(base):
    """Whether a base is of the second question."""
    return base.startswith("scarce")


def heldout_of(base, out):
    """The held-out tasks that lie beside a base, as --heldout takes them."""
    if base == BASE:
        return "tiny"
    return out / base.removesuffix("longer") / "heldout.jsonl"


def slug(name, seed):
    return f"{name.translate(str.maketrans(' ', '-', '(),'))}-{seed}"


def kept_file(name):
    """The file of rows of a run or a base in docs/evidence.zip. It need not exist."""
    return zipfile.Path(ARCHIVE, f"{name}.jsonl")


def write_kept(name, rows):
    """Add a file of rows to docs/evidence.zip, or replace it.

    A new archive is written and then renamed, so that a process that is killed loses nothing of the old one. Equal
    rows give equal bytes, because names are sorted and every file has the same date.
    """
    with filelock.FileLock(ROOT / "runs" / "evidence.lock"):  # other jobs and processes write their runs
        files = {}
        if ARCHIVE.exists():
            with zipfile.ZipFile(ARCHIVE) as archive:
                files = {entry: archive.read(entry) for entry in archive.namelist()}
        files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        part = ARCHIVE.with_suffix(".part")
        with zipfile.ZipFile(part, "w") as archive:
            for entry in sorted(files):  # a ZipInfo without a date is of 1980
                archive.writestr(zipfile.ZipInfo(entry), files[entry], zipfile.ZIP_DEFLATED, compresslevel=9)
        part.replace(ARCHIVE)


def rows_of(path):
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line may be cut
    return [json.loads(line) for line in lines]


def call(script, *arguments):
    # one thread: two spin against each other beside another process
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def answer(model, folder, base, out):
    """Greedy answers to both splits and eight samples of the harder one, by eval.py; what is there is not done again.

    Of the second question's models only the samples: their greedy answers, by statements, are in the curves.
    """
    length = 208 if scarce(base) else 112
    for name, flags in {"hard": [], "easy": [], "samples": ["--samples", "8", "--temperature", "1"]}.items():
        if not (folder / name / "results.json").exists() and (name == "samples" or not scarce(base)):
            call("eval.py", "--model", model, "--split", "easy" if name == "easy" else "hard", "--max-response", length,
                 "--heldout", heldout_of(base, out), "--workers", "1", "--out", folder / name, *flags)


def do(name, seed, out):
    """One run, its answers, and its rows in docs/evidence.zip."""
    folder, base = out / slug(name, seed), ROWS[name].base
    do_base(base, out)
    if not (folder / "evidence").exists():
        begun = (folder / "config.json").exists()
        call(*script_of(name, seed, out), *(["--resume", folder] if begun else ["--out", folder, *flags_of(name, seed, out)]))
        done = rows_of(folder / "metrics.jsonl")[-1]["step"]
        if done < json.loads((folder / "config.json").read_text())["steps"]:
            raise SystemExit(f"{folder} was stopped at step {done}; the same command goes on")
    answer(folder / "model", folder / "evidence", base, out)
    keep(name, seed, folder, heldout_of(base, out))


def base_slug(base):
    return "base" if base == BASE else base.removesuffix("/longer")


def do_base(base, out):
    """Make a base that is not shipped; what each base answers is kept in docs/evidence.zip."""
    with MAKING[base]:
        if base != BASE and not (out / base).exists():
            kind, seed = base.removesuffix("/longer").split("-")
            if kind == "base":
                call("tiny/make.py", "--seed", seed, "--out", out / f"base-{seed}")
            else:
                source = TINY if seed == "0" else do_base(f"base-{seed}/longer", out).parent
                call("tiny/make.py", "--seed", seed, "--out", source, "--scarce", out / base)
        folder, answers = TINY / "longer" if base == BASE else out / base, out / f"{base_slug(base)}-answers"
        answer(folder, answers, base, out)
        statements = {split: {kind: "".join(str(statements_of(task.program)) for task in tasks if task.type == kind)
                              for kind in TASK_TYPES} for split, tasks in load_heldout(heldout_of(base, out)).items()}
        row = {"answers": answers_of(answers), "statements": statements}
        if scarce(base):
            row["thoughts"] = thoughts_of(answers, heldout_of(base, out))
        write_kept(base_slug(base), [row])
    return folder


def statements_of(program):
    return program.count("\n") - 1


def keep(name, seed, folder, heldout):
    """The rows of a run in docs/evidence.zip: a line a step; the last one says what the trained model answered right, and which of the
    harder tasks' programs the run proposed itself (which then do not count)."""
    lengths, rates = defaultdict(list), defaultdict(Counter)
    for task in rows_of(folder / "tasks.jsonl"):
        if task["type"] != "induction":  # whose programs are those of the others
            lengths[task["step"]].append(statements_of(task["program"]))
        if task["solve_rate"] is not None:
            rates[task["step"]][f"{task['solve_rate']:g}"] += 1
    rows = []
    for row in rows_of(folder / "metrics.jsonl"):
        rows.append({key: round(value, 4) for key, value in row.items()
                     if value is not None and (key in KEYS or key.startswith(STARTS))})
        if lengths[row["step"]]:
            rows[-1]["statements"] = round(sum(lengths[row["step"]]) / len(lengths[row["step"]]), 3)
        rows[-1]["rates"] = rates[row["step"]]
        if "tokens_per_second" in row:
            rows[-1]["tokens"] = round(row["tokens_per_second"] * row["seconds/generate"])  # sampled
    hard = load_heldout(heldout)["hard"]
    proposed = {fingerprint(task["program"]) for task in rows_of(folder / "tasks.jsonl")}
    rows.append({"seconds": round(sum(row.get("seconds/total", 0) for row in rows_of(folder / "metrics.jsonl"))),
                 "answers": answers_of(folder / "evidence"), "met": {
                     kind: [index for index, task in enumerate(task for task in hard if task.type == kind)
                            if fingerprint(task.program) in proposed] for kind in TASK_TYPES}})
    if scarce(ROWS[name].base):
        rows[-1]["thoughts"] = thoughts_of(folder / "evidence", heldout)
    write_kept(slug(name, seed), rows)


def answers_of(folder):
    """{hard | easy | samples: {type: "how many of the task's answers are right", a digit a task}}"""
    return {name: {kind: "".join(str(sum(flags)) for flags in next(iter(json.loads(
        (folder / name / "results.json").read_text())["results"].values()))[f"heldout-{kind}"]["correct"].values())
        for kind in TASK_TYPES} for name in ("hard", "easy", "samples") if (folder / name).exists()}


def thoughts_of(folder, heldout):
    """Of the sampled deductions about programs with HARDER[0] statements: {samples, complete: how many write one step for each
    statement, short: how many write fewer, right: how many of the complete ones give the right answer}. An arrow is a step;
    in this grammar a statement takes one. Programs that the run proposed are not left out here."""
    asked = {str(index) for index, task in enumerate(load_heldout(heldout)["hard"])
             if task.type == "deduction" and statements_of(task.program) == HARDER[0]}
    result = next(iter(json.loads((folder / "samples" / "results.json").read_text())["results"].values()))
    right = {index: iter(flags) for index, flags in result["heldout-deduction"]["correct"].items()}
    counts = Counter(samples=0, complete=0, short=0, right=0)
    for row in rows_of(folder / "samples" / "answers.jsonl"):
        if row["benchmark"] == "heldout-deduction" and row["id"] in asked:
            steps, correct = row["response"].count(" -> "), next(right[row["id"]])
            counts += Counter(samples=1, complete=steps == HARDER[0], short=steps < HARDER[0], right=steps == HARDER[0] and correct)
    return counts


def measures(answers):
    """{measure: {type: [a number a task]}}, of one model."""
    right = {name: {kind: list(map(int, text)) for kind, text in types.items()} for name, types in answers.items()}
    return {"hard, greedy": right.get("hard"),
            "hard, sampled": {kind: [n / 8 for n in counts] for kind, counts in right["samples"].items()},
            "hard, pass@8": {kind: [pass_at_k(8, n, 8) for n in counts] for kind, counts in right["samples"].items()},
            "easy, greedy": right.get("easy")}


def means_of(rows, measure, kind):
    """The mean of several models for each task. rows: last rows of kept files."""
    return [sum(task) / len(rows) for task in zip(*(measures(row["answers"])[measure][kind] for row in rows))]


def difference(before, after, measure, types=TASK_TYPES, among=None):
    """(mean, standard error) in points of after − before, paired by task; of several models a task's mean is taken first.

    Both are lists of last rows of kept files. Harder tasks whose program one of the runs proposed are left out.
    among: {type: the tasks that count}; default: all.
    """
    parts = []
    for kind in types:
        met = {index for row in before + after for index in row.get("met", {}).get(kind, ()) if measure.startswith("hard")}
        pairs = zip(means_of(before, measure, kind), means_of(after, measure, kind))
        parts.append(mean_error([100 * (b - a) for index, (a, b) in enumerate(pairs)
                                 if index not in met and (among is None or index in among[kind])]))
    # types weigh the same, whatever their number of tasks
    return sum(mean for mean, _ in parts) / len(parts), sum(error ** 2 for _, error in parts) ** 0.5 / len(parts)


def signed(mean, error):
    return f"{mean:+.1f} ± {error:.1f}"


def points(before, after, measure, types=TASK_TYPES, among=None):
    return signed(*difference(before, after, measure, types, among))


def spread(values):
    """The standard error of a mean, from the spread of its values; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def gain(pairs, measure):
    """`difference` of [(last row before, last row after)], one pair a seed: as large an error as the spread of the pairs asks for."""
    mean, error = difference(*map(list, zip(*pairs)), measure)
    return mean, max(error, spread([difference([before], [after], measure)[0] for before, after in pairs]))


def kept_runs():
    """{row: {seed: [kept line]}}"""
    runs = {name: {seed: rows_of(kept_file(slug(name, seed))) for seed in row.seeds} for name, row in ROWS.items()}
    complete = {name: {seed: rows for seed, rows in seeds.items() if rows} for name, seeds in runs.items()}
    return {name: seeds for name, seeds in complete.items() if seeds}


def write_tables(mark, tables):
    """Put the tables into docs/evidence-details.md between two marks."""
    text = "\n\n".join(markdown(lines) for lines in tables)
    page, end = ROOT / "docs" / "evidence-details.md", f"<!-- end of {mark} -->"
    mark = f"<!-- {mark}: written by scripts/evidence.py -->\n"
    top, begin, rest = page.read_text().partition(mark)
    page.write_text(f"{top}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")
    print(text)


def self_play_tables(runs):
    """Is the base surpassed? The rows on shipped bases, and on others made like them."""
    runs = {name: seeds for name, seeds in runs.items() if not scarce(ROWS[name].base)}
    bases = {name: rows_of(kept_file(base_slug(ROWS[name].base)))[-1:] for name in runs}
    ends = {name: [rows[-1] for rows in seeds.values()] for name, seeds in runs.items()}
    if "self-play" not in runs:
        raise SystemExit("docs/evidence.zip holds no run of self-play yet: python scripts/evidence.py --only self-play")
    ours, names = ends["self-play"], list(measures(bases["self-play"][0]["answers"]))

    def levels(label, row):
        return [label, *(" / ".join(f"{100 * mean_error(measures(row['answers'])[measure][kind])[0]:.0f}" for kind in TASK_TYPES)
                         for measure in names)]

    def differences(label, before, rows):
        grown = [[row["statements"] for row in run if "statements" in row] for run in rows]
        lengths = [sum(run[0] for run in grown) / len(grown), sum(sum(run[-5:]) / 5 for run in grown) / len(grown)]
        after = [run[-1] for run in rows]
        theirs = "" if before != bases["self-play"] or after[0] in ours else points(ours, after, names[0])
        return [label, *(points(before, after, measure) for measure in names), theirs,
                "{:.1f} → {:.1f}".format(*lengths), f"{sum(row['seconds'] for row in after) / len(after) / 60:.1f}"]

    first = [["deduction / abduction / induction, %", *names], levels("base", bases["self-play"][0])]
    second = [["points against the base", *names, "against self-play, hard, greedy", "statements", "minutes"]]
    third = [["points against the base", *(f"{measure.partition(', ')[2]}: {kind}" for measure in names[:3] for kind in TASK_TYPES)]]
    for name, seeds in runs.items():
        before, other = bases[name], ROWS[name].base != BASE
        if other:
            first.append(levels(name, before[0]))
        if name == "self-play" or other:
            first += [levels(f"{'self-play from it' if other else name}, seed {seed}", rows[-1]) for seed, rows in seeds.items()]
        second += [differences(f"{name}, seed {seed}", before, [rows]) for seed, rows in seeds.items()]
        if len(seeds) > 1:
            second.append(differences(f"{name}, mean of {len(seeds)}", before, list(seeds.values())))
        third.append([name if other else f"{name} ({len(seeds)})", *(
            points(before, ends[name], measure, [kind]) for measure in names[:3] for kind in TASK_TYPES)])
    short = [["points against the base, mean of the seeds", "seeds", *(names[i] for i in (0, 2, 3))]]
    short += [[name, len(seeds), *(points(bases[name], ends[name], names[i]) for i in (0, 2, 3))] for name, seeds in runs.items()]
    write_tables("tables", (short, first, second, third))


def curve(axis, runs, key, color, label):
    """The mean of several runs over steps, with a band from the lowest to the highest."""
    points = defaultdict(list)
    for rows in runs:
        for row in rows:
            if row.get(key) is not None:
                points[row["step"]].append(row[key])
    steps = sorted(points)
    if steps:
        axis.plot(steps, [sum(points[s]) / len(points[s]) for s in steps], color=color, label=label)
        axis.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=color, alpha=0.2)


def self_play_picture(runs):
    """docs/evidence.png: accuracy by split, length of the invented programs, solve rates over time."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, color in CURVES.items():
        seeds = list(runs.get(name, {}).values())
        curve(axes[0], seeds, "heldout/hard/mean", color, f"harder split, {name}")
        curve(axes[1], seeds, "statements", color, name)
    curve(axes[0], list(runs["self-play"].values()), "heldout/mean", "tab:green", "easy split, self-play")
    axes[0].set(title="held-out accuracy, greedy (mean of types; bands: seeds)", xlabel="step", ylim=(0, None))
    axes[1].set(title="statements of the proposed programs", xlabel="step", ylim=(0, None))
    bins = defaultdict(Counter)
    for rows in runs["self-play"].values():
        for row in rows:
            for rate, count in row.get("rates", {}).items():
                bins[-(-row["step"] // 5) * 5][float(rate)] += count
    rates = sorted({rate for counts in bins.values() for rate in counts})
    axes[2].stackplot(list(bins), [[counts[rate] / counts.total() for counts in bins.values()] for rate in rates],
                      colors=pyplot.get_cmap("cividis")([i / max(1, len(rates) - 1) for i in range(len(rates))]),
                      labels=[f"{rate:g}" for rate in rates])
    axes[2].set(title="solve rates of the new tasks, self-play", xlabel="step", ylabel="share", ylim=(0, 1))
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(ROOT / "docs" / "evidence.png", dpi=110)
    pyplot.close(figure)


# --- the second question: does it pay to train the proposer? ------------------------------------------------

def pairs_of(runs):
    """{seed of the base: {seed: (kept lines of the run that trains its proposer, of the one that does not)}}"""
    found = {}
    for base in range(3):
        trained, untrained = (runs.get(f"scarce{name} ({base})", {}) for name in ("", ", proposer not trained"))
        if both := {seed: (trained[seed], untrained[seed]) for seed in trained if seed in untrained}:
            found[base] = both
    return found


def greedy(row, statements):
    """(accuracy, standard error) in points on tasks of so many statements, the mean of the types; None if not measured."""
    split = "" if statements == 1 else f"/{statements}"  # the first split of a run has no name in its metrics
    names = f"heldout{split}/mean", f"heldout_stderr{split}/mean"
    return tuple(100 * row[name] for name in names) if names[0] in row else None


def harder(row):
    """`greedy` over four, five and six statements, which weigh the same."""
    scores = [greedy(row, statements) for statements in HARDER]
    if None in scores:
        return None
    return sum(score for score, _ in scores) / len(scores), sum(error ** 2 for _, error in scores) ** 0.5 / len(scores)


def learnable(row):
    """Share of a step's proposals that are new and solved sometimes, in percent."""
    return 100 * sum(count for rate, count in row["rates"].items() if 0 < float(rate) < 1) / PROPOSALS


def rollouts(row):
    """Of a step: proposals, as many solutions, and the tries of each new task."""
    return 2 * PROPOSALS + TRIES * sum(row["rates"].values())


SPENT = {"steps": lambda row: 1, "rollouts": rollouts, "sampled tokens": lambda row: row["tokens"]}


def progress(rows, spent):
    """([what was spent until each evaluation], [its step], [accuracy on harder tasks], [standard error])"""
    total, points = 0, []
    for row in rows[:-1]:
        total += spent(row) if row["step"] else 0
        if score := harder(row):
            points.append((total, row["step"], *score))
    return tuple(zip(*points))


PROPOSED = {  # what a step's proposals were: the panels of the picture, columns of the table
    "learnable proposals, %": learnable,
    "new programs, %": lambda row: 100 * row["diversity/unique_ast"],
    "statements of new programs": lambda row: row.get("statements"),
}


def advantage(trained, untrained, spent):
    """([step of the run with the trained proposer], [points trained − untrained], [standard error]), when both spent the same.

    The other run is read on the straight line between two evaluations. The errors are those of two runs on different
    tasks: too wide, since the tasks are the same.
    """
    total, steps, scores, errors = progress(trained, spent)
    other, _, other_scores, other_errors = progress(untrained, spent)
    both = sum(mark <= other[-1] for mark in total)
    gaps = numpy.array(scores[:both]) - numpy.interp(total[:both], other, other_scores)
    return steps[:both], gaps, numpy.hypot(errors[:both], numpy.interp(total[:both], other, other_errors))


def late(rows, value):
    """The mean of a value over the last 20 steps."""
    values = [value(row) for row in rows[:-1][-20:]]
    return statistics.mean(found for found in values if found is not None)


def proposer_table(runs):
    """Accuracy in %, and trained − untrained in points, at equal steps."""
    sampled = "hard, sampled", "hard, pass@8"

    def levels(label, runs, ends, measured=-2):
        scores = [statistics.mean(greedy(rows[measured], n)[0] for rows in runs) for n in range(1, 7)]
        scores += [100 * statistics.mean(statistics.mean(means_of(ends, name, kind)) for kind in TASK_TYPES) for name in sampled]
        proposed = [""] * len(PROPOSED) if measured == 0 else [
            f"{statistics.mean(late(rows, value) for rows in runs):.1f}" for value in PROPOSED.values()]
        return [label, *(f"{score:.0f}" for score in scores), *proposed]

    def gaps(label, pairs):
        cells = []
        for n in range(1, 7):
            found = [[greedy(rows[-2], n) for rows in pair] for pair in pairs]
            each = [a - b for (a, _), (b, _) in found]
            error = sum(error ** 2 for pair in found for _, error in pair) ** 0.5 / len(pairs)
            cells.append((statistics.mean(each), max(error, spread(each))))
        cells += [gain([(b[-1], a[-1]) for a, b in pairs], name) for name in sampled]
        return [label, *(signed(*cell) for cell in cells), *(
            f"{statistics.mean(late(a, value) - late(b, value) for a, b in pairs):+.1f}" for value in PROPOSED.values())]

    table = [["", *(f"{n}, greedy" for n in range(1, 7)), "4–6, sampled", "4–6, pass@8", *PROPOSED]]
    for base, pairs in pairs_of(runs).items():
        trained, untrained = zip(*pairs.values())
        table.append(levels(f"base {base}", trained[:1], rows_of(kept_file(f"scarce-{base}")), measured=0))
        table.append(levels(f"proposer trained, mean of {len(pairs)}", trained, [rows[-1] for rows in trained]))
        table.append(levels(f"not trained, mean of {len(pairs)}", untrained, [rows[-1] for rows in untrained]))
        table += [gaps(f"trained − not, seed {seed}", [pair]) for seed, pair in pairs.items()]
        if len(pairs) > 1:
            table.append(gaps(f"trained − not, mean of {len(pairs)}", [*pairs.values()]))
    write_tables("proposer", (table,))


def thoughts(ends):
    """Of the deductions of several models, in percent: [those with a step for each statement, how many of these are right, those
    with fewer steps]; see `thoughts_of`."""
    counts = sum((Counter(row["thoughts"]) for row in ends if "thoughts" in row), Counter())
    parts = [(counts[part], counts[whole]) for part, whole in (("complete", "samples"), ("right", "complete"), ("short", "samples"))]
    return [f"{100 * part / whole:.0f}" if whole else "" for part, whole in parts]


def controls_table(runs):
    """What each base gains with other tasks, rewards and settings; differences are paired by seed and task."""
    measured, tables = ("hard, sampled", "hard, pass@8"), []
    for number in pairs_of(runs):
        trained, base = runs[f"scarce ({number})"], rows_of(kept_file(f"scarce-{number}"))
        labels = {f"scarce ({number})": "proposer trained", f"scarce, proposer not trained ({number})": "not trained, 270 steps"}
        labels |= {name: name.removeprefix("scarce, ").rpartition(" (")[0] for name, row in CONTROLS.items() if row.base == f"scarce-{number}"}
        lines = [[f"from base {number}, 140 steps", "seeds", "sampled − base", "pass@8 − base", "sampled − trained", "pass@8 − trained",
                  "learnable proposals, %", "statements of new programs", "complete deductions, %", "of these right, %",
                  "too few steps, %"],
                 [f"base {number}", *[""] * 7, *thoughts(base)]]
        for name, label in labels.items():
            if kept := runs.get(name):
                after = [rows[-1] for rows in kept.values()]
                pairs = [[(base[-1], row) for row in after],
                         [] if kept is trained else [(trained[seed][-1], rows[-1]) for seed, rows in kept.items() if seed in trained]]
                gains = [signed(*gain(found, measure)) if found else "" for found in pairs for measure in measured]
                proposed = [statistics.mean(late(rows, value) for rows in kept.values())
                            for value in (learnable, PROPOSED["statements of new programs"])]
                lines.append([label, len(kept), *gains, *(f"{value:.1f}" for value in proposed), *thoughts(after)])
        tables.append(lines)
    write_tables("controls", tables)


def proposer_picture(runs):
    """docs/proposer.png: trained − untrained on harder tasks when both have spent the same; what was proposed."""
    pairs = [pair for found in pairs_of(runs).values() for pair in found.values()]
    figure, ((gap, *others), lower) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (name, spent), color in zip(SPENT.items(), ("tab:blue", "tab:orange", "tab:green")):
        found = [advantage(*pair, spent) for pair in pairs]
        count = min(len(steps) for steps, _, _ in found)
        each = numpy.array([points[:count] for _, points, _ in found])
        errors = sum(errors[:count] ** 2 for _, _, errors in found) ** 0.5 / len(found)
        points, errors = each.mean(0), numpy.maximum(errors, [spread(column.tolist()) for column in each.T])
        gap.errorbar(found[0][0][:count], points, errors, color=color, label=f"at equal {name}", capsize=3)
    gap.axhline(0, color="black", linewidth=0.8)
    gap.set(title="trained − untrained proposer, points\n(greedy, 4 to 6 statements)", xlabel="step of the run that trains it")
    for axis, (title, value) in zip([*others, *lower], PROPOSED.items()):
        for label, color, side in ("trained", "tab:blue", 0), ("not trained", "tab:gray", 1):
            fives = [[{"step": -(-row["step"] // 5) * 5, title: value(row)} for row in pair[side][1:-1]] for pair in pairs]
            curve(axis, fives, title, color, f"proposer {label}")
        axis.set(title=f"{title} (five steps together)", xlabel="step", ylim=(0, None))
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "proposer.png", dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--only", nargs="+", choices=commands(), default=commands(), metavar="ROW",
                        help=", ".join(commands()))
    parser.add_argument("--seeds", type=int, default=10, help="only seeds below this number")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="no run: tables and pictures from what is kept")
    options = parser.parse_args()
    if not options.draw:
        # seed by seed, so that what is compared is complete early
        jobs = [(name, seed) for seed in range(options.seeds) for name in options.only if seed in ROWS[name].seeds]
        for name, seed in jobs:
            print(f"{slug(name, seed)}: python", *script_of(name, seed, options.out), *flags_of(name, seed, options.out), flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: do(*job, options.out), jobs))
    runs = kept_runs()
    self_play_tables(runs)
    self_play_picture(runs)
    if pairs_of(runs):
        proposer_table(runs)
        controls_table(runs)
        proposer_picture(runs)


if __name__ == "__main__":
    main()
