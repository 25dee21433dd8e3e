"""README's learning figure and table: three seeds of self-play, two with shuffled rewards.

    python scripts/learning.py            # runs train.py five times, one after the other
    python scripts/learning.py --out DIR  # keeps the runs there; those that are complete are not run again

Each run is `python train.py --seed S [--shuffle-rewards]`. Differences are last step minus step 0; their
standard error treats the two measurements as independent, which is too wide for one set of tasks.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from run import read_rows
from tasks import TASK_TYPES

RUNS = [("self-play", seed, []) for seed in (0, 1, 2)] + [("shuffled rewards", seed, ["--shuffle-rewards"]) for seed in (0, 1)]


def metrics_of(folder):
    return read_rows(folder / "metrics.jsonl", {"step": int})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    options = parser.parse_args()
    colors = {"self-play": "tab:blue", "shuffled rewards": "tab:gray"}
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    print("| run | seed | " + " | ".join(TASK_TYPES) + " | mean | mean, difference | step seconds |\n|---|---|" + "---|" * 6)
    for name, seed, flags in RUNS:
        folder = options.out / f"{name.split()[0]}-{seed}"
        rows = metrics_of(folder)
        if not (rows and rows[-1]["step"] == json.loads((folder / "config.json").read_text())["steps"]):
            begun = (folder / "config.json").exists()
            command = ["--resume", str(folder)] if begun else ["--out", str(folder), "--seed", str(seed), *flags]
            subprocess.run([sys.executable, str(ROOT / "train.py"), *command], check=True, stdout=subprocess.DEVNULL)
            rows = metrics_of(folder)
        seen = [row for row in rows if "heldout/mean" in row]
        first, last = seen[0], seen[-1]
        cells = [f"{100 * first[f'heldout/{key}']:.1f} → {100 * last[f'heldout/{key}']:.1f}" for key in (*TASK_TYPES, "mean")]
        difference = 100 * (last["heldout/mean"] - first["heldout/mean"])
        error = 100 * math.hypot(last["heldout_stderr/mean"], first["heldout_stderr/mean"])
        seconds = sorted(row["seconds/total"] for row in rows if "seconds/total" in row)
        print(f"| {name} | {seed} | {' | '.join(cells)} | {difference:+.1f} ± {error:.1f} | {seconds[len(seconds) // 2]:.1f} |")
        steps, values = [row["step"] for row in seen], [row["heldout/mean"] for row in seen]
        axis.plot(steps, values, color=colors[name], marker="o", markersize=3, label=name if seed == 0 else None)
        axis.fill_between(steps, [row["heldout/mean"] - row["heldout_stderr/mean"] for row in seen],
                          [row["heldout/mean"] + row["heldout_stderr/mean"] for row in seen], color=colors[name], alpha=0.15)
    axis.set(xlabel="step", ylabel="held-out accuracy, greedy, mean of three types", ylim=(0, None),
             title="The tiny model teaches itself; with shuffled rewards it does not")
    axis.grid(alpha=0.3)
    axis.legend()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "learning.png", dpi=120)
    print("\npicture: docs/learning.png")


if __name__ == "__main__":
    main()
