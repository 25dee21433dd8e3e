"""Speed of the sandbox beside the obvious alternatives: python benchmarks/executor.py

Runs and validations a second, and latency of one job at a time. The alternatives: `python -c` for
each run, which is as fresh but has no walls; and a pool of processes that exec in-process and stay
dirty, which is fast and lets a program spoil, hang or kill all that come after it.
"""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from executor import Executor  # noqa: E402

PROGRAMS = [
    "def f(x):\n    return sorted(x)[::-1]",
    "def f(x):\n    total = 0\n    for i in x:\n        total += i * i\n    return total",
    "from collections import Counter\ndef f(x):\n    return dict(Counter(x))",
    "import math\ndef f(x):\n    return [math.factorial(i % 20) for i in x]",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n"
    "def f(x):\n    return [Node(i).value for i in x]",
]
SECONDS = 4                                           # of each measurement


def jobs(count, fresh=False):
    """Small jobs; fresh: no program twice, so that nothing can be kept from one to the next."""
    return [(PROGRAMS[i % 5] + f"\n# {i}" * fresh, f"[{i}, 2, {i % 7}, 1]") for i in range(count)]


def rate(work, batch):
    """Jobs a second of `work`, which takes a batch of jobs."""
    work(batch[:50])
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        work(batch)
        done += len(batch)
    return done / (time.perf_counter() - start)


def latencies(work, batch):
    times = []
    for job in batch:
        start = time.perf_counter()
        work([job])
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return times[len(times) // 2], times[len(times) * 99 // 100]


def interpreter(job):
    """`python -c` for one run."""
    code = f"{job[0]}\nprint(repr(f({job[1]})))"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True).stdout


def dirty(job):
    """exec in a process that others have used, and others will."""
    space = {}
    exec(job[0], space)
    return repr(eval(f"f({job[1]})", space))


def line(name, workers, per_second, median=None, tail=None):
    print(f"| {name:<34} | {workers:>7} | {per_second:>8,.0f} "
          + (f"| {median:>9.2f} | {tail:>9.2f} |" if median else "|           |           |"), flush=True)


def main():
    start = time.perf_counter()
    with Executor(workers=2) as executor:
        executor.run(jobs(2))
        print(f"start of an Executor and its first two runs: {time.perf_counter() - start:.2f} s\n")
    print(f"| {'':<34} | workers | a second | median ms |    p99 ms |")
    print(f"| {'-' * 34} | ------: | -------: | --------: | --------: |")
    for workers in (1, 2):
        with Executor(workers=workers) as executor:
            executor.validate(jobs(20))
            delays = latencies(executor.run, jobs(300)) if workers == 1 else ()
            line("runs", workers, rate(executor.run, jobs(500)), *delays)
            fresh = iter(range(1 << 30))
            line("runs, no program twice", workers, rate(lambda batch: executor.run(
                [(f"{text}\n# {next(fresh)}", argument) for text, argument in batch]), jobs(500)))
            delays = latencies(executor.validate, jobs(300)) if workers == 1 else ()
            line("validations", workers, rate(executor.validate, jobs(300)), *delays)
    for workers in (1, 2):
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            work = lambda batch: list(pool.map(interpreter, batch))  # noqa: E731
            line("python -c for each run", workers, rate(work, jobs(50)),
                 *(latencies(work, jobs(50)) if workers == 1 else ()))
    for workers in (1, 2):
        with multiprocessing.Pool(workers) as pool:
            work = lambda batch: pool.map(dirty, batch, chunksize=1)  # noqa: E731
            line("dirty pool (exec in-process)", workers, rate(work, jobs(500)),
                 *(latencies(work, jobs(300)) if workers == 1 else ()))


if __name__ == "__main__":
    main()
