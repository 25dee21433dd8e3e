"""How much of an update is the entropy bonus? And what does the bonus teach alone? (docs/evidence.md)

    python scripts/bonus.py           # train.py, and a table of the two parts of each update
    python scripts/bonus.py --alone   # the control: no reward, so the bonus is all there is

Other flags go to train.py. --entropy-coef is the paper's 0.001 here, unless it is given.

The gradient of a step has two parts, that of the advantages and that of the bonus (--entropy-coef times the mean
entropy). AdamW divides both by the same root of its second moment, weight by weight. The table has the norm of
the bonus' part over that of the advantages' part, before and after that division, and the cosine between the
bonus' part and the whole. Each step computes its gradients three times, so a run takes about 1.5 × as long.

--alone sets all advantages to 1e-30, in place of what the rewards give. That is no signal that reaches a weight,
but the rule "no update without a signal" does not apply, so that AdamW scales the bonus up to a full update.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import azr
import train
from tables import markdown

NO_SIGNAL = 1e-30
COLUMNS = "step signal bonus/advantages after_AdamW cosine_with_update".split()


def gradient(policy, rollouts, cfg, micro_tokens):
    """The gradient of the loss of these rollouts, all weights end to end."""
    for weight in policy.trainable().values():
        weight.grad = None
    with policy.autocast():
        azr._accumulate_gradients(policy, rollouts, micro_tokens, cfg)
    flat = [torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()
            for weight in policy.trainable().values()]
    return torch.cat(flat)


def parts(policy, rollouts, cfg, micro_tokens):
    """The parts of a step's gradient. → of the advantages, of the bonus"""
    of_advantages = gradient(policy, rollouts, replace(cfg, entropy_coef=0.0), micro_tokens)
    advantages = [rollout.advantage for rollout in rollouts]
    for rollout in rollouts:
        rollout.advantage = 0.0
    of_bonus = gradient(policy, rollouts, cfg, micro_tokens)
    for rollout, advantage in zip(rollouts, advantages):
        rollout.advantage = advantage
    return of_advantages, of_bonus


def scale_of(policy, optimizer):
    """What AdamW has divided each weight's gradient by in its last step: the root of its second moment."""
    flat = []
    for weight in policy.trainable().values():
        state = optimizer.state[weight]
        correction = 1 - optimizer.param_groups[0]["betas"][1] ** state["step"].item()
        flat.append((state["exp_avg_sq"] / correction).sqrt().flatten() + optimizer.param_groups[0]["eps"])
    return torch.cat(flat)


def compare(of_advantages, of_bonus, scale):
    """→ (ratio of norms, ratio of norms after AdamW's division, cosine of the bonus and the whole after it)"""
    advantages, bonus = of_advantages / scale, of_bonus / scale
    whole = advantages + bonus
    cosine = torch.nn.functional.cosine_similarity(bonus, whole, dim=0).item()
    return ((of_bonus.norm() / of_advantages.norm()).item(), (bonus.norm() / advantages.norm()).item(), cosine)


def measure(rows):
    """Let every update of train.py add a row to `rows`."""
    update = train.trr_update

    def measured_update(policy, optimizer, rollouts, cfg, micro_tokens):
        of_advantages, of_bonus = parts(policy, rollouts, cfg, micro_tokens)
        metrics = update(policy, optimizer, rollouts, cfg, micro_tokens)
        if metrics["signal"]:
            rows.append((metrics["signal"], *compare(of_advantages, of_bonus, scale_of(policy, optimizer))))
        return metrics

    train.trr_update = measured_update


def leave_alone():
    """Let the bonus be all that an update has."""
    def set_no_advantages(rollouts, cfg, rng):
        for rollout in rollouts:
            rollout.advantage = NO_SIGNAL

    train.set_advantages = set_no_advantages


def table(rows):
    lines = [COLUMNS]
    for step, row in enumerate(rows, 1):
        lines.append([step, *(f"{value:.3f}" for value in row)])
    medians = [statistics.median(values) for values in zip(*rows)]
    lines.append(["median", *(f"{value:.3f}" for value in medians)])
    return markdown(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--alone", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    rows = []
    if options.alone:
        leave_alone()
    else:
        measure(rows)
    if "--resume" not in rest:
        rest = ["--entropy-coef", "0.001", *rest]
    code = train.main(rest)
    if rows:
        print(f"\n{table(rows)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
