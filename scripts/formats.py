"""Which prompts does a model follow? Shares of well-formed, valid and truncated responses.

    python scripts/formats.py --model ~/smollm2    # for a model of 135 M two minutes on a GPU, hours on a CPU

For each variant of the frame, each role and task type: the proposals of one seeding round, then a solver's batch,
with the prompts, the sampling at temperature 1, the parsing and the sandbox of training. `valid` is the share of
valid proposals, and of correct solutions. What is solved are the model's own valid proposals, eight tries each
(the worked examples where there are none); induction's programs are those of its valid triplets.
Variants: `long` and `examples` are --frame's choices; `plain` is `long` without the chat template, for models that
have one; `grown` is `examples` with --references of the model's own tasks as earlier responses.
"""

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from azr import Actor
from executor import Executor
from model import load_policy
from rewards import Verdict
from sampling import Sampler
from tasks import EXAMPLES, KINDS, TASK_TYPES, TaskBuffer, UsageError
from train import CARD, preset

VARIANTS = ("long", "plain", "examples", "grown")
TRIES = 8
COLUMNS = "variant role type prompt well_formed valid truncated tokens".split()


def measure(policy, sampler, executor, variant, cfg):
    """Yields a row for each role and type."""
    cfg = replace(cfg, frame="long" if variant in ("long", "plain") else "examples")
    policy.chat = variant == "long" and bool(policy.tokenizer.chat_template)
    buffer = TaskBuffer(cfg.buffer, random.Random(cfg.seed))
    actor = Actor(policy, sampler, executor, replace(cfg, references=0))
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
        yield row(variant, actor.settle(actor.solver_requests(tasks, TRIES)), Verdict.CORRECT)


def store(buffer, rollouts):
    for rollout in rollouts:
        if rollout.task and not buffer.is_repeat(rollout.task):
            buffer.add(rollout.task)


def row(variant, rollouts, good):
    def share(values):
        values = list(values)
        return sum(values) / len(values)
    first = rollouts[0]
    return {"variant": variant, "role": first.role, "type": first.type,
            "prompt": round(share(len(r.prompt_ids) for r in rollouts)),
            "well_formed": f"{share(r.well_formed for r in rollouts):.1%}",
            "valid": f"{share(r.verdict is good for r in rollouts):.1%}",  # of a solution: correct
            "truncated": f"{share(r.truncated for r in rollouts):.1%}",
            "tokens": round(share(len(r.response_ids) for r in rollouts))}


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
    options = parser.parse_args(arguments)
    variants, types = options.variants.split(","), tuple(options.types.split(","))
    if not set(variants) <= set(VARIANTS) or not set(types) <= set(KINDS):
        parser.error(f"--variants are some of {','.join(VARIANTS)}, --types some of {','.join(KINDS)}")
    try:
        policy = load_policy(options.model, lora_rank=0, quantize="none")
    except UsageError as error:
        print(f"formats.py: {error}", file=sys.stderr)
        return 2
    cfg = preset(CARD, model=options.model, batch=options.responses, max_response=options.max_response,
                 references=options.references, inputs=options.inputs, seed=options.seed, types=types)
    torch.set_num_threads(1)
    print(*COLUMNS, "seconds", sep="\t", flush=True)
    with Executor(workers=1, timeout=5.0) as executor:
        for variant in variants:
            torch.manual_seed(options.seed)
            started = time.perf_counter()
            for found in measure(policy, Sampler(policy, options.rows), executor, variant, cfg):
                print(*found.values(), round(time.perf_counter() - started), sep="\t", flush=True)
                started = time.perf_counter()
    return 0


if __name__ == "__main__":
    sys.exit(main())
