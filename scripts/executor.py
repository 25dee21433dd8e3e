"""What the walls of the sandbox cost: python scripts/executor.py

Runs and validations a second of small programs, none twice, beside four other ways: the fork, exit and
wait of a bare interpreter with the same modules loaded; the same fork, whose child runs the program
without any wall, which no run in a fresh process can beat; `python -c` for each run, which is as fresh
but has no walls; and a pool of processes that exec in-process and stay dirty, which is fast and lets a
program spoil, hang or kill all that come after it.
"""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

from executor import Executor  # noqa: E402

PROGRAMS = [
    "def f(x):\n    return sorted(x)[::-1]",
    "def f(x):\n    total = 0\n    for i in x:\n        total += i * i\n    return total",
    "from collections import Counter\ndef f(x):\n    return dict(Counter(x))",
    "import math\ndef f(x):\n    return [math.factorial(i % 20) for i in x]",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n"
    "def f(x):\n    return [Node(i).value for i in x]",
]
SECONDS = 4                    # of each measurement
BARE = """
import gc, os, sys, time
sys.path.insert(0, sys.argv[1])
import executor
for name in [*executor.ALLOWED, *executor._PRELOADED]:
    try:
        __import__(name)
    except ImportError:
        pass
gc.collect(); gc.freeze()
programs, (end, wire) = eval(sys.argv[3]), os.pipe()
done, start = 0, time.perf_counter()
while time.perf_counter() - start < float(sys.argv[2]):
    pid = os.fork()
    if pid == 0:
        if programs:
            space = {}
            exec(programs[done % 5] + f"\\n# {done}", space)
            os.write(wire, repr(eval(f"f([{done}, 2, {done % 7}, 1])", space)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    if programs:
        assert os.read(end, 1000)
    done += 1
print(done / (time.perf_counter() - start))
"""


def jobs(count):
    return [(PROGRAMS[i % 5] + f"\n# {i}", f"[{i}, 2, {i % 7}, 1]") for i in range(count)]


def rate(work, batch):
    """Jobs a second of `work`, which takes a batch of jobs."""
    work(batch[:50])
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        work(batch)
        done += len(batch)
    return done / (time.perf_counter() - start)


def bare(cores, programs=()):
    """Forks a second, on so many cores at once; with programs each child runs one, without any wall."""
    processes = [subprocess.Popen([sys.executable, "-s", "-S", "-B", "-c", BARE, ROOT, str(SECONDS), repr(programs)],
                                  stdout=subprocess.PIPE, text=True) for _ in range(cores)]
    return sum(float(process.communicate()[0]) for process in processes)


def interpreter(job):
    """`python -c` for one run."""
    code = f"{job[0]}\nprint(repr(f({job[1]})))"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True).stdout


def dirty(job):
    """exec in a process that others have used, and others will."""
    space = {}
    exec(job[0], space)
    return repr(eval(f"f({job[1]})", space))


def main():
    print("| a second | " + " | ".join(f"{n} worker{'s' * (n > 1)}" for n in (1, 2)) + " |\n| --- | ---: | ---: |")
    rows = {"bare fork, exit and wait": [bare(n) for n in (1, 2)],
            "the same, and the child runs the program": [bare(n, PROGRAMS) for n in (1, 2)]}
    for name in ("run", "validate"):
        rows[f"Executor.{name}"] = []
        for workers in (1, 2):
            with Executor(workers=workers) as executor:
                rows[f"Executor.{name}"].append(rate(getattr(executor, name), jobs(500)))
    for name, one, size in (("`python -c` for each run", interpreter, 20), ("a pool that reuses its processes", dirty, 2000)):
        rows[name] = []
        for workers in (1, 2):
            with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                rows[name].append(rate(lambda batch: list(pool.map(one, batch, chunksize=8)), jobs(size)))
    for name, rates in rows.items():
        print(f"| {name} | " + " | ".join(f"{each:,.0f}" for each in rates) + " |")
    ratios = [run / fork for run, fork in zip(rows["Executor.run"], rows["bare fork, exit and wait"])]
    print("\nruns to bare forks: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
