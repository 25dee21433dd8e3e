"""Which prompts does a model follow? Shares of well-formed, valid and truncated responses.

    python scripts/formats.py --model ~/smollm2    # for a model of 135 M two minutes on a GPU, hours on a CPU

For each variant of the frame, each role and task type: the proposals of one seeding round, then a solver's batch,
with the prompts, the sampling at temperature 1, the parsing and the sandbox of training. `valid` is the share of
valid proposals, and of correct solutions. What is solved are the model's own valid proposals, eight tries each
(the worked examples where there are none). `learnable` is the share of these tasks that are solved sometimes but
not always. Induction's programs are those of the model's valid triplets. With --heldout FILE, `heldout` is the
accuracy of greedy answers to the tasks of that file (for example CRUXEval's), and `cut` the share of them that run
into --heldout-response.

Variants: `long`, `examples` and `brief` are --frame's choices. `plain` is `long` without the chat template, for models that
have one, and `chat` is `examples` inside of it. `grown` is `examples` with --references of the model's own tasks as
earlier responses.
"""

import argparse
import itertools
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from azr import Actor, load_heldout
from executor import Executor
from model import load_policy
from rewards import Verdict
from sampling import Sampler
from tasks import EXAMPLES, KINDS, TASK_TYPES, TaskBuffer, UsageError
from train import CARD, preset

VARIANTS = ("long", "plain", "examples", "brief", "chat", "grown")
FRAMES = {"long": "long", "plain": "long", "brief": "brief"}  # of variants, else "examples"
TRIES = 8
COLUMNS = "variant role type prompt well_formed valid truncated tokens learnable heldout cut".split()


def measure(policy, sampler, executor, variant, cfg, heldout=(), heldout_response=256):
    """Yields a row for each role and type."""
    cfg = replace(cfg, frame=FRAMES.get(variant, "examples"))
    policy.chat = variant in ("long", "chat") and bool(policy.tokenizer.chat_template)
    buffer = TaskBuffer(cfg.buffer, random.Random(cfg.seed))
    actor = Actor(policy, sampler, executor, replace(cfg, references=0))
    examiner = Actor(policy, sampler, executor, replace(cfg, max_response=heldout_response))
    if variant == "grown":
        store(buffer, actor.propose(buffer, cfg.types))
        actor.cfg = cfg
    for kind in cfg.types:
        rollouts = actor.propose(buffer, [kind])
        store(buffer, rollouts)
        yield row(variant, rollouts, Verdict.VALID)
        tasks = [rollout.task for rollout in rollouts if rollout.task]
        tasks = tasks or [replace(example, type=kind) for example in EXAMPLES]
        count = max(1, cfg.batch // TRIES)
        tasks = (tasks * count)[:count]
        found = row(variant, actor.settle(actor.solver_requests(tasks, TRIES)), Verdict.CORRECT)
        asked = [task for task in heldout if task.type == kind]
        if asked:
            answers = examiner.solve(asked, temperature=0)
            found["heldout"] = share(answer.verdict is Verdict.CORRECT for answer in answers)
            found["cut"] = share(answer.truncated for answer in answers)
        yield found


def store(buffer, rollouts):
    for rollout in rollouts:
        if rollout.task and not buffer.is_repeat(rollout.task):
            buffer.add(rollout.task)


def share(hits):
    return f"{fmean(hits):.1%}"


def row(variant, rollouts, good):
    """What is measured on the rollouts of one role and type; solutions come with TRIES of a task in a row."""
    first, learnable = rollouts[0], "–"
    if first.role == "solve":
        rates = [fmean(r.verdict is good for r in rollouts[place:place + TRIES])
                 for place in range(0, len(rollouts), TRIES)]
        learnable = share(0 < rate < 1 for rate in rates)
    return {"variant": variant, "role": first.role, "type": first.type,
            "prompt": round(fmean(len(r.prompt_ids) for r in rollouts)),
            "well_formed": share(r.well_formed for r in rollouts),
            "valid": share(r.verdict is good for r in rollouts),  # of a solution: correct
            "truncated": share(r.truncated for r in rollouts),
            "tokens": round(fmean(len(r.response_ids) for r in rollouts)),
            "learnable": learnable, "heldout": "–", "cut": "–"}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="formats.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of these, with commas")
    parser.add_argument("--types", default=",".join(TASK_TYPES))
    parser.add_argument("--responses", type=int, default=200, help="for each role and type")
    parser.add_argument("--max-response", type=int, default=128)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="responses sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--heldout", help="a file of held-out tasks, as train.py takes it, answered greedily")
    parser.add_argument("--heldout-limit", type=int, help="most of them for each type")
    parser.add_argument("--heldout-response", type=int, default=256, help="tokens of an answer to one of them")
    options = parser.parse_args(arguments)
    variants, types = options.variants.split(","), tuple(options.types.split(","))
    if not set(variants) <= set(VARIANTS) or not set(types) <= set(KINDS):
        parser.error(f"--variants are some of {','.join(VARIANTS)}, --types some of {','.join(KINDS)}")
    try:
        policy = load_policy(options.model, "none", 0, options.dtype, trained=False)
        splits = load_heldout(options.heldout, options.heldout_limit) if options.heldout else {}
    except UsageError as error:
        print(f"formats.py: {error}", file=sys.stderr)
        return 2
    cfg = preset(CARD, model=options.model, batch=options.responses, max_response=options.max_response,
                 references=options.references, inputs=options.inputs, seed=options.seed, types=types)
    heldout = [*itertools.chain.from_iterable(splits.values())]
    torch.set_num_threads(1)
    print(*COLUMNS, "seconds", sep="\t", flush=True)
    with Executor(workers=1, timeout=5.0) as executor:
        for variant in variants:
            torch.manual_seed(options.seed)
            started = time.perf_counter()
            sampler = Sampler(policy, options.rows)
            for found in measure(policy, sampler, executor, variant, cfg, heldout, options.heldout_response):
                print(*found.values(), round(time.perf_counter() - started), sep="\t", flush=True)
                started = time.perf_counter()
    return 0


if __name__ == "__main__":
    sys.exit(main())
