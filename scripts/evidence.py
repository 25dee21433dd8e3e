"""docs/evidence.md's runs, tables and pictures: does self-play go past its base?

    python scripts/evidence.py                    # every run, one after the other: hours
    python scripts/evidence.py --only self-play   # some rows of the table
    python scripts/evidence.py --jobs 2           # two runs at a time
    python scripts/evidence.py --draw             # only tables and pictures, from docs/evidence/*.jsonl

A run that is complete is not done again; one that was stopped goes on. The rows "another base" first make that base from
nothing with `tiny/make.py` (half an hour each). Each is `train.py` with the flags that are
printed; then `eval.py` answers the held-out tasks of both splits, greedy, and the harder split eight times at
temperature 1. Differences to the base are paired by task, and their standard errors are over tasks. What is kept
of a run in docs/evidence/ is its metrics.jsonl, cut to what the tables and pictures need.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from azr import HELDOUT, TINY, load_heldout  # noqa: E402
from eval import pass_at_k  # noqa: E402
from report import layout, mean_error  # noqa: E402
from tasks import TASK_TYPES, fingerprint  # noqa: E402
from train import Config, flag  # noqa: E402

MAKING = defaultdict(Lock)  # of two jobs on one base, one makes it
KEPT = ROOT / "docs" / "evidence"
BASE = "tiny/longer"
RECIPE = (f"--model {BASE} --samples 8 --batch 16 --train-on-estimates --baseline task --lora-rank 0 --lr 3e-4 --lr-final 0.1 "
          "--max-response 112 --steps 100 --eval-every 20 --heldout-splits easy,hard --workers 1").split()
# a constant rate: so two runs can be compared at any step, and a run can go on later with more steps
LONG = ("--max-response 160 --lr 1.5e-4 --lr-final 1 --steps 80 --eval-every 20 --heldout-splits 1,2,3,4,5,6 "
        "--heldout-limit 50")


class Row(NamedTuple):
    """changes: of the recipe; None: of a feature that was taken out after commit 09afc7c. base: a folder in --out."""

    changes: str | None
    seeds: range
    base: str = BASE


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
# A base that seldom proposes what is hard for it, made with seed 0, 1 or 2
ROWS |= {f"scarce{name} ({base})": Row(f"{LONG} {changes}".strip(), range(5), f"scarce-{base}") for base in range(3)
         for name, changes in {"": "", ", proposer not trained": "--no-train-proposer"}.items()}
CURVES = {"self-play": "tab:blue", "shuffled rewards": "tab:gray"}  # the rows that the picture shows, step by step
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
        recipe = [*(f"{flag(knob)}={tiny}" for knob, (tiny, card, _) in presets.items()
                    if tiny != card and not isinstance(tiny, bool)), *recipe]
        recipe += ["--model", str(out / row.base), "--heldout", str(heldout_of(row.base, out))]
    return [*recipe, *row.changes.split(), "--seed", str(seed)]


def heldout_of(base, out):
    """The file of the held-out tasks that lie beside a base."""
    if base == BASE:
        return HELDOUT
    return out / base.removesuffix("longer") / "heldout.jsonl"


def slug(name, seed):
    return f"{name.translate(str.maketrans(' ', '-', '(),'))}-{seed}"


def rows_of(path):
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line may be cut
    return [json.loads(line) for line in lines]


def call(script, *arguments):
    # one thread: two spin against each other beside another process
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def answer(model, folder, heldout, length):
    """Greedy answers to both splits and eight samples of the harder one, by eval.py; what is there is not done again."""
    for name, flags in {"hard": [], "easy": [], "samples": ["--samples", "8", "--temperature", "1"]}.items():
        if not (folder / name / "results.json").exists():
            call("eval.py", "--model", model, "--split", "easy" if name == "easy" else "hard", "--max-response", length,
                 "--heldout", heldout, "--workers", "1", "--out", folder / name, *flags)


def answer_length(base):
    return 208 if base.startswith("scarce") else 112


def do(name, seed, out):
    """One run, its answers, and its file in docs/evidence/."""
    folder, base = out / slug(name, seed), ROWS[name].base
    do_base(base, out)
    if not (folder / "evidence").exists():
        begun = (folder / "config.json").exists()
        call("train.py", *(["--resume", folder] if begun else ["--out", folder, *flags_of(name, seed, out)]))
        done = rows_of(folder / "metrics.jsonl")[-1]["step"]
        if done < json.loads((folder / "config.json").read_text())["steps"]:
            raise SystemExit(f"{folder} was stopped at step {done}; the same command goes on")
    answer(folder / "model", folder / "evidence", heldout_of(base, out), answer_length(base))
    keep(name, seed, folder, heldout_of(base, out))


def kept_base(base):
    return KEPT / f"{'base' if base == BASE else base.removesuffix('/longer')}.jsonl"


def do_base(base, out):
    """Make a base that is not shipped; what each base answers is kept in docs/evidence/."""
    with MAKING[base]:
        if base != BASE and not (out / base).exists():
            kind, seed = base.removesuffix("/longer").split("-")
            if kind == "base":
                call("tiny/make.py", "--seed", seed, "--out", out / f"base-{seed}")
            else:
                source = TINY if seed == "0" else do_base(f"base-{seed}/longer", out).parent
                call("tiny/make.py", "--seed", seed, "--out", source, "--scarce", out / base)
        folder, heldout, kept = TINY / "longer" if base == BASE else out / base, heldout_of(base, out), kept_base(base)
        answer(folder, out / f"{kept.stem}-answers", heldout, answer_length(base))
        statements = {split: {kind: "".join(str(statements_of(task.program)) for task in tasks if task.type == kind)
                              for kind in TASK_TYPES} for split, tasks in load_heldout(heldout).items()}
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"answers": answers_of(out / f"{kept.stem}-answers"), "statements": statements}) + "\n")
    return folder


def statements_of(program):
    return program.count("\n") - 1


def keep(name, seed, folder, heldout):
    """docs/evidence/<run>.jsonl: a line a step; the last one says what the trained model answered right, and which of the
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
    hard = load_heldout(heldout)["hard"]
    proposed = {fingerprint(task["program"]) for task in rows_of(folder / "tasks.jsonl")}
    rows.append({"seconds": round(sum(row.get("seconds/total", 0) for row in rows_of(folder / "metrics.jsonl"))),
                 "answers": answers_of(folder / "evidence"), "met": {
                     kind: [index for index, task in enumerate(task for task in hard if task.type == kind)
                            if fingerprint(task.program) in proposed] for kind in TASK_TYPES}})
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{slug(name, seed)}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers_of(folder):
    """{hard | easy | samples: {type: "how many of the task's answers are right", a digit a task}}"""
    return {name: {kind: "".join(str(sum(flags)) for flags in next(iter(json.loads(
        (folder / name / "results.json").read_text())["results"].values()))[f"heldout-{kind}"]["correct"].values())
        for kind in TASK_TYPES} for name in ("hard", "easy", "samples")}


def measures(answers):
    """{measure: {type: [a number a task]}}, of one model."""
    right = {name: {kind: list(map(int, text)) for kind, text in types.items()} for name, types in answers.items()}
    return {"hard, greedy": right["hard"],
            "hard, sampled": {kind: [n / 8 for n in counts] for kind, counts in right["samples"].items()},
            "hard, pass@8": {kind: [pass_at_k(8, n, 8) for n in counts] for kind, counts in right["samples"].items()},
            "easy, greedy": right["easy"]}


def difference(before, after, measure, types):
    """(mean, standard error) in points of after − before, paired by task; of several models a task's mean is taken first.

    Both are lists of last rows of kept files. Harder tasks whose program one of the runs proposed are left out.
    """
    parts = []
    for kind in types:
        met = {index for row in before + after for index in row.get("met", {}).get(kind, ()) if measure.startswith("hard")}
        means = [[sum(task) / len(rows) for task in zip(*(measures(row["answers"])[measure][kind] for row in rows))]
                 for rows in (before, after)]
        parts.append(mean_error([100 * (b - a) for index, (a, b) in enumerate(zip(*means)) if index not in met]))
    # types weigh the same, whatever their number of tasks
    return sum(mean for mean, _ in parts) / len(parts), sum(error ** 2 for _, error in parts) ** 0.5 / len(parts)


def tables():
    """Write the tables into docs/evidence.md from the kept files. → {row: {seed: [kept line]}}"""
    bases = {seed: rows_of(KEPT / (f"base-{seed}.jsonl" if seed else "base.jsonl"))[-1:] for seed in (None, 1, 2)}
    runs = {name: {seed: rows_of(KEPT / f"{slug(name, seed)}.jsonl") for seed in seeds
                   if (KEPT / f"{slug(name, seed)}.jsonl").exists()} for name, (_, seeds) in ROWS.items()}
    runs = {name: seeds for name, seeds in runs.items() if seeds}
    ends = {name: {seed: rows[-1] for seed, rows in seeds.items()} for name, seeds in runs.items()}
    if "self-play" not in runs:
        raise SystemExit("docs/evidence/ holds no run of self-play yet: python scripts/evidence.py --only self-play")
    ours, names = list(ends["self-play"].values()), list(measures(bases[None][0]["answers"]))

    def points(before, after, measure, types=TASK_TYPES):
        return "{:+.1f} ± {:.1f}".format(*difference(before, after, measure, types))

    def levels(label, row):
        return [label, *(" / ".join(f"{100 * mean_error(measures(row['answers'])[measure][kind])[0]:.0f}" for kind in TASK_TYPES)
                         for measure in names)]

    def differences(label, before, rows):
        grown = [[row["statements"] for row in run if "statements" in row] for run in rows]
        lengths = [sum(run[0] for run in grown) / len(grown), sum(sum(run[-5:]) / 5 for run in grown) / len(grown)]
        after = [run[-1] for run in rows]
        theirs = "" if before is not bases[None] or after[0] in ours else points(ours, after, names[0])
        return [label, *(points(before, after, measure) for measure in names), theirs,
                "{:.1f} → {:.1f}".format(*lengths), f"{sum(row['seconds'] for row in after) / len(after) / 60:.1f}"]

    first = [["deduction / abduction / induction, %", *names], levels("base", bases[None][0])]
    second = [["points against the base", *names, "against self-play, hard, greedy", "statements", "minutes"]]
    third = [["points against the base", *(f"{measure.partition(', ')[2]}: {kind}" for measure in names[:3] for kind in TASK_TYPES)]]
    for name, seeds in runs.items():
        before = bases[other_base(name)]
        if other_base(name):
            first.append(levels(name, before[0]))
        if name == "self-play" or other_base(name):
            first += [levels(f"{'self-play from it' if other_base(name) else name}, seed {seed}", rows[-1]) for seed, rows in seeds.items()]
        second += [differences(f"{name}, seed {seed}", before, [rows]) for seed, rows in seeds.items()]
        if len(seeds) > 1:
            second.append(differences(f"{name}, mean of {len(seeds)}", before, list(seeds.values())))
        third.append([name if other_base(name) else f"{name} ({len(seeds)})", *(
            points(before, list(ends[name].values()), measure, [kind]) for measure in names[:3] for kind in TASK_TYPES)])
    short = [["points against the base, mean of the seeds", "seeds", *(names[i] for i in (0, 2, 3))]]
    short += [[name, len(seeds), *(points(bases[other_base(name)], list(ends[name].values()), names[i]) for i in (0, 2, 3))]
              for name, seeds in runs.items()]
    text = "\n\n".join(layout(lines, True) for lines in (short, first, second, third))
    page, mark, end = ROOT / "docs" / "evidence.md", "<!-- tables: written by scripts/evidence.py -->\n", "<!-- end of tables -->"
    top, begin, rest = page.read_text().partition(mark)
    page.write_text(f"{top}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")
    print(text)
    return runs


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


def pictures(runs):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--only", nargs="+", choices=commands(), default=commands(), metavar="ROW",
                        help=", ".join(commands()))
    parser.add_argument("--seeds", type=int, default=10, help="at most so many seeds of each row")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="no run: tables and pictures from what is kept")
    options = parser.parse_args()
    if not options.draw:
        # seed by seed, so that what is compared is complete early
        jobs = [(name, seed) for seed in range(options.seeds) for name in options.only if seed in ROWS[name].seeds]
        for name, seed in jobs:
            print(f"{slug(name, seed)}: python train.py {' '.join(flags_of(name, seed, options.out))}", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: do(*job, options.out), jobs))
    pictures(tables())


if __name__ == "__main__":
    main()
