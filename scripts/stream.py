"""What one stream a step saves: python scripts/stream.py [--other CHECKOUT] [--steps 20] [flags of train.py]

Trains here, and in another checkout if one is given, with the same flags, one after the other and in turns. Counts
the decoding passes of a step (tokens that the model writes one after the other, however many rows), and prints seconds
of sampling, of waiting for the sandbox, and of the whole step. Held-out evaluations and seeding are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNT = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
counts, path = [0], sys.argv.pop(1)
import transformers, train
plain = transformers.GenerationMixin.generate

def generate(model, ids, **options):
    out = plain(model, ids, **options)
    counts[-1] += out.shape[1] - ids.shape[1]
    return out

transformers.GenerationMixin.generate = generate
record = train.Run.record

def recorded(run, *arguments):
    record(run, *arguments)
    counts.append(0)

train.Run.record = recorded
code = train.main(sys.argv[1:])
with open(path, "w") as file:
    json.dump(counts, file)
sys.exit(code)
"""
PHASES = ("generate", "execute", "update", "total")


def measure(checkout, flags, folder):
    """One run. → {figure: [its value in each step but the last, which ends with an evaluation]}"""
    counts = folder / "counts.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", COUNT, str(checkout), str(counts), *flags, "--eval-every", "0", "--heldout-limit", "1",
                    "--out", str(folder / "run")], cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:-1]
    figures = {"passes": json.loads(counts.read_text())[1:len(rows) + 1]}
    for phase in PHASES:
        figures[phase] = [row[f"seconds/{phase}"] for row in rows]
    figures["tokens"] = [row["tokens_per_second"] * row["seconds/generate"] for row in rows]
    return figures


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", help="a checkout of another commit (git worktree add FOLDER COMMIT)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each checkout, in turns, with other seeds")
    options, flags = parser.parse_known_args(arguments)
    checkouts = {"here": ROOT}
    if options.other:
        checkouts = {"other": Path(options.other).resolve(), "here": ROOT}
    found = {name: [] for name in checkouts}
    for seed in range(options.rounds):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measure(checkout, ["--steps", str(options.steps + 1), "--seed", str(seed), *flags], Path(folder)))
    names = list(found["here"][0])
    print("mean of a step".ljust(16), *(name.rjust(10) for name in names))
    means = {}
    for checkout, runs in found.items():
        means[checkout] = {name: statistics.fmean(statistics.fmean(run[name]) for run in runs) for name in names}
        print(checkout.ljust(16), *(f"{means[checkout][name]:10.2f}" for name in names))
    if options.other:
        print("here / other".ljust(16), *(f"{means['here'][name] / means['other'][name]:10.2f}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
