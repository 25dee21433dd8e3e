"""Verdicts, rewards and advantages: everything between an answer and the policy gradient.

    answer ──is_correct──▶ solve rates ──learnability──▶ r_propose ┐
       └────is_correct──▶ r_solve (0 or 1) ────────────────────────┴─composite_reward──▶ R
    R of a batch ──task_relative_advantages──▶ one advantage a rollout

Plain Python numbers throughout: a batch has some hundred rewards, and floats are easy to check. Held-out
tasks are read here as well (`load_heldout`): a user's file is checked by the runs that judge an answer.
"""

import contextlib
import json
import math
from collections import defaultdict
from enum import Enum
from pathlib import Path

from executor import parse_literal, same
from tasks import KINDS, Task, UsageError

# Equation 6. The official code gives −1 also to a well-formed proposal that does not validate.
FAILED = -0.5      # well formed, but wrong (solver) or invalid (proposer)
MALFORMED = -1.0   # not in the format that was asked for, also when cut off at the token limit


class Verdict(str, Enum):
    """What became of a response; its value is the word in the logs."""

    CORRECT = "correct"
    WRONG = "wrong"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"
    VALID = "valid"
    REPEAT = "repeat"    # a valid proposal whose program was seen before
    INVALID = "invalid"
    UNSAFE = "unsafe"    # a proposal or an answer that the sandbox refused


def is_correct(tasks, answers, executor):
    """Judge solver answers; the verdict needs no model and no trust in the text.

    tasks: [Task]; answers: [str or None], None for a malformed response. → [bool], in order.

    deduction: the answer is a literal equal to the output, with equal types all the way down
               (True is not 1, 1 is not 1.0); it is read in the sandbox, never evaluated.
    abduction: the program, run on the answer as input, returns the output; any such input counts
               (the function need not be injective).
    induction: the answer, a program, maps every hidden input to its output; at least one is hidden.

    All runs of the batch go to the sandbox together. Expected outputs never enter the sandbox.
    """
    return [verdict is Verdict.CORRECT for verdict, _ in judge(tasks, answers, executor)]


def judge(tasks, answers, executor):
    """`is_correct`, with the reasons. → [(Verdict, one line or '')], in order."""
    checks = [[] if answer is None else KINDS[task.type].judge(task, answer)
              for task, answer in zip(tasks, answers, strict=True)]
    jobs = dict.fromkeys(job[:2] for check in checks for job in check)  # tries often say the same
    programs = [job for job in jobs if job[0] is not None]
    texts = [job for job in jobs if job[0] is None]
    runs = dict(zip(programs, executor.run(programs)))
    runs |= zip(texts, executor.read([text for _, text in texts]))
    return [_verdict(answer, [(runs[program, text], output) for program, text, output in check])
            for answer, check in zip(answers, checks)]


def _verdict(answer, runs):
    failed = [run for run, output in runs if not (run.ok and _equal(run.output, output))]
    if answer is None:
        return Verdict.MALFORMED, ""
    if runs and not failed:
        return Verdict.CORRECT, ""
    return blame(failed, Verdict.WRONG)


def blame(runs, verdict):
    """(`verdict`, or UNSAFE if the sandbox refused a run; what the first run that is not ok says, or '')"""
    reason = next((f"{run.status}: {run.error}" for run in runs if not run.ok), "")
    return Verdict.UNSAFE if any(run.status == "unsafe" for run in runs) else verdict, reason


def _equal(output, expected):
    """Whether two texts are literals of the same value."""
    try:
        return same(parse_literal(output), parse_literal(expected))
    except ValueError:  # over the limit of a literal
        return False


def load_heldout(source, limit=None, executor=None):
    """{split: [Task]} of the held-out tasks of the tiny model ("tiny"), of CRUXEval from the Hugging Face hub
    ("cruxeval"), or of a file of JSON lines with `split` and the fields of a Task, or the fields of CRUXEval.

    limit: at most so many tasks of each type and split, the first ones. executor: run each task's program of
    a file and compare with its outputs. Raises UsageError with the line's number.
    """
    splits, where = defaultdict(list), ""
    try:
        for number, row in enumerate(_heldout_rows(source), 1):
            where = f"line {number}: "
            for part in _parts(json.loads(row) if isinstance(row, bytes) else row):
                split, task = _heldout_task(part, None if source in ("tiny", "cruxeval") else executor)
                if limit is None or sum(other.type == task.type for other in splits[split]) < limit:
                    splits[split].append(task)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"cannot read the held-out tasks {source} (JSON lines with split, type and the "
                         f"fields of a task): {where}{what}") from error
    return dict(splits)


def _heldout_rows(source):
    """The lines of a file, or the rows of CRUXEval."""
    if source == "cruxeval":
        with reaching_the_hub() as datasets:
            return datasets.load_dataset("cruxeval-org/cruxeval", split="test",
                                         revision="e536997e8381421cb107d285b4ae542aa12c6c31")
    path = Path(__file__).parent / "tiny" / "heldout.jsonl" if source == "tiny" else Path(source)
    return path.read_bytes().splitlines()


@contextlib.contextmanager
def reaching_the_hub():
    """The library `datasets`, slow to import; what it and the network raise inside becomes an OSError."""
    import datasets
    from huggingface_hub.utils import httpx
    try:
        yield datasets
    except (datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise OSError(f"the Hugging Face hub: {error}") from error


def _parts(row):
    """A row of CRUXEval is a task of each type that a triplet can be; any other is one task."""
    if "code" not in row:
        return [row]
    return [{"split": "cruxeval", "type": kind, "program": row["code"], **row}
            for kind in KINDS if KINDS[kind].is_triplet]


def _heldout_task(row, executor):
    """A row of a held-out file → (split, Task). Raises ValueError, KeyError or TypeError."""
    if row["type"] not in KINDS:
        raise ValueError(f"unknown type {row['type']!r}")
    kind = KINDS[row["type"]]
    needed = {"program", *(("inputs", "outputs") if "{pairs}" in kind.solve else ("input", "output"))}
    task = Task.from_dict({name: row[name] for name in Task.__match_args__ if name in row or name in needed})
    texts = [row["split"], task.program, task.input, task.output, task.message, *task.inputs, *task.outputs]
    if {type(task.inputs), type(task.outputs)} != {tuple} or {*map(type, texts)} != {str}:
        raise ValueError("a field is not text, or inputs or outputs are no list of texts")
    jobs, outputs = kind.runs(task), task.outputs or (task.output,)
    if len(jobs) != len(outputs) or not kind.judge(task, ""):
        raise ValueError("it has too few pairs of inputs and outputs")
    for job, run, output in zip(jobs, executor.run(jobs) if executor else (), outputs):
        if not run.ok or not _equal(run.output, output):
            raise ValueError(f"f({job[1]}) gives {run.output or run.error}, and the task says {output}")
    return row["split"], task


def learnability(success_rate, zero=0.0):
    """Equation 4: 1 − r̄ for a task that is solved sometimes, `zero` if always or never.

    The official code pays −0.5 at both ends (`--zero-learnability official`).

    >>> learnability(0.25), learnability(1.0)
    (0.75, 0.0)
    """
    if not 0.0 <= success_rate <= 1.0:
        raise ValueError(f"a success rate lies between 0 and 1, not at {success_rate}")
    return zero if success_rate in (0.0, 1.0) else 1.0 - success_rate


def composite_reward(reward, well_formed):
    """Equation 6: the role's own reward, or the penalty for a failure or a malformed response.

    reward: r_propose or r_solve, or None if the response is well formed but failed.

    >>> composite_reward(0.75, True), composite_reward(None, True), composite_reward(None, False)
    (0.75, -0.5, -1.0)
    """
    if not well_formed:
        return MALFORMED
    return FAILED if reward is None else float(reward)


def task_relative_advantages(rewards, groups):
    """Equation 8, TRR++: (r − mean) / std within each of the groups, normally six.

    rewards: [float]; groups: one hashable a reward, normally (type, role). → [float], in order.
    Mean and (population) std are over samples. The official code whitens over tokens, so that long
    answers weigh more. A group whose rewards are all equal has nothing to say: advantage 0.

    >>> task_relative_advantages([1.0, 0.0, 7.0], ["a", "a", "b"])
    [1.0, -1.0, 0.0]
    """
    members = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(float(reward))
    moments = {}
    for group, values in members.items():
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        # min == max decides, not spread == 0: rounding leaves 1e-17 behind, and dividing by it is ±1
        moments[group] = mean, (0.0 if min(values) == max(values) else spread)
    return [(reward - moments[group][0]) / moments[group][1] if moments[group][1] else 0.0
            for reward, group in zip(rewards, groups)]


def mean_error(values):
    """(mean, standard error) of independent values; for hits and misses this is the binomial error.

    >>> mean_error([1, 1, 0, 0])
    (0.5, 0.25)
    """
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
