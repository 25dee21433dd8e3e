"""From verdicts to figures: accuracy, pass@k, and the paired difference of two models, with standard errors.

Samples of one problem are not independent. Means and errors are therefore taken over problems.
"""

import math
import statistics
from collections import defaultdict

from rewards import mean_error


def pass_at_k(n, correct, k):
    """The chance that k of n samples, drawn without replacement, hold a correct one: unbiased.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def paired_difference(before, after):
    """(mean, standard error) of after − before over the same problems: {key: [correct]} each."""
    return mean_error([statistics.fmean(hits) - statistics.fmean(before[key]) for key, hits in after.items()])


def score(problems, rows):
    """The figures of one benchmark: {name: a count, (mean, standard error), or None where nothing says}.

    rows: answers to these problems, with their verdicts. A problem without an answer counts as wrong.
    """
    hits = _by_problem(rows, "correct")
    n = min(map(len, hits.values()), default=1)
    correct = {problem.key: hits.get(problem.key, [False] * n) for problem in problems}
    passes = {}
    for k in sorted({n, *(2 ** i for i in range(n.bit_length()))}):
        passes[k] = mean_error([pass_at_k(len(tries), tries.count(True), k) for tries in correct.values()])
    accuracy, error = passes[1]
    return {"accuracy": accuracy, "stderr": error, "n": len(correct), "samples": n,
            "unanswered": len(correct) - len(hits), "pass@k": passes,
            "base_tests": _mean(rows, "base", correct), "well_formed": _mean(rows, "well_formed", correct),
            "truncated": _mean(rows, "truncated", hits), "response_tokens": _mean(rows, "tokens", hits),
            "correct": correct}


def _by_problem(rows, name):
    """{id: the values that its rows have of this name}"""
    values = defaultdict(list)
    for row in rows:
        if row.get(name) is not None:
            values[row["id"]].append(row[name])
    return values


def _mean(rows, name, keys):
    """(mean, standard error) over problems, or None if no row has this value."""
    values = _by_problem(rows, name)
    return mean_error([statistics.fmean(values.get(key, [0])) for key in keys]) if values else None
