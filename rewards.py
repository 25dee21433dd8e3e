"""Verdicts, rewards and advantages: everything between a sampled response and the policy gradient.

    response ──parse──▶ answer ──sandbox──▶ Verdict ──reward──▶ R ──task_relative_advantages──▶ A

Equations 4 to 6 and 8 of the paper. Plain Python numbers throughout, because a batch has only a few hundred
rewards, and floats are easy to check.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import Enum

from executor import parse_literal, same
from tasks import KINDS, Task

# Equation 6. The official code gives −1 also to a well-formed proposal that does not validate.
FAILED = -0.5      # well formed, but wrong (solver) or invalid (proposer)
MALFORMED = -1.0   # not in the requested format, for example because the token limit cut it off


class Verdict(str, Enum):
    """Outcome of a response. The value is what appears in the logs."""

    CORRECT = "correct"
    WRONG = "wrong"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"  # malformed, because it ran into the response limit
    VALID = "valid"
    INVALID = "invalid"
    UNSAFE = "unsafe"        # a proposal or an answer that the sandbox refused


@dataclass
class Rollout:
    """One prompt, one sampled response, and its outcome."""

    role: str                       # propose | solve
    type: str                       # deduction | abduction | induction
    prompt_ids: list
    response_ids: list = field(default_factory=list)  # up to the end token, or the one that closes </answer>
    logps: list = field(default_factory=list)  # of each response token, in nats at temperature 1, as sampled
    response: str = ""              # the same as text
    verdict: Verdict | None = None  # None until the response is sampled and judged
    reason: str = ""                # for the verdict, such as "unsafe: imports os"
    task: Task | None = None        # the solver's task, or the valid task that was proposed
    program: str = ""               # the program that the proposer was given (induction only)
    references: list = field(default_factory=list)  # programs that the proposer was shown
    repeat: bool = False            # a valid proposal whose program is a duplicate, so that it is not stored
    solve_rate: float | None = None  # of a new task: share of its n tries that were correct
    reward: float = 0.0             # eq. 6
    advantage: float = 0.0          # eq. 8
    traits: dict = field(default_factory=dict)  # of a valid proposal: its values for the means diversity/…

    @property
    def tokens(self):
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def truncated(self):
        """Whether the response ran into its limit."""
        return self.verdict is Verdict.TRUNCATED

    @property
    def well_formed(self):
        return self.verdict not in (None, Verdict.MALFORMED, Verdict.TRUNCATED)


# --- verdicts ---------------------------------------------------------------------------------------

def is_correct(tasks, answers, executor):
    """Judge solver answers. The verdict needs no model and does not trust the text.

    tasks: [Task]. answers: [str or None], None for a malformed response. → [bool], in order.

    deduction: the answer is a literal equal to the output, with equal types all the way down
               (True is not 1, 1 is not 1.0). It is read in the sandbox, never evaluated.
    abduction: the program, run on the answer as input, returns the output. Any such input counts,
               because the function need not be injective.
    induction: the answer, a program, maps every hidden input to its output. At least one is hidden.

    All runs of the batch go to the sandbox together. Expected outputs never enter the sandbox.
    """
    return [verdict is Verdict.CORRECT for verdict, _ in judge(tasks, answers, executor)]


def judge(tasks, answers, executor):
    """`is_correct`, with the reasons. → [(Verdict, one line or '')], in order."""
    checks = []
    for task, answer in zip(tasks, answers, strict=True):
        checks.append([] if answer is None else KINDS[task.type].judge(task, answer))
    jobs = {}
    for check in checks:
        jobs |= dict.fromkeys((program, text) for program, text, _ in check)  # tries often have equal answers
    programs = [job for job in jobs if job[0] is not None]
    literals = [job for job in jobs if job[0] is None]
    runs = dict(zip(programs, executor.run(programs)))
    runs |= zip(literals, executor.read([text for _, text in literals]))
    verdicts = []
    for answer, check in zip(answers, checks):
        compared = [(runs[program, text], output) for program, text, output in check]
        verdicts.append((Verdict.MALFORMED, "") if answer is None else _verdict(compared))
    return verdicts


def _verdict(compared):
    """The verdict on a well-formed answer. compared: [(Execution, expected output)]"""
    failed = [run for run, output in compared if not (run.ok and equal(run.output, output))]
    if compared and not failed:
        return Verdict.CORRECT, ""
    return blame(failed, Verdict.WRONG)


def blame(runs, verdict):
    """A failure. → (`verdict`, or UNSAFE if the sandbox refused a run, and the first error or '')"""
    failed = [run for run in runs if not run.ok]
    reason = f"{failed[0].status}: {failed[0].error}" if failed else ""
    refused = any(run.status == "unsafe" for run in failed)
    return Verdict.UNSAFE if refused else verdict, reason


def equal(output, expected):
    """Whether two texts are literals of the same value."""
    try:
        return same(parse_literal(output), parse_literal(expected))
    except ValueError:  # longer than a literal may be
        return False


# --- rewards: equations 4 to 6 ----------------------------------------------------------------------

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


def reward(rollout, zero=0.0):
    """Equations 4 to 6 together: R of a rollout, from its verdict and its solve rate alone.

    A valid proposal without a solve rate earns 0: a duplicate, which is not tried (not in the paper), or any
    proposal with --samples 0. zero: see `learnability`.
    """
    if rollout.verdict is Verdict.CORRECT:
        return composite_reward(1.0, True)
    if rollout.verdict is Verdict.VALID:
        untried = rollout.solve_rate is None
        return composite_reward(0.0 if untried else learnability(rollout.solve_rate, zero), True)
    return composite_reward(None, rollout.well_formed)


def set_rewards(proposals, tries, solutions, cfg):
    """Set the solve rates of new tasks from the solver's tries at them, then the reward of every rollout.

    Equal tasks of one step, which only --no-dedup lets through, share their tries.
    """
    tried, solved = Counter(), Counter()
    for attempt in tries:
        tried[attempt.task] += 1
        if attempt.verdict is Verdict.CORRECT:
            solved[attempt.task] += 1
    for proposal in proposals:
        if tried[proposal.task]:
            proposal.solve_rate = solved[proposal.task] / tried[proposal.task]
    zero = -0.5 if cfg.zero_learnability == "official" else 0.0
    for rollout in [*proposals, *tries, *solutions]:
        rollout.reward = reward(rollout, zero)


# --- advantages: equation 8 -------------------------------------------------------------------------

def task_relative_advantages(rewards, groups):
    """Equation 8, TRR++: (r − mean) / std within each of the groups, normally six.

    rewards: [float]. groups: one hashable per reward, normally (type, role). → [float], in order.
    Mean and (population) std are over samples. The official code whitens over tokens, so that long
    answers weigh more. A group whose rewards are all equal gives no signal, so its advantages are 0.

    >>> task_relative_advantages([1.0, 0.0, 7.0], ["a", "a", "b"])
    [1.0, -1.0, 0.0]
    """
    members = defaultdict(list)
    for value, group in zip(rewards, groups, strict=True):
        members[group].append(float(value))
    means, deviations = {}, {}
    for group, values in members.items():
        mean = math.fsum(values) / len(values)
        means[group] = mean
        deviations[group] = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        if min(values) == max(values):  # rounding leaves 1e-17 in the deviation, and dividing by it gives ±1
            deviations[group] = 0.0
    advantages = []
    for value, group in zip(rewards, groups):
        deviation = deviations[group]
        advantages.append((value - means[group]) / deviation if deviation else 0.0)
    return advantages


def set_advantages(rollouts, cfg, rng):
    """Set the advantage of every rollout: equation 8 within its group, times λ (eq. 3) for the solver."""
    groups = groups_of(rollouts, cfg.baseline)
    rewards = [rollout.reward for rollout in rollouts]
    if cfg.shuffle_rewards:
        rewards = shuffled(rewards, groups, rng)
    for rollout, advantage in zip(rollouts, task_relative_advantages(rewards, groups)):
        weight = cfg.solve_weight if rollout.role == "solve" else 1.0
        rollout.advantage = weight * advantage


def groups_of(rollouts, baseline):
    """The group in which each rollout is compared: (type, role), six if all types and both roles are trained.

    baseline "task": if a step has several solutions of a task, they are compared only with each other, as in
    GRPO. Then the one success on a hard task counts for more than each of many on an easy task.
    """
    if baseline == "group":
        return [(rollout.type, rollout.role) for rollout in rollouts]
    attempts = Counter(rollout.task for rollout in rollouts if rollout.role == "solve")
    groups = []
    for rollout in rollouts:
        has_rivals = rollout.role == "solve" and attempts[rollout.task] > 1
        groups.append((rollout.type, rollout.role, rollout.task if has_rivals else None))
    return groups


def shuffled(rewards, groups, rng):
    """A control: the rewards of each group, shuffled among its responses."""
    result = list(rewards)
    for group in dict.fromkeys(groups):
        places = [place for place, other in enumerate(groups) if other == group]
        values = [rewards[place] for place in places]
        for place, value in zip(places, rng.sample(values, len(values))):
            result[place] = value
    return result


def mean_error(values):
    """(mean, standard error) of independent values. For hits and misses this is the binomial error.

    >>> mean_error([1, 1, 0, 0])
    (0.5, 0.25)
    """
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
