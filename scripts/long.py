"""The table of long runs in docs/speed.md: what keeps accuracy and diversity, and what grows over 300 steps.

    python scripts/long.py            # two runs of train.py, one after the other: an hour and more
    python scripts/long.py --out DIR  # keeps the runs there; those that are complete are not run again

The last three columns are medians of the first and the last 50 steps; open descriptors of train.py are read from /proc every
ten seconds (Linux alone), resident memory too, for whoever wants to look.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tables import markdown

ROOT = Path(__file__).resolve().parent.parent

STEPS = 300
RUNS = {
    "default": "",
    "no deduplication": "--no-dedup",
}
DIVERSITY = ("unique_ast", "edit_distance", "trivial")


def rows_of(path):
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line may be cut
    return [json.loads(line) for line in lines]


def run(folder, flags):
    """train.py into `folder`, from its checkpoint if it has one, with its process looked at."""
    done = rows_of(folder / "metrics.jsonl")
    if done and done[-1]["step"] >= STEPS:
        return
    command = ["--resume", str(folder)] if (folder / "config.json").exists() else [
        "--steps", str(STEPS), "--eval-every", "20", "--out", str(folder), *flags.split()]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        time.sleep(10)
        seen = len(rows_of(folder / "metrics.jsonl")) - 1
        if seen > 0 and process.poll() is None:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            look = {"step": seen, "descriptors": len(os.listdir(f"/proc/{process.pid}/fd")),
                    "resident_gb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)}
            with open(folder / "process.jsonl", "a") as file:
                file.write(json.dumps(look) + "\n")
    done = rows_of(folder / "metrics.jsonl")
    if process.returncode or done[-1]["step"] < STEPS:
        sys.exit(f"{folder} is not complete; python train.py --resume {folder} says why, the same command goes on")


def summary(folder):
    """Cells of the table: held-out at its best and at the end, diversity of the last 50 steps, what grew."""
    rows, looks = rows_of(folder / "metrics.jsonl"), rows_of(folder / "process.jsonl")
    held = [row["heldout/mean"] for row in rows if "heldout/mean" in row]
    error = next(row["heldout_stderr/mean"] for row in reversed(rows) if "heldout/mean" in row)
    cells = [f"{100 * max(held):.1f}", f"{100 * held[-1]:.1f} ± {100 * error:.1f}"]
    for name in DIVERSITY:
        values = [row[f"diversity/{name}"] for row in rows[-50:] if row.get(f"diversity/{name}") is not None]
        cells.append(f"{statistics.mean(values):.2f}")
    shares = [value for row in rows[-50:] for key, value in row.items() if key.endswith("/learnable") and value is not None]
    cells.append(f"{statistics.mean(shares):.2f}")
    def ends(rows, key, lo, hi):
        ours = [row[key] for row in rows if lo < row["step"] <= hi]
        return statistics.median(ours) if ours else float("nan")
    for source, key, form in ((rows, "seconds/total", ".1f"), (rows, "memory_gb", ".2f"), (looks, "descriptors", ".0f")):
        cells.append(" → ".join(f"{ends(source, key, lo, hi):{form}}" for lo, hi in ((0, 50), (STEPS - 50, STEPS))))
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "long")
    options = parser.parse_args()
    lines = [["python train.py --steps 300", "best", "end", *(name.replace("_", " ") for name in DIVERSITY),
              "learnable share", "seconds a step", "peak memory, GB", "descriptors"]]
    for name, flags in RUNS.items():
        folder = options.out / name.replace(" ", "-")
        run(folder, flags)
        lines.append([f"`{flags}`" if flags else "(default)", *summary(folder)])
    print(markdown(lines))


if __name__ == "__main__":
    main()
