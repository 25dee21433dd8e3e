"""Held-out accuracy: python eval.py, or python eval.py --run RUN to see the trained model beside its base.

The held-out tasks ship with the tiny model (`tiny/heldout.jsonl`, made by `tiny/make.py`): programs
that share no syntax tree with its pretraining data and are never proposed from. train.py measures
itself with the same function.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

from azr import TINY, UsageError, base_weights, load_policy, solve
from executor import Executor
from tasks import TASK_TYPES, Task

HELDOUT = TINY / "heldout.jsonl"


def load_heldout(path=HELDOUT, limit=None):
    """{split: [Task]} from a file of JSON lines with `split` and the fields of a Task.

    limit: at most so many tasks of each type and split, the first ones.
    """
    splits, count = defaultdict(list), defaultdict(int)
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                key = row["split"], row["type"]
                count[key] += 1
                if limit is None or count[key] <= limit:
                    fields = {name: row[name] for name in Task.__dataclass_fields__ if name in row}
                    splits[row["split"]].append(Task.from_dict(fields))
    except OSError as error:
        raise UsageError(f"cannot read the held-out tasks {path}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a file of held-out tasks (JSON lines with split, type and "
                         f"the fields of a task): {error}") from error
    return dict(splits)


def heldout_accuracy(policy, executor, tasks, cfg, greedy=True):
    """Accuracy on held-out tasks. → {type: (accuracy, standard error, tasks)}

    greedy: one greedy answer a task. Otherwise one at temperature 1, from a random stream of its
    own, so that measuring more often does not change a run.
    """
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        rollouts = solve(policy, executor, tasks, cfg, greedy=greedy)
    scores = {}
    for type in TASK_TYPES:
        correct = [rollout.verdict == "correct" for rollout in rollouts if rollout.type == type]
        if correct:
            scores[type] = *binomial(sum(correct), len(correct)), len(correct)
    return scores


def binomial(hits, n):
    """(share, its standard error) of `hits` out of n."""
    share = hits / n
    return share, math.sqrt(share * (1 - share) / n)


def mean_score(scores):
    """The unweighted mean over the types, and its standard error."""
    values = list(scores.values())
    return (sum(score for score, _, _ in values) / len(values),
            math.sqrt(sum(error ** 2 for _, error, _ in values)) / len(values))


def table(columns):
    """{column: {type: (accuracy, error, n)}} as lines of text, one row a type and one for the mean."""
    names = list(columns)
    lines = ["held-out accuracy  " + "".join(f"{name:>18}" for name in names)]
    for row in (*TASK_TYPES, "mean"):
        cells = []
        for name in names:
            scores = columns[name]
            value = mean_score(scores) if row == "mean" else scores.get(row)
            cells.append(f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if value else "–")
        lines.append(f"{row:<19}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Held-out accuracy of a model, base and trained side by side.")
    parser.add_argument("--model", help="tiny (the default), a local folder or a Hugging Face name")
    parser.add_argument("--run", help="a run folder of train.py: its model and its adapter")
    parser.add_argument("--adapter", help="a PEFT adapter folder for --model")
    parser.add_argument("--heldout", default=str(HELDOUT), help="JSON lines of tasks; default: the tiny model's")
    parser.add_argument("--split", default="easy", help="which split of the file; default: easy")
    parser.add_argument("--limit", type=int, help="at most so many tasks a type")
    parser.add_argument("--max-response", type=int, default=0, help="tokens of a response; default: as trained")
    parser.add_argument("--sampled", action="store_true", help="one answer at temperature 1 instead of greedy")
    parser.add_argument("--workers", type=int, help="sandbox workers; default: all cores")
    options = parser.parse_args(arguments)
    try:
        evaluate(options)
    except UsageError as error:
        sys.exit(_complain(parser.prog, error))


def _complain(program, error):
    print(f"{program}: {error}", file=sys.stderr)
    return 2


def evaluate(options):
    trained = {"model": "tiny", "max_response": 128, "lora_rank": 32}
    adapter = options.adapter
    if options.run:
        run = Path(options.run)
        try:
            trained |= json.loads((run / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{run} is not a run folder: cannot read its config.json") from error
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise UsageError(f"{run} has no adapter/ folder yet")
    splits = load_heldout(options.heldout, options.limit)
    if options.split not in splits:
        raise UsageError(f"no split {options.split!r} in {options.heldout}; it has {', '.join(splits)}")
    policy = load_policy(options.model or trained["model"], lora_rank=0, adapter=adapter)
    cfg = SimpleNamespace(max_response=options.max_response or trained["max_response"])
    columns = {}
    with Executor(options.workers) as executor:
        contexts = {"base": base_weights(policy)}
        if adapter:
            contexts["trained"] = torch.no_grad()
        for name, context in contexts.items():
            with context:
                columns[name] = heldout_accuracy(policy, executor, splits[options.split], cfg,
                                                 greedy=not options.sampled)
    print(table(columns))
    return columns


if __name__ == "__main__":
    main()
