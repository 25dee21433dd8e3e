"""Controls and variants for docs/evidence.md: train.py with one part of the proposer's side replaced.

    python scripts/controls.py --tasks grammar --follow RUN --no-train-proposer …   # the rest goes to train.py
    python scripts/controls.py --tasks lengths --follow RUN --no-train-proposer …
    python scripts/controls.py --tasks replayed --follow RUN --no-train-proposer …
    python scripts/controls.py --reward variance …
    python scripts/controls.py --refuse-idle …
    python scripts/controls.py --judge-again …

--tasks: where a step's new tasks come from. Their lengths (in statements, by type) are those of the tasks that RUN, a run
that trains its proposer, accepted in the same step.

    replayed  they are these very tasks
    grammar   drawn from the grammar that the base was pretrained on, as many; a length that has run out gives way to the next
    lengths   of the run's own proposer, which proposes up to ROUNDS times over; what has the wrong length is dropped, so
              there may be fewer

--reward: what a new task earns whose tries were solved with rate r, instead of equation 4.

    variance  4·r·(1 − r), which pays most for what is solved half of the time
    novelty   1 whatever r is: only being valid and new counts

--refuse-idle: a proposal with an idle statement, one that can be left out and the output stays the same, counts as a repeat:
it earns nothing and is not kept, as long as there is deduplication. Seed tasks are not looked at. "New programs" are then those
that are neither repeats nor refused.

--judge-again: a step's proposals enter the update of the next step, in which the solver, newer by an update, tries their
tasks --samples times more; their reward follows from both rates. It does not train on these tries. Each update takes the
logprobs of the policy that it trains as the old ones, so nothing corrects for the update in between. After a --resume
the proposals of the step before it are lost.

To go on with a stopped run, give these flags again with --resume: `train.py --resume` alone goes on without the control.
"""

import argparse
import random
import sys
from collections import Counter, defaultdict
from dataclasses import fields
from functools import lru_cache
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

import azr  # noqa: E402
import make  # noqa: E402
import train  # noqa: E402
from evidence import statements_of  # noqa: E402
from report import read_rows  # noqa: E402
from rewards import Verdict, composite_reward, learnability, load_heldout  # noqa: E402
from tasks import KINDS, Task, TaskBuffer, UsageError  # noqa: E402

ROUNDS = 8    # of proposals in a step, at most
LONGEST = 8   # statements that the grammar is asked for; longer programs seldom stay within its bounds
REWARDS = {"variance": lambda rate, zero=0.0: 4 * rate * (1 - rate), "novelty": lambda rate, zero=0.0: 1.0}


def accepted_by(run):
    """{step: [the tasks that a run accepted]}"""
    found = defaultdict(list)
    for row in read_rows(run / "tasks.jsonl", {"step": int, "type": str, "program": str}):
        found[row["step"]].append(Task.from_dict({field.name: row[field.name] for field in fields(Task)}))
    return found


def lengths_of(tasks):
    """{type: Counter of the statements of its tasks}"""
    found = defaultdict(Counter)
    for task in tasks:
        found[task.type][statements_of(task.program)] += 1
    return found


def given(task, buffer):
    """A new task that nobody sampled. → Rollout"""
    buffer.add(task)
    return azr.Rollout("propose", task.type, [], verdict=Verdict.VALID, task=task)


def from_followed(policy, executor, buffer, cfg, followed, rng):
    """The very tasks of the followed run."""
    return [given(task, buffer) for task in followed]


def from_grammar(policy, executor, buffer, cfg, followed, rng):
    """Tasks of the grammar, as long as those of the followed run."""
    rollouts, heldout = [], heldout_programs(cfg)
    for kind, lengths in lengths_of(followed).items():
        for length in lengths.elements():
            for tries in count():  # short programs run out; then the next length is taken
                statements = max(1, min(length, LONGEST)) + tries // 100
                task, _, _ = make.draw_solution(rng, kind, statements, heldout)
                if not buffer.is_repeat(task):
                    break
            rollouts.append(given(task, buffer))
    return rollouts


def of_own(policy, executor, buffer, cfg, followed, rng):
    """The proposer's own new tasks, as many of each wanted length as it writes in ROUNDS rounds."""
    rollouts, left = [], lengths_of(followed)
    for _ in range(ROUNDS):
        types = [kind for kind in left if left[kind].total()]
        if not types:
            break
        for rollout in azr.draft(policy, executor, buffer, types, cfg):
            task = rollout.task
            if task and not buffer.is_repeat(task) and left[task.type][statements_of(task.program)] > 0:
                left[task.type][statements_of(task.program)] -= 1
                rollouts.append(rollout)
                buffer.add(task)
    return rollouts


SOURCES = {"replayed": from_followed, "grammar": from_grammar, "lengths": of_own}


@lru_cache
def heldout_programs(cfg):
    """The programs of over three statements of the held-out tasks, those that the run measures and those that lie beside them."""
    files = {Path(cfg.heldout), *Path(cfg.heldout).parent.glob("*.jsonl")} if cfg.heldout != "tiny" else ["tiny"]
    return frozenset(task.program for file in files for tasks in load_heldout(file).values() for task in tasks
                     if statements_of(task.program) > 3)


def try_out(policy, executor, rollouts, cfg):
    """Has the solver try the tasks of these rollouts. → (the tries, each task's solve rate)"""
    tries = azr.solve(policy, executor, [rollout.task for rollout in rollouts], cfg, copies=cfg.samples)
    solved = [rollout.verdict is Verdict.CORRECT for rollout in tries]
    return tries, [sum(solved[start:start + cfg.samples]) / cfg.samples for start in range(0, len(solved), cfg.samples)]


def proposing(source, run, steps):
    """A stand-in for azr.propose whose new tasks come from `source`. steps: the numbers of the coming steps."""
    followed = accepted_by(run)
    last = max((row["step"] for row in read_rows(run / "metrics.jsonl", {"step": int})), default=0)

    def propose(policy, executor, buffer, cfg):
        step = next(steps)
        if step > last:
            raise UsageError(f"--follow {run} has made {last} steps: there are no tasks for step {step}; complete it first")
        rng = random.Random(f"{cfg.seed} {step}")
        rollouts = source(policy, executor, buffer, cfg, followed[step], rng)
        estimates, rates = try_out(policy, executor, rollouts, cfg)
        for rollout, rate in zip(rollouts, rates):
            rollout.solve_rate, rollout.reward = rate, learnability(rate)
            if KINDS[rollout.type].own_program:
                rollout.traits["unique_ast"] = True
        return rollouts, [rollout.task for rollout in rollouts], estimates

    return propose


def refuse_idle():
    """Let a proposal whose own program has an idle statement count as a repeat."""
    draft, is_repeat, idle = azr.draft, TaskBuffer.is_repeat, set()

    def draft_and_shorten(policy, executor, *arguments):
        rollouts, shorter = draft(policy, executor, *arguments), []
        for task in (rollout.task for rollout in rollouts if rollout.task and KINDS[rollout.type].own_program):
            lines = task.program.split("\n")
            shorter += [(task, "\n".join(lines[:i] + lines[i + 1:])) for i in range(1, len(lines) - 1)]
        for (task, _), result in zip(shorter, executor.run((program, task.input) for task, program in shorter)):
            if result.ok and result.output == task.output:
                idle.add(task)
        return rollouts

    azr.draft = draft_and_shorten
    TaskBuffer.is_repeat = lambda buffer, task: task in idle or is_repeat(buffer, task)


def judge_again():
    """Let each step's proposals wait for the next update, and be judged a second time before it."""
    propose, set_advantages, waiting = train.propose, train.set_advantages, []

    def propose_and_judge(policy, executor, buffer, cfg):
        fresh = propose(policy, executor, buffer, cfg)
        tried = [rollout for rollout in waiting if rollout.task]
        zero = -0.5 if cfg.zero_learnability == "official" else 0.0
        for rollout, rate in zip(tried, try_out(policy, executor, tried, cfg)[1]):
            rollout.solve_rate = (rollout.solve_rate + rate) / 2
            rollout.reward = composite_reward(azr.learnability(rollout.solve_rate, zero), True)
        return fresh

    def set_advantages_of_waiting(rollouts, cfg, rng):
        fresh = [rollout for rollout in rollouts if rollout.role == "propose"]
        rollouts[:] = waiting + [rollout for rollout in rollouts if rollout.role == "solve"]
        waiting[:] = fresh
        set_advantages(rollouts, cfg, rng)

    train.propose, train.set_advantages = propose_and_judge, set_advantages_of_waiting


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--tasks", choices=SOURCES)
    parser.add_argument("--follow", type=Path, metavar="RUN", help="the run whose tasks or lengths --tasks takes")
    parser.add_argument("--reward", choices=REWARDS)
    parser.add_argument("--refuse-idle", action="store_true")
    parser.add_argument("--judge-again", action="store_true")
    options, rest = parser.parse_known_args()
    if bool(options.tasks) != bool(options.follow):
        parser.error("--tasks and --follow go together")
    if options.tasks and (options.reward or not {"--no-train-proposer", "--resume"} & {*rest}):
        parser.error("--tasks needs --no-train-proposer, and excludes --reward: nobody earns for tasks from elsewhere")
    if options.refuse_idle and {"--no-dedup", "--paper"} & {*rest}:
        parser.error("--refuse-idle needs deduplication")
    if options.judge_again and (options.tasks or "--no-train-proposer" in rest):
        parser.error("--judge-again needs a proposer that is trained; drop --tasks and --no-train-proposer")
    if options.refuse_idle:
        refuse_idle()
    if options.judge_again:
        judge_again()
    if options.reward:
        azr.learnability = REWARDS[options.reward]
    if options.tasks:
        restore = train.Run.restore

        def restore_and_count(run, *arguments):
            done = restore(run, *arguments)
            train.propose = proposing(SOURCES[options.tasks], options.follow, count((done or 0) + 1))
            return done

        train.Run.restore = restore_and_count
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main())
