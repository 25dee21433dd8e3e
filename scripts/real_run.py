"""A real model before and after self-play, on public benchmarks, beside its control: a table and a picture.

    python scripts/real_run.py --model ~/qwen --minutes 120 --data DIR --out OUT
    python scripts/real_run.py --model ~/qwen --minutes 120 --data DIR --out OUT --runs shuffled
    python scripts/real_run.py --model ~/qwen --minutes 120 --data DIR --out OUT -- --lr 1e-4   # flags of train.py

Two runs of train.py, `self-play` and `shuffled` (its --shuffle-rewards), each for --minutes of training steps.
Then eval.py answers the benchmarks greedily with the base and with both trained models. Differences are paired
by problem, with one standard error. Every part is kept in OUT: the same command goes on where it was stopped or
killed, and larger --minutes train on. --runs takes one of the two, for two machines or two processes at a time.
--minutes counts training steps alone; seeding the buffers and the answers of eval.py come on top.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure

from eval import paired_difference
from run import read_rows, table
from tables import markdown
from tasks import UsageError

RUNS = {"self-play": [], "shuffled": ["--shuffle-rewards"]}
BENCHMARKS = "CRUXEval-O,CRUXEval-I,HumanEval+,MATH500"
SHARES = {"well formed (answers)": "solve/{}/well_formed", "valid (proposals)": "propose/{}/valid",
          "right (answers)": "solve/{}/accuracy", "learnable (proposals)": "propose/{}/learnable"}
STEPS = 100_000  # more than fit into any --minutes
LOOK = 5.0  # seconds between two looks at the metrics of a run


def metrics_of(run):
    return read_rows(run / "metrics.jsonl", {"step": int})


def minutes_of(run):
    """Minutes of training steps so far."""
    seconds = [row["seconds/total"] for row in metrics_of(run) if "seconds/total" in row]
    return sum(seconds) / 60


def call(script, *arguments):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ python", script, *arguments, flush=True)
    return subprocess.Popen(command)


def train(options, name):
    """Train until --minutes are over. Raises UsageError if train.py fails."""
    run = options.out / name
    if minutes_of(run) >= options.minutes:
        return
    if (run / "config.json").exists():
        child = call("train.py", "--resume", run)
    else:
        child = call("train.py", "--model", options.model, "--out", run, "--steps", STEPS, *RUNS[name],
                     *options.flags)
    is_asked = False
    try:
        while child.poll() is None:
            time.sleep(LOOK)
            if not is_asked and minutes_of(run) >= options.minutes:
                child.send_signal(signal.SIGINT)  # it stops after this step, and saves
                is_asked = True
    except KeyboardInterrupt:  # the terminal sent it to the child as well
        child.wait()
        raise
    if child.returncode:
        raise UsageError(f"train.py ended with exit code {child.returncode}")


def answers(options, run, column):
    """eval.py's results of the base or of a trained model, on all benchmarks. Raises UsageError."""
    name = "base" if column == "base" else f"{run.name}-{metrics_of(run)[-1]['step']}"
    out = options.out / "answers" / name
    flags = ["--data", options.data] if options.data else []
    if options.limit:
        flags += ["--limit", options.limit]
    if options.max_response:
        flags += ["--max-response", options.max_response]
    child = call("eval.py", "--run", run, "--only", column, "--benchmarks", options.benchmarks, "--out", out, *flags)
    try:
        child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise
    if child.returncode:
        raise UsageError(f"eval.py ended with exit code {child.returncode}")
    return json.loads((out / "results.json").read_text())["results"][column]


def columns_of(base, trained):
    """{run: results} beside the base → the columns of `run.table`: accuracies, and paired differences."""
    columns = {"base": {name: figures["pass@k"]["1"] for name, figures in base.items()}}
    for run, scores in trained.items():
        columns[run] = {name: figures["pass@k"]["1"] for name, figures in scores.items()}
        columns[f"{run}, difference"] = {name: paired_difference(base[name]["correct"], figures["correct"])
                                    for name, figures in scores.items()}
    return columns


def share(row, pattern, types):
    """The mean of a metric over task types, or None where a step has none."""
    values = [row.get(pattern.format(kind)) for kind in types]
    values = [value for value in values if value is not None]
    return fmean(values) if values else None


def draw(options, columns, path):
    """Shares over the steps of each run, and accuracies on the benchmarks."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = dict(zip(RUNS, ("-", ":")))
    for name in options.runs:
        run = options.out / name
        types = json.loads((run / "config.json").read_text())["types"]
        for place, (label, pattern) in enumerate(SHARES.items()):
            points = [(row["step"], share(row, pattern, types)) for row in metrics_of(run)]
            points = [point for point in points if point[1] is not None]
            if points:
                left.plot(*zip(*points), styles[name], color=f"C{place}", label=f"{label}, {name}")
    left.set(xlabel="step", ylabel="share", ylim=(0, 1), title="In training (dotted: shuffled rewards)")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=7)
    models = [name for name in columns if "difference" not in name]
    for place, name in enumerate(models):
        scores = columns[name]
        places = [number + 0.25 * place for number in range(len(scores))]
        means = [100 * mean for mean, _ in scores.values()]
        errors = [100 * error for _, error in scores.values()]
        right.bar(places, means, 0.22, yerr=errors, label=name)
    right.set_xticks(range(len(columns["base"])), columns["base"], fontsize=8)
    right.set(ylabel="%", title="Greedy accuracy before and after")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="as train.py takes it")
    add("--minutes", type=float, required=True, help="of training steps, for each run")
    add("--out", type=Path, required=True, help="folder for the runs, answers, the table and the picture")
    add("--runs", default=",".join(RUNS), help="self-play, shuffled, or both with a comma (the default)")
    add("--data", help="the benchmarks' files; default: the Hugging Face hub")
    add("--benchmarks", default=BENCHMARKS, help=f"as eval.py takes them; default: {BENCHMARKS}")
    add("--limit", type=int, help="only the first so many tasks of each benchmark")
    add("--max-response", type=int, help="tokens of an answer to a benchmark; default: as trained")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of train.py")
    options = parser.parse_args(arguments)
    options.runs = options.runs.split(",")
    if not set(options.runs) <= set(RUNS):
        parser.error(f"--runs is {','.join(options.runs)}; give self-play, shuffled, or both with a comma")
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        for name in options.runs:
            train(options, name)
        base = answers(options, options.out / options.runs[0], "base")
        trained = {name: answers(options, options.out / name, "trained") for name in options.runs}
    except UsageError as error:
        print(f"real_run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real_run.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    columns = columns_of(base, trained)
    text = markdown(table(columns, "greedy, %", {}))
    for name in options.runs:
        run = options.out / name
        text += f"\n\n{name}: {metrics_of(run)[-1]['step']} steps in {minutes_of(run):.0f} minutes"
    (options.out / "results.md").write_text(text + "\n")
    draw(options, columns, options.out / "results.png")
    print(f"\n{text}\n\ntable    {options.out}/results.md\npicture  {options.out}/results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
