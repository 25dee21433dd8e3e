"""Controls and variants for docs/evidence-details.md: train.py with one part of the proposer's side replaced.

    python scripts/controls.py --tasks grammar --follow RUN --no-train-proposer …   # the rest goes to train.py
    python scripts/controls.py --tasks lengths --follow RUN --no-train-proposer …
    python scripts/controls.py --tasks replayed --follow RUN --no-train-proposer …
    python scripts/controls.py --reward variance …
    python scripts/controls.py --refuse-idle …
    python scripts/controls.py --judge-again …

--tasks: where a step's new tasks come from. Their lengths (in statements, by type) are those of the tasks that
RUN, a run that trains its proposer, accepted in the same step.

    replayed  they are these very tasks
    grammar   drawn from the grammar that the base was pretrained on, as many; a length that has run out gives
              way to the next
    lengths   of the run's own proposer, which proposes up to ROUNDS times over; what has the wrong length is
              dropped, so there may be fewer

--reward: what a new task earns whose tries were solved with rate r, instead of equation 4.

    variance  4·r·(1 − r), which pays most for what is solved half of the time
    novelty   1 whatever r is: only being valid and new counts

--refuse-idle: a proposal with an idle statement, one that can be left out and the output stays the same, counts
as a repeat: it earns nothing and is not kept, as long as there is deduplication. Seed tasks are not looked at.
"New programs" are then those that are neither repeats nor refused.

--judge-again: a step's proposals enter the update of the next step, in which the solver, newer by an update,
tries their tasks --samples times more; their reward follows from both rates. It does not train on these tries.
Each update takes the logprobs of the policy that it trains as the old ones, so nothing corrects for the update
in between. After a --resume the proposals of the step before it are lost.

Each control is one of the functions at the end of this file, and replaces the part of Algorithm 1 that it names.
To go on with a stopped run, give these flags again with --resume: `train.py --resume` alone goes on without the
control.
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

import azr
import make
import rewards
import train
from evidence import statements_of
from rewards import Rollout, Verdict, set_rewards
from run import read_rows
from tasks import KINDS, Task, UsageError, fingerprint

ROUNDS = 8    # of proposals in a step, at most
LONGEST = 8   # statements that the grammar is asked for; longer programs seldom stay within its bounds
REWARDS = {"variance": lambda rate, zero=0.0: 4 * rate * (1 - rate), "novelty": lambda rate, zero=0.0: 1.0}


# --- tasks from elsewhere: (actor, buffer, followed tasks, rng) → [Rollout] --------------------------------

def from_followed(actor, buffer, followed, rng):
    """The very tasks of the followed run."""
    return [given(task) for task in followed]


def from_grammar(actor, buffer, followed, rng):
    """Tasks of the grammar, as long as those of the followed run."""
    rollouts, heldout = [], heldout_programs(actor.cfg)
    for kind, lengths in lengths_of(followed).items():
        for length in lengths.elements():
            for tries in count():  # short programs run out; then the next length is taken
                statements = max(1, min(length, LONGEST)) + tries // 100
                task, _, _ = make.draw_solution(rng, kind, statements, heldout)
                if is_new(task, buffer, rollouts):
                    break
            rollouts.append(given(task))
    return rollouts


def of_own(actor, buffer, followed, rng):
    """The proposer's own new tasks, as many of each wanted length as it writes in ROUNDS rounds."""
    rollouts, left = [], lengths_of(followed)
    for _ in range(ROUNDS):
        types = [kind for kind in left if left[kind].total()]
        if not types:
            break
        for rollout in actor.propose(buffer, types):
            task = rollout.task
            if task and is_new(task, buffer, rollouts) and left[task.type][statements_of(task.program)] > 0:
                left[task.type][statements_of(task.program)] -= 1
                rollouts.append(rollout)
    return rollouts


SOURCES = {"replayed": from_followed, "grammar": from_grammar, "lengths": of_own}


def given(task):
    """A new task that nobody sampled. → Rollout"""
    return Rollout("propose", task.type, [], verdict=Verdict.VALID, task=task)


def is_new(task, buffer, rollouts):
    """Whether `azr.accept` will take the task after those of these rollouts."""
    programs = {fingerprint(rollout.task.program) for rollout in rollouts}
    is_known = buffer.is_repeat(task) or fingerprint(task.program) in programs
    return not (KINDS[task.type].own_program and is_known)


def lengths_of(tasks):
    """{type: Counter of the statements of its tasks}"""
    found = defaultdict(Counter)
    for task in tasks:
        found[task.type][statements_of(task.program)] += 1
    return found


@lru_cache
def heldout_programs(cfg):
    """The programs of over three statements in the held-out tasks of the run, and in the files beside them."""
    files = ["tiny"]
    if cfg.heldout != "tiny":
        files = {Path(cfg.heldout), *Path(cfg.heldout).parent.glob("*.jsonl")}
    programs = set()
    for file in files:
        for tasks in azr.load_heldout(file).values():
            programs |= {task.program for task in tasks if statements_of(task.program) > 3}
    return frozenset(programs)


def accepted_by(run):
    """{step: [the tasks that a run accepted]}"""
    found = defaultdict(list)
    for row in read_rows(run / "tasks.jsonl", {"step": int, "type": str, "program": str}):
        found[row["step"]].append(Task.from_dict({field.name: row[field.name] for field in fields(Task)}))
    return found


# --- what each control replaces: the Actor, or one of its methods -----------------------------------------

def take_tasks(source, followed_run):
    """Let the new tasks of each step come from `source`; the model itself proposes the seeds."""
    self_play, followed = train.train, accepted_by(followed_run)
    last = max((row["step"] for row in read_rows(followed_run / "metrics.jsonl", {"step": int})), default=0)

    def train_on_tasks(cfg, run):
        class ActorOnTasks(azr.Actor):
            def self_play(self, buffer):
                step = run.metrics[-1]["step"] + 1
                if step > last:
                    raise UsageError(f"--follow {followed_run} has made {last} steps: there are no tasks for step "
                                     f"{step}; complete it first")
                rng = random.Random(f"{cfg.seed} {step}")
                proposals = source(self, buffer, followed[step], rng)
                new = azr.accept(proposals, buffer, cfg)
                tries = self.settle(self.solver_requests(new, cfg.samples))
                batch = []
                for kind in cfg.types:
                    batch += buffer.fill(kind, new, cfg.batch)
                return proposals, tries, self.solve(batch)

        train.Actor = ActorOnTasks
        return self_play(cfg, run)

    train.train = train_on_tasks


def refuse_idle():
    """Let a proposal whose own program has an idle statement count as a repeat."""

    class RefusingActor(azr.Actor):
        is_past_seeding = False

        def self_play(self, buffer):
            self.is_past_seeding = True
            return super().self_play(buffer)

        def play(self, waiting, temperature=1.0):
            for settled in super().play(waiting, temperature):
                if self.is_past_seeding:
                    refuse([rollout for rollout in settled if rollout.role == "propose"], self.executor)
                yield settled

    train.Actor = RefusingActor


def refuse(proposals, executor):
    """Mark those as repeats whose output stays the same without one of their statements."""
    shorter = []
    for proposal in proposals:
        if proposal.task and KINDS[proposal.type].own_program:
            lines = proposal.task.program.split("\n")
            for line in range(1, len(lines) - 1):
                shorter.append((proposal, "\n".join(lines[:line] + lines[line + 1:]), proposal.task))
    runs = executor.run([(program, task.input) for _, program, task in shorter])
    for (proposal, _, task), result in zip(shorter, runs):
        if result.ok and result.output == task.output:
            proposal.repeat, proposal.task = True, None
            proposal.traits["unique_ast"] = False


def judge_again():
    """Let each step's proposals wait for the next update, and be judged a second time before it."""
    trained_rollouts, waiting = train.trained_rollouts, []

    class JudgingActor(azr.Actor):
        def self_play(self, buffer):
            rollouts = super().self_play(buffer)
            tried = [proposal for proposal in waiting if proposal.task]
            first = [proposal.solve_rate for proposal in tried]
            tries = self.settle(self.solver_requests([proposal.task for proposal in tried], self.cfg.samples))
            set_rewards(tried, tries, [], self.cfg)
            for proposal, rate in zip(tried, first):
                proposal.solve_rate = (proposal.solve_rate + rate) / 2
            set_rewards(tried, [], [], self.cfg)
            return rollouts

    def trained_rollouts_of_waiting(proposals, tries, solutions, cfg):
        rollouts = trained_rollouts(waiting, tries, solutions, cfg)
        waiting[:] = proposals
        return rollouts

    train.Actor, train.trained_rollouts = JudgingActor, trained_rollouts_of_waiting


def reward_by(name):
    """Let another function of the solve rate take the place of equation 4."""
    rewards.learnability = REWARDS[name]


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
    if options.refuse_idle and (options.tasks or {"--no-dedup", "--paper"} & {*rest}):
        parser.error("--refuse-idle needs deduplication, and excludes --tasks: those from elsewhere are not refused")
    if options.judge_again and (options.tasks or "--no-train-proposer" in rest):
        parser.error("--judge-again needs a proposer that is trained; drop --tasks and --no-train-proposer")
    if options.tasks:
        take_tasks(SOURCES[options.tasks], options.follow)
    if options.refuse_idle:
        refuse_idle()
    if options.judge_again:
        judge_again()
    if options.reward:
        reward_by(options.reward)
    return train.main(rest)


if __name__ == "__main__":
    sys.exit(main())
