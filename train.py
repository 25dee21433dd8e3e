"""The Absolute Zero Reasoner: python train.py

One model invents Python tasks, solves them, and learns from both. The sandbox is the only judge.
Read `train` first: it is Algorithm 1 of the paper (Zhao et al. 2025, arXiv 2505.03335).
"""

import argparse
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import parallel
from azr import Actor, accept, fit_micro_tokens, heldout_accuracy, load_heldout, trr_update
from executor import Executor
from model import SHIPPED, check_lengths, count_weights, describe, load_policy
from parallel import say
from rewards import Verdict, set_advantages, set_rewards
from run import (Follower, Run, State, cost, flag, mean_score, pick_samples, printable_output, screen,
                 seeding_figures, step_metrics, why_none_is_valid)
from sampling import Sampler
from tasks import KINDS, TASK_TYPES, TaskBuffer, UsageError


# --- settings ----------------------------------------------------------------

def setting(text, *presets, low=0, high=10 ** 6, choices=None):
    """A field of Config. presets: tiny model on a CPU, 3B on a 24 GB card, the paper, or one for all."""
    if len(presets) == 1:
        presets = presets * 3
    return field(default=presets[0], metadata={"text": text, "presets": presets, "range": (low, high),
                                               "choices": choices})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Command line and config.json are derived from its fields. Raises UsageError."""

    # the algorithm
    model: str = setting("tiny or tiny/longer (shipped), a folder, or a Hugging Face name (Qwen2.5-3B)",
                         "tiny")
    types: tuple = setting("task types to train, with commas", TASK_TYPES)
    steps: int = setting("updates", 60, 200, 500, low=1)
    batch: int = setting("B: proposals, and solutions, for each type in a step", 16, 16, 64, low=1)
    samples: int = setting("n: tries that estimate a new task's learnability", 4, 8, 8)
    references: int = setting("K: tasks from the buffer that the proposer is shown (0 for none)", 2, 6, 6)
    inputs: int = setting("N: inputs of an induction task, half of which stay hidden", 6, 10, 10, low=2)
    seed_factor: int = setting("S: the buffers are seeded with B·S valid tasks", 4, low=1)
    buffer: int = setting("tasks kept for each type (a full buffer evicts at random)", 16384, low=2)
    frame: str = setting("prompts: a long instruction, or worked examples with the references among them; "
                         "brief: with shorter thoughts; auto: brief below 300 million weights, else examples",
                         "long", "auto", "long", choices=("long", "examples", "brief", "auto"))
    max_prompt: int = setting("most tokens of a prompt (references are dropped to fit)", 512, 4096, 6144,
                              low=1)
    max_response: int = setting("most tokens of a response (longer ones are malformed); 0: 512 below 2 "
                                "billion weights, else 2048", 96, 0, 8096)

    # the update
    lr: float = setting("learning rate of AdamW (paper: of full fine-tuning)", 1e-4, 2e-5, 1e-6, low=1e-12)
    lr_final: float = setting("final learning rate as a fraction of --lr (linear decay)", 1.0, low=1e-12)
    lora_rank: int = setting("LoRA rank on all linear layers (alpha = 2 × rank); 0: all weights", 32, 32, 0)
    entropy_coef: float = setting("weight of the entropy bonus in the loss (the tiny model needs none)",
                                  0.0, 0.0, 0.001)
    solve_weight: float = setting("λ of equation 3: weight of the solver's advantages", 1.0)
    train_on_estimates: bool = setting(
        "also train the solver on the n tries of each new task (the paper does not)", False, True, False)
    baseline: str = setting("baseline of advantages: mean of a role and type (paper), or of a task's tries",
                            "group", choices=("group", "task"))
    train_proposer: bool = setting("train the proposer (with --no-train-proposer it still proposes, but gets "
                                   "no gradient)", True)
    shuffle_rewards: bool = setting("control: rewards are shuffled within each group", False)
    dedup: bool = setting("give duplicate programs zero reward and keep them out of the buffer",
                          True, True, False)
    zero_learnability: str = setting("reward for tasks never or always solved: paper 0, official code -0.5",
                                     "paper", choices=("paper", "official"))
    clip: float = setting("ε of PPO's clip; with one update a step the ratio is 1", 0.2)
    max_grad_norm: float = setting("gradients are scaled down to this norm", 1.0, low=1e-12)

    # evaluation and checkpoints
    eval_every: int = setting("steps between held-out evaluations (0: only before and after)", 10, 20, 20)
    save_every: int = setting("steps between checkpoints", 5, low=1)
    heldout: str = setting("held-out tasks: a JSONL file, 'tiny', or 'cruxeval' (downloaded from the Hub; "
                           "falls back to 'tiny')", "tiny", "cruxeval", "cruxeval")
    heldout_limit: int | None = setting("most held-out tasks of each type and split; None: all",
                                        None, 100, None, low=1)
    heldout_splits: str = setting("splits of that file to measure, with commas; default: easy, or all", "")

    # the machine
    seed: int = setting("random seed", 0, high=2 ** 63 - 1)
    date: str | None = setting("YYYY-MM-DD for chat templates that write today's date; default: of the "
                               "first day", None)
    quantize: str = setting("4-bit base weights; auto: on a GPU, with LoRA", "auto",
                            choices=("auto", "4bit", "none"))
    dtype: str = setting("of the weights; auto: bf16 or fp16 on a GPU, fp32 on a CPU", "auto",
                         choices=("auto", "bf16", "fp16", "fp32"))
    device: str | None = setting("cuda, cuda:1 or cpu; default: cuda if available", None)
    workers: int | None = setting("sandbox workers; default: all cores", None, low=1, high=512)
    timeout: float = setting("seconds a sandboxed run may take", 5.0, 10.0, 10.0, low=0.01, high=3600)
    generate_batch: int = setting("responses sampled at once (0: as many as fit into memory)", 0)
    micro_tokens: int = setting("tokens of a micro-batch, with padding (affects memory, not results)",
                                4096, 8192, 16384, low=1)

    def __post_init__(self):
        for knob in fields(self):
            value, choices = getattr(self, knob.name), knob.metadata["choices"]
            low, high = knob.metadata["range"]
            if not isinstance(value, knob.type) or choices and value not in choices:
                raise UsageError(f"{flag(knob.name)} is {value!r}; it must be {choices or knob.type}")
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise UsageError(f"{flag(knob.name)} is {value}; it must be between {low} and {high}")
        if self.samples < 2 and self.train_proposer:
            raise UsageError(f"--samples is {self.samples}, but learnability needs at least 2 tries a task: "
                             "a single try is solved either always or never (or use --no-train-proposer)")
        has_tries = self.train_on_estimates and self.samples > 1
        if self.batch < 2 and not has_tries:
            raise UsageError(f"--batch is {self.batch}, but an advantage needs at least 2 responses of each "
                             "role and type to compare (or use --train-on-estimates)")
        if not set(self.types) <= KINDS.keys() or len(set(self.types)) < len(self.types):
            raise UsageError(f"--types is {','.join(self.types)}; give some of {','.join(KINDS)}, each once")


TINY, CARD, PAPER = range(3)
# settings that --resume may change: length, device, memory, speed and evaluation, but not the algorithm
KEPT = "steps save_every heldout device workers generate_batch micro_tokens".split()


def preset(column, **changes):
    return Config(**{knob.name: knob.metadata["presets"][column] for knob in fields(Config)} | changes)


# --- Algorithm 1 ------------------------------------------------------------------------------------

def train(cfg, run):
    """Train by self-play. Writes to the run folder `run`, and resumes from its checkpoint if it has one."""
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    policy = load_policy(cfg.model, cfg.quantize, cfg.lora_rank, cfg.dtype, cfg.device, frame=cfg.frame,
                         date=cfg.date)
    cfg = fit_to_size(cfg, count_weights(policy.causal))
    check_lengths(policy, cfg.max_prompt, cfg.max_response)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    buffer = TaskBuffer(cfg.buffer, rng)
    sampler = Sampler(policy, cfg.generate_batch)
    state = State(policy, sampler, optimizer, buffer, rng)
    micro_tokens = cfg.micro_tokens
    if cfg.model not in SHIPPED or policy.device.type == "cuda":
        micro_tokens = fit_micro_tokens(policy, cfg)
        say(f"{describe(policy)}\n--frame {cfg.frame} and --max-response {cfg.max_response}\n"
            f"micro-batches of at most {micro_tokens:,} tokens fit into memory")

    workers = cfg.workers or parallel.workers()
    with Executor(workers, cfg.timeout) as executor, interruptible() as stop_requests:
        actor = Actor(policy, sampler, executor, cfg)
        heldout = heldout_tasks(cfg, executor)
        done = run.restore(cfg, state)
        if done is None:  # a seed set from the identity triplet and the model itself
            parallel.seed_sampling(rng)
            done, seeds = 0, seed_buffers(actor, buffer, cfg, run, stop_requests)
            accepted = []
            for tasks in buffer.tasks.values():
                accepted += [(task, None) for task in tasks]
            metrics = measure(actor, heldout) | sizes(buffer)
            run.record(0, metrics, accepted, screen(0, seeds))
            run.save(0, state)
        stop = False
        bar = tqdm(range(done + 1, cfg.steps + 1), initial=done, total=cfg.steps, dynamic_ncols=True,
                   disable=parallel.rank() > 0)
        for step in bar:
            started = time.perf_counter()
            actor.clock.clear()
            parallel.seed_sampling(rng)

            # PROPOSE: the model invents B tasks of each type. Valid new ones join the buffer and are tried.
            # SOLVE: the model answers B tasks of each type, the new ones first.
            bar.set_description("self-play")
            proposals, tries, solutions = actor.self_play(buffer)

            # REWARD: equations 4 to 6, from verdicts and solve rates
            set_rewards(proposals, tries, solutions, cfg)

            # LEARN: task-relative advantages over all rollouts, and one TRR++ update
            bar.set_description("update")
            rollouts = trained_rollouts(proposals, tries, solutions, cfg)
            set_advantages(rollouts, cfg, rng)
            decay = (1 - cfg.lr_final) * (step - 1) / max(1, cfg.steps - 1)
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 - decay)
            with actor.timed("update"):
                update = trr_update(policy, optimizer, rollouts, cfg, micro_tokens)
                sampler.refresh(policy)
            micro_tokens = update["micro_tokens"]

            actor.clock["total"] = time.perf_counter() - started
            sampled = proposals + tries + solutions
            metrics = {**step_metrics(proposals, solutions, cfg), **update, "lr": cfg.lr * (1 - decay),
                       **sizes(buffer), **cost(sampled, actor.clock)}
            last = step == cfg.steps
            if last or cfg.eval_every and step % cfg.eval_every == 0:
                metrics |= measure(actor, heldout)
            accepted = [(proposal.task, proposal.solve_rate) for proposal in proposals if proposal.task]
            run.record(step, metrics, accepted, screen(step, sampled),
                       pick_samples(step, proposals + solutions, policy))
            run.show(bar)
            stop = any(parallel.gather(bool(stop_requests) and not last))
            if stop or last or step % cfg.save_every == 0:
                run.save(step, state)
            if stop:
                break
    run.finish(stop, cfg.heldout)


def fit_to_size(cfg, weights):
    """The settings that --frame auto and --max-response 0 leave to the model's number of weights. → Config

    SmolLM2-135M loses the thread in the longer thoughts of the worked examples, and Qwen2.5-Coder-0.5B needs
    them. A small model that does not end soon repeats itself until the limit: all right answers of
    Qwen2.5-Coder-0.5B to CRUXEval had at most 105 tokens, and some 10% of its answers never ended.
    """
    frame = cfg.frame
    if frame == "auto":
        frame = "brief" if weights < 3e8 else "examples"
    limit = 512 if weights < 2e9 else 2048
    return replace(cfg, frame=frame, max_response=cfg.max_response or limit)


def trained_rollouts(proposals, tries, solutions, cfg):
    """The rollouts of the update: solutions and, if cfg says so, proposals and the tries at new tasks."""
    rollouts = []
    if cfg.train_proposer:
        rollouts += proposals
    rollouts += solutions
    if cfg.train_on_estimates:
        rollouts += tries
    return rollouts


def seed_buffers(actor, buffer, cfg, run, stop_requests):
    """Fill the buffers with B·S valid tasks of the untrained model, starting from the identity. → [Rollout]

    Deduction and abduction start with the same triplets (D_ded = D_abd = D_seed in the paper). Induction
    tasks are then made from their programs. A model that rarely writes valid tasks gets 10·S rounds. Raises
    UsageError if none of its proposals in them is valid.
    """
    drafts, has_valid, target = [], False, cfg.batch * cfg.seed_factor
    triplets = [kind for kind in KINDS if KINDS[kind].is_triplet]
    groups = [triplets, *([kind] for kind in cfg.types if kind not in triplets)]
    with tqdm(total=len(groups) * target, desc="seed the buffers", unit="task", dynamic_ncols=True,
              disable=parallel.rank() > 0) as bar:
        for kinds in groups:
            bucket = buffer.tasks[kinds[0]]
            for number in range(1, 10 * cfg.seed_factor + 1):
                missing = target - len(bucket)
                if missing <= 0:
                    break
                fresh = actor.propose(buffer, kinds)
                bar.update(len(accept(fresh, buffer, cfg, kinds, missing)))
                drafts += fresh
                run.append("samples.jsonl", pick_samples(0, fresh, actor.policy))
                bar.set_postfix_str(seeding_figures(drafts))
                has_valid = any(draft.verdict is Verdict.VALID for draft in drafts)
                if number == 2 and not has_valid:
                    say(why_none_is_valid(drafts))
                if any(parallel.gather(bool(stop_requests))):
                    raise KeyboardInterrupt
            if drafts and not has_valid:
                raise UsageError(f"none of {len(drafts)} proposals is a valid task: nothing to train on; "
                                 f"read {run.folder}/samples.jsonl, then try another --frame or --model")
            if len(bucket) < target:
                say(f"warning: only {len(bucket)} of {target} seed tasks for {' and '.join(kinds)}; "
                    "the model seldom writes valid ones, and batches will repeat tasks")
    return drafts


# --- metrics ----------------------------------------------------------------------------------------

def heldout_tasks(cfg, executor):
    """{"": [Task]} for the first split to measure, {"<split>/": [Task]} for others. Raises UsageError."""
    splits = load_heldout(cfg.heldout, cfg.heldout_limit, executor)
    default = "easy" if "easy" in splits else ",".join(splits)
    names = (cfg.heldout_splits or default).split(",")
    tasks = {}
    for name in names:
        if name not in splits:
            raise UsageError(f"there are no held-out tasks of the split {name!r} in {cfg.heldout}; "
                             f"it has {', '.join(splits) or 'none'}")
        tasks[f"{name}/" if tasks else ""] = splits[name]
    return tasks


def measure(actor, heldout):
    """Greedy accuracy on the held-out tasks, with standard errors."""
    metrics = {}
    for split, tasks in heldout.items():
        scores = heldout_accuracy(actor, tasks)
        scores["mean"] = mean_score(scores.values())
        for name, (score, error) in scores.items():
            metrics |= {f"heldout/{split}{name}": score, f"heldout_stderr/{split}{name}": error}
    return metrics


def sizes(buffer):
    return {f"buffer/{kind}": len(tasks) for kind, tasks in buffer.tasks.items()}


# --- the command line -------------------------------------------------------------------------------

@contextmanager
def interruptible():
    """Yields a list that is non-empty after Ctrl-C or SIGTERM. A second signal raises KeyboardInterrupt."""
    requests = []

    def handle(number, frame):
        # torchrun forwards a signal that the terminal has already sent
        if requests and time.monotonic() > requests[0] + 1:
            raise KeyboardInterrupt
        requests.append(time.monotonic())
        print("\nStopping after this step. Press Ctrl-C again to stop immediately.", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parse(arguments):
    """Parse the command line. → {name: value} of the options that were given"""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawTextHelpFormatter, argument_default=argparse.SUPPRESS,
        description="Self-play training of a language model on Python reasoning tasks, from zero data.")
    add = parser.add_argument
    add("--out", help="run folder; default: runs/<model>-<date>")
    kept = ", ".join(map(flag, KEPT))
    add("--resume", metavar="RUN", help=f"resume this run; the only other flags allowed are\n{kept}")
    add("--paper", action="store_true", help="the paper's values instead of the defaults below")
    for knob in fields(Config):
        text = knob.metadata["text"] + defaults_text(knob)
        if knob.type is bool:
            add(flag(knob.name), help=text, action=argparse.BooleanOptionalAction)
        elif knob.type is tuple:
            add(flag(knob.name), help=text, type=lambda text: tuple(text.split(",")))
        else:
            convert = get_args(knob.type)[0] if get_args(knob.type) else knob.type  # int | None → int
            add(flag(knob.name), help=text, type=convert, choices=knob.metadata["choices"])
    return vars(parser.parse_args(arguments))


def defaults_text(knob):
    """The presets of a field of Config, for the help."""
    shown = []
    for value in knob.metadata["presets"]:
        shown.append(",".join(value) if isinstance(value, tuple) else value)
    if len(set(shown)) > 1:
        return "\n(tiny {}, else {}, paper {})".format(*shown)
    return "" if shown[0] in (None, "") else f"\n(default {shown[0]})"


def configure(given):
    """Check the options that were given. → (Config, Run). Raises UsageError for invalid values."""
    for name, value in given.items():
        if value == "":
            raise UsageError(f"{flag(name)} is empty; give it a value or leave it out")
        if "resume" in given and name not in (*KEPT, "resume"):
            raise UsageError(f"--resume uses the settings of the run; drop {flag(name)}")
    changes = {knob.name: given[knob.name] for knob in fields(Config) if knob.name in given}
    for name in ("model", "heldout"):  # absolute paths work from any folder
        value = changes.get(name, "cruxeval")
        if value not in (*SHIPPED, "cruxeval") and Path(value).exists():
            changes[name] = os.path.abspath(value)
    if "resume" in given:
        run = Run(given["resume"])
        cfg = Config(**run.config(asdict(Config()).keys()) | changes)
        run.acquire()
        return cfg, run
    column = TINY if given.get("model", "tiny") in SHIPPED else CARD
    cfg = preset(PAPER if "paper" in given else column, **changes)
    if cfg.heldout == "cruxeval" and "heldout" not in changes:
        try:
            load_heldout("cruxeval")
        except UsageError as error:
            say(f"{error}\nFalling back to the tiny model's held-out tasks. "
                "They are not meaningful for other models.")
            cfg = replace(cfg, heldout="tiny")
    cfg = replace(cfg, date=cfg.date or time.strftime("%Y-%m-%d"))
    run = Run(given.get("out", f"runs/{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    run.create(cfg)
    return cfg, run


def main(arguments=None):
    printable_output()
    given, run = parse(arguments), None
    with parallel.joined():
        name = "train.py" if parallel.ranks() == 1 else f"train.py, rank {parallel.rank()}"
        try:
            cfg, run = configure(given) if parallel.rank() == 0 else (None, Follower())
            train(parallel.of_first(cfg), run)
            return 0
        except UsageError as error:
            if run and "resume" not in given:
                run.abandon()
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            say(f"\nStopped immediately. {run.resume_hint() if run else 'Nothing was written.'}")
            return 130
        except (OSError, MemoryError, SafetensorError, torch.OutOfMemoryError) as error:
            hint = run.resume_hint() if run else ""
            print(f"{name}: {str(error) or 'out of memory'}. {hint}", file=sys.stderr)
            return 1
        finally:
            if run:
                run.close()


if __name__ == "__main__":
    sys.exit(main())
