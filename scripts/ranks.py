"""What several ranks bring: python scripts/ranks.py

    python scripts/ranks.py --seeds 0,1,2   # the demonstration with one rank and with two; needs two idle cores
    python scripts/ranks.py --simulate      # seconds a step on 1 to 64 cards, from assumptions that it prints
"""

import argparse
import heapq
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import read_rows
from tables import markdown

# A 3B model on a 24 GB card, as scripts/reproduce.py estimates it: decoding waits for memory and many small kernels, a token takes
# as long for one row as for all. Update and judging are for the default batch on one card.
TOKEN, ROWS, UPDATE, JUDGE = 0.031, 64, 90.0, 3.0      # seconds, rows, seconds, seconds
GRADIENT, NETWORK = 0.24, 1.25                         # GB of an adapter of rank 32 in fp32; GB/s, as 10 GbE has
MEAN, LONGEST = 400, 2048                              # tokens of a response; lengths are geometric


def demonstration(ranks, seed, out):
    """(seconds of the steps, held-out mean at the end) of README's demonstration with so many ranks."""
    folder = out / f"{ranks}-{seed}"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    rows, begun = read_rows(folder / "metrics.jsonl", {"step": int}), (folder / "config.json").exists()
    if not (rows and rows[-1]["step"] == json.loads((folder / "config.json").read_text())["steps"]):
        flags = ["--resume"] if begun else ["--seed", str(seed), "--workers", str(ranks), "--out"]
        subprocess.run([sys.executable, *launch, "train.py", *flags, str(folder)], cwd=ROOT, check=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = read_rows(folder / "metrics.jsonl", {"step": int})
    return sum(row.get("seconds/total", 0) for row in rows), 100 * rows[-1]["heldout/mean"]


def measure(seeds, out):
    lines = [["seed", "1 rank, s", "2 ranks, s", "ratio", "1 rank, %", "2 ranks, %"]]
    for seed in seeds:
        (alone, score), (together, joint) = demonstration(1, seed, out), demonstration(2, seed, out)
        lines.append([seed, f"{alone:.0f}", f"{together:.0f}", f"{together / alone:.2f}", f"{score:.1f}", f"{joint:.1f}"])
    print(markdown(lines))


def sampling(responses, cards, rng):
    """Seconds until the last of `responses` is finished: ROWS at once on each card, a free row takes the next."""
    rows, end = [0.0] * (ROWS * cards), 0.0
    for _ in range(responses):
        length = min(LONGEST, 1 + int(rng.expovariate(1 / MEAN)))
        start = heapq.heappop(rows)
        heapq.heappush(rows, start + length * TOKEN)
        end = max(end, start + length * TOKEN)
    return end


def simulate():
    """A step for the default batch (B 16, n 8), and for one that grows with the cards up to the paper's (B 64)."""
    lines = [["cards", "B 16: s a step", "speedup", "B 64: s a step", "speedup"]]
    for cards in (1, 2, 4, 8, 16, 32, 64):
        line = [cards]
        for batch in (16, 64):
            times = []
            for n in (1, cards):
                rng = random.Random(0)
                sampled = sum(sampling(count, n, rng) for count in (3 * batch, 3 * batch * 8, 3 * batch))
                work = (UPDATE + JUDGE) * batch / 16 / n
                times.append(sampled + work + (2 * GRADIENT * (n - 1) / n / NETWORK))
            line += [f"{times[1]:.0f}", f"{times[0] / times[1]:.1f}"]
        lines.append(line)
    print(f"assumed: {TOKEN * 1000:.0f} ms a token for up to {ROWS} rows, responses of {MEAN} tokens on average and "
          f"{LONGEST} at most,\nan update of {UPDATE:.0f} s and judging of {JUDGE:.0f} s for B 16 on one card, "
          f"gradients of {GRADIENT} GB over {NETWORK} GB/s\n")
    print(markdown(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ranks")
    options = parser.parse_args()
    simulate() if options.simulate else measure([int(seed) for seed in options.seeds.split(",")], options.out)
