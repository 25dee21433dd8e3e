"""The Absolute Zero Reasoner: python train.py

One model invents Python tasks, solves them, and learns from both; the sandbox is the only judge.
Read `train` first: it is Algorithm 1 of the paper (Zhao et al. 2025, arXiv 2505.03335).
"""

import argparse
import fcntl
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import parallel
from azr import SHIPPED, draft, forecast, heldout_accuracy, load_policy, propose, solve, trr_update
from executor import Executor
from report import (alarms, average, draw_curves, mean_score, read_config, read_rows, replace_file, screen,
                    seeding_figures, table, why_none_is_valid, write_page, write_through)
from rewards import Verdict, load_heldout, task_relative_advantages
from tasks import KINDS, TASK_TYPES, TaskBuffer, UsageError


# --- every number that shapes a run ----------------------------------------------------------------

def setting(text, *presets, low=0, high=10 ** 6, choices=None):
    """A field of Config. Presets: the tiny model on a CPU, a 3B model on a 24 GB card, the paper; or one."""
    presets = presets if len(presets) == 3 else presets * 3
    return field(default=presets[0], metadata={"text": text, "presets": presets, "range": (low, high),
                                               "choices": choices})


@dataclass(frozen=True)
class Config:
    """A run's settings. Command line, ranges and config.json follow from its fields. Raises UsageError."""

    model: str = setting("tiny or tiny/longer (shipped), a folder, or a Hugging Face name (Qwen2.5-3B)",
                         "tiny")
    types: tuple = setting("task types to train, with commas", TASK_TYPES)
    steps: int = setting("updates", 60, 200, 500, low=1)
    batch: int = setting("B: proposals, and solutions, for each type in a step", 16, 16, 64, low=1)
    samples: int = setting("n: tries that estimate a new task's learnability", 4, 8, 8)
    references: int = setting("K: tasks from the buffer that the proposer is shown; 0 shows none", 2, 6, 6)
    inputs: int = setting("N: inputs of an induction task; half of them stay hidden", 6, 10, 10, low=2)
    seed_factor: int = setting("S: the buffers are seeded with B·S valid tasks", 4, low=1)
    frame: str = setting("prompts: the long instruction, or worked examples, with the references among them",
                         "long", "examples", "long", choices=("long", "examples"))
    max_prompt: int = setting("tokens of a prompt; references are dropped until it fits", 512, 4096, 6144,
                              low=1)
    max_response: int = setting("tokens of a response; longer ones are malformed", 96, 2048, 8096, low=1)

    lr: float = setting("learning rate of AdamW (paper: of full fine-tuning)", 1e-4, 2e-5, 1e-6, low=1e-12)
    lr_final: float = setting("share of --lr left at the last step, on a straight line", 1.0, low=1e-12)
    lora_rank: int = setting("LoRA rank on all linear layers, alpha twice it; 0: all weights", 32, 32, 0)
    entropy_coef: float = setting("weight of the entropy bonus in the loss", 0.001)
    solve_weight: float = setting("λ of equation 3: weight of the solver's advantages", 1.0)
    train_on_estimates: bool = setting(
        "also train the solver on the n tries of each new task; the paper does not", False, True, False)
    baseline: str = setting("advantages against the mean of a role and type (paper), or of one task's tries",
                            "group", choices=("group", "task"))
    train_proposer: bool = setting("train the proposer; without, it proposes but is not trained", True)
    shuffle_rewards: bool = setting("control: rewards are shuffled within each group", False)
    dedup: bool = setting("programs that were seen before earn nothing and are not stored", True, True, False)
    zero_learnability: str = setting("reward of tasks solved never or always: paper 0, official code -0.5",
                                     "paper", choices=("paper", "official"))

    eval_every: int = setting("steps between held-out evaluations; 0: only before and after", 10, 20, 20)
    save_every: int = setting("steps between checkpoints", 5, low=1)
    heldout: str = setting("held-out tasks: a file of JSON lines, tiny, or cruxeval (from the hub, if it can "
                           "be had)", "tiny", "cruxeval", "cruxeval")
    heldout_limit: int | None = setting("most held-out tasks of each type and split; None: all",
                                        None, 100, None, low=1)
    heldout_splits: str = setting("splits of that file to measure, with commas; default: easy, or all", "")

    seed: int = setting("random seed", 0, high=2 ** 63 - 1)
    quantize: str = setting("4-bit base weights; auto: on a GPU, with LoRA", "auto",
                            choices=("auto", "4bit", "none"))
    device: str | None = setting("cuda, cuda:1 or cpu; default: cuda where there is one", None)
    workers: int | None = setting("sandbox workers; default: all cores", None, low=1, high=512)
    timeout: float = setting("seconds a sandboxed run may take", 5.0, 10.0, 10.0, low=0.01, high=3600)
    generate_batch: int = setting("responses sampled at once; 0: as free memory allows", 0)
    micro_tokens: int = setting("tokens of a micro-batch, with padding; changes memory, not results",
                                4096, 8192, 16384, low=1)

    clip = 0.2           # PPO's epsilon; with one update a step the ratio is 1
    max_grad_norm = 1.0  # gradients are scaled down to this norm
    buffer = 16384       # tasks kept for each type; a full buffer evicts at random

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
                             "one try is solved always or never (use --no-train-proposer to go without)")
        if not set(self.types) <= KINDS.keys() or len(set(self.types)) < len(self.types):
            raise UsageError(f"--types is {','.join(self.types)}; give some of {','.join(KINDS)}, each once")


TINY, CARD, PAPER = range(3)
# what --resume may change: length, place, memory, speed and what is measured, but not the algorithm
KEPT = "steps save_every heldout device workers generate_batch micro_tokens".split()


def preset(column, **changes):
    return Config(**{knob.name: knob.metadata["presets"][column] for knob in fields(Config)} | changes)


def flag(name):
    return "--" + name.replace("_", "-")


def say(text):
    """One rank says it on standard error, above the progress bar."""
    if parallel.rank() == 0:
        tqdm.write(text, file=sys.stderr)


# --- Algorithm 1 -----------------------------------------------------------------------------------

def train(cfg, run):
    """Self-play from `cfg` into the run folder `run`, from its checkpoint if it holds one. → exit code"""
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    policy = load_policy(cfg.model, cfg.quantize, cfg.lora_rank, device=cfg.device,
                         rows=cfg.generate_batch, frame=cfg.frame)
    if cfg.model not in SHIPPED or policy.device.type == "cuda":
        say(forecast(policy, cfg))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    buffer = TaskBuffer(cfg.buffer, rng)
    state = policy, optimizer, buffer, rng

    with Executor(cfg.workers or parallel.workers(), cfg.timeout) as executor, interruptible() as asked:
        heldout = heldout_tasks(cfg, executor)
        done = run.restore(cfg, *state)
        if done is None:  # a seed set from the identity triplet and the model itself
            parallel.seed_sampling(rng)
            done, seeds = 0, seed_buffers(policy, executor, buffer, cfg, run, asked)
            accepted = [(task, None) for tasks in buffer.tasks.values() for task in tasks]
            metrics = measure(policy, executor, heldout, cfg) | sizes(buffer)
            run.record(0, metrics, accepted, screen(0, seeds))
            run.save(0, policy, snapshot(*state))
        stop = False
        bar = tqdm(range(done + 1, cfg.steps + 1), initial=done, total=cfg.steps, dynamic_ncols=True,
                   disable=parallel.rank() > 0)
        for step in bar:
            started = time.perf_counter()
            policy.clock.clear()
            parallel.seed_sampling(rng)

            # PROPOSE: the model invents B tasks of each type; valid ones join the buffer and are tried
            bar.set_description("propose")
            proposals, new_tasks, estimates = propose(policy, executor, buffer, cfg)

            # SOLVE: the model answers B tasks of each type, the new ones first
            bar.set_description("solve")
            batch = [task for kind in cfg.types for task in buffer.fill(kind, new_tasks, cfg.batch)]
            solutions = solve(policy, executor, batch, cfg)

            # LEARN: task-relative advantages over all rollouts, and one TRR++ update
            bar.set_description("update")
            rollouts = proposals * cfg.train_proposer + solutions + estimates * cfg.train_on_estimates
            set_advantages(rollouts, cfg, rng)
            lr = cfg.lr * (1 - (1 - cfg.lr_final) * (step - 1) / max(1, cfg.steps - 1))
            optimizer.param_groups[0]["lr"] = lr
            with policy.timed("update"):
                update = trr_update(policy, optimizer, rollouts, cfg)

            policy.clock["total"] = time.perf_counter() - started
            metrics = {**describe(proposals, solutions, cfg), **update, "lr": lr, **sizes(buffer),
                       **cost(policy)}
            last = step == cfg.steps
            if last or cfg.eval_every and step % cfg.eval_every == 0:
                metrics |= measure(policy, executor, heldout, cfg)
            accepted = [(r.task, r.solve_rate) for r in proposals if r.task]
            flags = screen(step, proposals + solutions + estimates)
            run.record(step, metrics, accepted, flags, proposals + solutions)
            run.show(bar)
            stop = any(parallel.gather(bool(run.flagged() or asked and not last)))
            if stop or last or step % cfg.save_every == 0:
                run.save(step, policy, snapshot(*state))
            if stop or "heldout/mean" in metrics:
                run.draw()
            if stop:
                break
    if done == cfg.steps:  # a kill may have come between the last checkpoint and the picture
        run.draw()
    return run.finish(stop, cfg.heldout)


def set_advantages(rollouts, cfg, rng):
    """Equation 8 over the (type, role) groups, six of them when all types and both roles train.

    --baseline task: solutions of one task, where a step holds several, are compared with each other alone,
    as in GRPO. A hard task solved once then counts for more than an easy one solved as always.
    """
    tries = Counter(r.task for r in rollouts if r.role == "solve" and cfg.baseline == "task")
    groups = [(r.type, r.role, r.task if r.role == "solve" and tries[r.task] > 1 else None) for r in rollouts]
    rewards = [rollout.reward for rollout in rollouts]
    if cfg.shuffle_rewards:  # a control: the same rewards, but no longer those of the responses
        for group in dict.fromkeys(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            for i, reward in zip(members, rng.sample([rewards[i] for i in members], len(members))):
                rewards[i] = reward
    for rollout, advantage in zip(rollouts, task_relative_advantages(rewards, groups)):
        rollout.advantage = advantage * (cfg.solve_weight if rollout.role == "solve" else 1.0)


def seed_buffers(policy, executor, buffer, cfg, run, asked):
    """Fill the buffers with B·S valid tasks of the untrained model, starting from the identity. → [Rollout]

    Deduction and abduction start with the same triplets (D_ded = D_abd = D_seed in the paper); induction
    tasks are then made from their programs. A model that seldom writes valid tasks gets 10·S rounds. Raises
    UsageError if it has written none in them.
    """
    drafts, target = [], cfg.batch * cfg.seed_factor
    triplets = [kind for kind in KINDS if KINDS[kind].is_triplet]
    groups = [triplets, *([kind] for kind in cfg.types if kind not in triplets)]
    with tqdm(total=len(groups) * target, desc="seed the buffers", unit="task", dynamic_ncols=True,
              disable=parallel.rank() > 0) as bar:
        for kinds in groups:
            bucket = buffer.tasks[kinds[0]]
            for number in range(1, 10 * cfg.seed_factor + 1):
                if len(bucket) >= target:
                    break
                fresh = draft(policy, executor, buffer, kinds, cfg)
                drafts += fresh
                for task in (rollout.task for rollout in fresh if rollout.task):
                    if len(bucket) < target and not (cfg.dedup and buffer.is_repeat(task)):
                        for kind in kinds:
                            buffer.add(replace(task, type=kind))
                        bar.update()
                run.append("samples.jsonl", pick_samples(0, fresh))
                bar.set_postfix_str(seeding_figures(drafts, policy.clock))
                if number == 2 and not any(rollout.task for rollout in drafts):
                    say(why_none_is_valid(drafts))
                if any(parallel.gather(bool(asked))):
                    raise KeyboardInterrupt
            if drafts and not any(rollout.task for rollout in drafts):
                raise UsageError(f"none of {len(drafts)} proposals is a valid task: nothing to train on; "
                                 f"read {run.folder}/samples.jsonl, then try another --frame or --model")
            if len(bucket) < target:
                say(f"warning: only {len(bucket)} of {target} seed tasks for {' and '.join(kinds)}; "
                    "the model seldom writes valid ones, and batches will repeat tasks")
    return drafts


# --- what is measured -------------------------------------------------------------------------------

def heldout_tasks(cfg, executor):
    """{"": [Task]} of the first split to measure, and {"<split>/": [Task]} of others. Raises UsageError."""
    splits = load_heldout(cfg.heldout, cfg.heldout_limit, executor)
    default = "easy" if "easy" in splits else ",".join(splits)
    names = (cfg.heldout_splits or default).split(",")
    for name in names:
        if name not in splits:
            raise UsageError(f"there are no held-out tasks of the split {name!r} in {cfg.heldout}; "
                             f"it has {', '.join(splits) or 'none'}")
    return {f"{name}/" if i else "": splits[name] for i, name in enumerate(names)}


def measure(policy, executor, heldout, cfg):
    """Greedy accuracy on the held-out tasks, with standard errors."""
    metrics = {}
    for split, tasks in heldout.items():
        scores = heldout_accuracy(policy, executor, tasks, cfg)
        for name, (score, error) in (scores | {"mean": mean_score(scores.values())}).items():
            metrics |= {f"heldout/{split}{name}": score, f"heldout_stderr/{split}{name}": error}
    return metrics


def heldout_table(metrics, name):
    """What `measure` found first and last, as text."""
    measured = [row for row in metrics if "heldout/mean" in row]
    names = [key.removeprefix("heldout/") for key in measured[-1] if key.startswith("heldout/")]
    columns = {f"step {row['step']}": {
        key: (row[f"heldout/{key}"], row[f"heldout_stderr/{key}"])
        for key in names if f"heldout/{key}" in row}  # a resumed run may measure other tasks
        for row in (measured[0], measured[-1])}
    return table(columns, "held-out accuracy" + f", {Path(name).name}" * (name != "tiny"), {})


def sizes(buffer):
    return {f"buffer/{kind}": len(tasks) for kind, tasks in buffer.tasks.items()}


def describe(proposals, solutions, cfg):
    """The metrics of a step that follow from its rollouts."""
    metrics = {}
    for kind in cfg.types:
        new, solved = ([r for r in rollouts if r.type == kind] for rollouts in (proposals, solutions))
        metrics |= {
            f"propose/{kind}/valid": average(r.verdict in (Verdict.VALID, Verdict.REPEAT) for r in new),
            f"propose/{kind}/reward": average(r.reward for r in new),
            f"propose/{kind}/learnable": average(
                r.solve_rate not in (None, 0, 1) for r in new if cfg.samples),
            f"propose/{kind}/solve_rate": average(r.solve_rate for r in new),
            f"response_tokens/propose/{kind}": average(len(r.response_ids) for r in new),
            f"solve/{kind}/accuracy": average(r.verdict is Verdict.CORRECT for r in solved),
            f"solve/{kind}/reward": average(r.reward for r in solved),
            f"solve/{kind}/well_formed": average(r.well_formed for r in solved),
            f"response_tokens/solve/{kind}": average(len(r.response_ids) for r in solved)}
    return metrics | {
        "truncated": average(r.truncated for r in proposals + solutions),
        **{f"diversity/{name}": average(r.traits.get(name) for r in proposals)
           for name in ("unique_ast", "edit_distance", "complexity", "answers", "trivial")}}


def cost(policy):
    """Seconds by phase, sampled tokens a second, and the most memory held: in this step, on a CPU so far."""
    memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock, tokens = policy.clock, sum(parallel.gather(policy.clock["tokens"]))
    return {**{f"seconds/{phase}": round(clock[phase], 3)
               for phase in ("generate", "execute", "update", "total")},
            "tokens_per_second": round(tokens / clock["generate"], 1),
            "memory_gb": round(memory / 2 ** 30, 3)}


# --- the run folder ---------------------------------------------------------------------------------

class Run:
    """A run's folder: config, logs, the newest whole checkpoint, adapter, picture.

    Logs are appended a line at a time; a checkpoint replaces the one before it in a single rename.
    A run that was killed therefore loses at most the steps since its checkpoint: `restore` cuts the
    logs back to that step, and the steps are done again exactly as they were (shipped models, on a CPU).
    """

    LOGS = ("flags.jsonl", "samples.jsonl", "tasks.jsonl", "metrics.jsonl")

    def __init__(self, folder, max_flags=sys.maxsize):
        self.folder, self.max_flags = Path(folder), max_flags
        self.checkpoint = self.folder / "checkpoint" / "state.pt"
        self.lines, self.alarms, self.changes = {}, set(), {}

    def create(self, cfg):
        """Make the folder and write config.json. Raises UsageError rather than touch what is there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.listdir(self.folder):
                raise UsageError(f"{self.folder} is not empty; give another --out, or, if it holds a run, "
                                 f"go on with it by --resume {self.folder}")
            self.acquire()
            self.write_config(cfg)
        except OSError as error:
            self.abandon()
            raise UsageError(f"cannot write to the run folder {self.folder}: {error.strerror}") from error

    def config(self, changes):
        """The run's Config with some values changed; `restore` keeps the changes. Raises UsageError."""
        values = read_config(self.folder, {"types": list, "versions": dict})
        del values["versions"]
        if values.keys() != asdict(Config()).keys():
            raise UsageError(f"{self.folder} is not a run folder of this version of the code: "
                             "its config.json has other settings")
        values["types"] = tuple(values["types"])
        cfg, self.changes = Config(**values | changes), changes
        self.acquire()
        return cfg

    def write_config(self, cfg):
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        values = json.dumps(asdict(cfg) | {"versions": versions}, indent=1) + "\n"
        replace_file(self.folder / "config.json", values.encode())

    def acquire(self):
        """Hold the folder until `close`. Raises UsageError if another process does.

        The kernel drops the lock of a process that is killed; the word in the file then stays.
        """
        self.lock = open(self.folder / "lock", "a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process trains in {self.folder}; wait for it, or stop it") from error
        self.killed = self.lock.tell() > 0
        print("running", file=self.lock, flush=True)

    def close(self):
        self.lock.truncate(0)
        self.lock.close()

    def abandon(self):
        """Remove what a run that could not start has made."""
        if self.folder.is_dir() and {*os.listdir(self.folder)} <= {"config.json", "lock"}:
            shutil.rmtree(self.folder)

    def restore(self, cfg, *state):
        """Take up the checkpoint and cut the logs back to its step. → the step, or None if there is none.

        Nothing is written before all has been read. Raises UsageError.
        """
        step, logs = None, dict.fromkeys(self.LOGS, [])
        content = parallel.of_first(self.checkpoint.read_bytes() if self.checkpoint.exists() else None)
        made = read_rows(self.folder / "metrics.jsonl", {"step": int})
        if content is None and any(row["step"] for row in made):
            raise UsageError(f"there is no {self.checkpoint} to go on from; put a copy back or start anew")
        if content is not None:
            step, counts = load(content, *state)
            logs = {name: self.read_log(name, step, counts[name]) for name in self.LOGS}
            if cfg.steps < step:
                raise UsageError(f"--steps is {cfg.steps}, but {self.folder} has done {step} steps already")
        for name, rows in logs.items():
            self.lines[name] = len(rows)
            replace_file(self.folder / name, as_lines(rows))
        self.metrics = logs["metrics.jsonl"]
        if self.changes:
            self.write_config(cfg)
            print("kept from now on:", *(f"{flag(name)} {value}" for name, value in self.changes.items()))
        if self.killed:
            say(f"the last process of this run was killed after step {step or 0}; if the system was out of "
                "memory, lower --micro-tokens, --generate-batch or --workers")
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        threading.excepthook = lambda _: None  # what its thread cannot write, it raises again in this one
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=len(self.metrics))
        return step

    def read_log(self, name, step, count):
        """The rows of a log up to a step. Raises UsageError for damaged or lost lines."""
        rows = [row for row in read_rows(self.folder / name, {"step": int}) if row["step"] <= step]
        if len(rows) < count:
            raise UsageError(f"{self.folder / name} has lost {count - len(rows)} of its {count} lines up to "
                             f"step {step}; put a copy back, or start a new run")
        return rows

    def record(self, step, metrics, accepted, flags, rollouts=()):
        """Append the step to metrics.jsonl, samples.jsonl, tasks.jsonl, flags.jsonl and TensorBoard.

        accepted: [(Task, its solve rate or None)], new in the buffer. rollouts: what samples are drawn from.
        """
        metrics = {**metrics, "flags": len(flags)}
        self.metrics.append({"step": step, **metrics})
        self.append("samples.jsonl", pick_samples(step, rollouts))
        self.append("flags.jsonl", flags)
        self.append("tasks.jsonl", [{"step": step, "solve_rate": rate, **asdict(task)}
                                    for task, rate in accepted])
        self.append("metrics.jsonl", self.metrics[-1:])
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def append(self, name, rows):
        self.lines[name] += len(rows)
        write_through(self.folder / name, "ab", as_lines(rows))

    def show(self, bar):
        """The step's figures in the progress bar, and alarms that are new: which, its band, what to try."""
        metrics, found = self.metrics[-1], {alarm["name"]: alarm for alarm in alarms(self.metrics)}
        for name, alarm in found.items():
            if name not in self.alarms:
                say(f"step {metrics['step']}: {name} is {alarm['value']:.3g}, should be {alarm['band']}: "
                    f"{alarm['advice']}")
        self.alarms = found.keys()
        solved = average(value for key, value in metrics.items() if key.endswith("/accuracy"))
        bar.set_postfix({"solved": solved, "flags": self.lines["flags.jsonl"]}
                        | {"ALARM": name for name in found}, refresh=False)

    def draw(self):
        """Write the picture and the page anew."""
        draw_curves(self.metrics, self.folder / "curves.png")
        try:
            write_page(self.folder)
        except UsageError as error:  # a log that somebody edited is no reason to end the run
            say(f"warning: report.html is not written: {error}")

    def flagged(self):
        """Whether there are more flags than --max-flags."""
        return self.lines["flags.jsonl"] > self.max_flags

    def save(self, step, policy, state):
        """Write the adapter for others to load, then `state`: everything that the next step depends on."""
        self.export(policy)  # first, so that a kill in between leaves no finished run with an old adapter
        self.checkpoint.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        torch.save({"step": step, "lines": self.lines, **state}, content)
        replace_file(self.checkpoint, content.getbuffer())

    def export(self, policy):
        """The policy as a PEFT folder, or as a whole model if all weights are trained."""
        name = "model" if policy.model is policy.causal else "adapter"
        fresh, final = self.folder / f"{name}.new", self.folder / name
        # PEFT's "auto" would ask the hub whether the vocabulary has grown; a bare model ignores it
        policy.model.save_pretrained(fresh, save_embedding_layers=False)
        if name == "model":
            policy.tokenizer.save_pretrained(fresh)
        for path in filter(Path.is_file, [*fresh.rglob("*")]):
            target = final / path.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(fresh)

    def resume_hint(self):
        hint = "the checkpoint is whole, go on" if self.checkpoint.exists() else "no checkpoint yet, begin"
        return f"{hint} with: python train.py --resume {self.folder}"

    def finish(self, stopped, heldout):
        """Print how to go on, or held-out accuracy before and after. → exit code; 3 after too many flags"""
        count, flags = self.lines["flags.jsonl"], self.folder / "flags.jsonl"
        if stopped:
            reason = f": {count} flags; read {flags} first" * self.flagged()
            print(f"stopped after step {self.metrics[-1]['step']}{reason}; go on with: "
                  f"python train.py --resume {self.folder}" + " --max-flags N" * self.flagged())
            return 3 * self.flagged()
        print(f"\n{heldout_table(self.metrics, heldout)}\n\nrun folder  {self.folder}\n"
              f"picture     {self.folder}/curves.png\npage        {self.folder}/report.html")
        if count:
            print(f"flags       {count}, in {flags}")
        return 0


def snapshot(policy, optimizer, buffer, rng):
    """Everything that the next step depends on. All ranks take it together, and must be alike."""
    parallel.check_same(policy.trainable().values())
    return {"weights": policy.trainable(), "optimizer": optimizer.state_dict(), "buffer": buffer.state(),
            "python_rng": rng.getstate(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(), "ranks": parallel.ranks(),
            "mean_tokens": policy.mean_tokens}


def load(content, policy, optimizer, buffer, rng):
    """Put a checkpoint into its place. → its step, and the lines of the logs up to it. Raises UsageError."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if policy.trainable().keys() != state["weights"].keys():
            raise KeyError("its weights are of another model")
        policy.model.load_state_dict(state["weights"], strict=False)  # frozen ones are not in it
        optimizer.load_state_dict(state["optimizer"])
        buffer.restore(state["buffer"])
        policy.mean_tokens = state["mean_tokens"]
        rng.setstate(state["python_rng"])
        torch.set_rng_state(state["torch_rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"][:torch.cuda.device_count()])
        if state["ranks"] != parallel.ranks():
            say(f"this run had {state['ranks']} ranks and now has {parallel.ranks()}: what it samples will "
                "differ from an uninterrupted run")
        return state["step"], state["lines"]
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"the checkpoint is damaged ({reason}); put a copy back into checkpoint, or start a "
                         "new run") from error


class Follower:
    """The run folder for the ranks behind the first, which write nothing."""

    folder = "the run"

    def restore(self, cfg, *state):
        content = parallel.of_first(None)
        return None if content is None else load(content, *state)[0]

    def __getattr__(self, name):
        return lambda *arguments: None


def pick_samples(step, rollouts):
    """One rollout of each role and type, whole, drawn anew each step."""
    names = "role type prompt response verdict reason reward advantage solve_rate truncated".split()
    chosen = {(r.role, r.type): r for r in random.Random(step).sample(rollouts, len(rollouts))}
    return [{"step": step, **{name: getattr(r, name) for name in names}} for r in chosen.values()]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@contextmanager
def interruptible():
    """Yields a list that fills when Ctrl-C or SIGTERM asks for an end after this step; twice is at once."""
    asked = []

    def handle(number, frame):
        if asked and time.monotonic() > asked[0] + 1:  # torchrun passes on what a terminal has sent already
            raise KeyboardInterrupt
        asked.append(time.monotonic())
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    previous = [(number, signal.signal(number, handle)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield asked
    finally:
        for handled in previous:
            signal.signal(*handled)


# --- the command line -------------------------------------------------------------------------------

def parse(arguments):
    """The command line → {name: value} of what was given."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawTextHelpFormatter, argument_default=argparse.SUPPRESS,
        description="Self-play training of a language model on Python reasoning tasks, from zero data.")
    add = parser.add_argument
    add("--out", help="run folder; default: runs/<model>-<date>")
    add("--resume", metavar="RUN", help=f"go on with this run; beside it only {', '.join(map(flag, KEPT))}\n"
        "and --max-flags may be given")
    add("--report", metavar="RUN", help="only write RUN/report.html anew, from the run's logs")
    add("--max-flags", type=int, help="stop, with a checkpoint, after more flags than this; default: never\n"
        "(holds for this process; give it again with --resume)")
    add("--paper", action="store_true", help="the paper's values instead of the defaults below")
    for knob in fields(Config):
        convert = (*get_args(knob.type), knob.type)[0]
        how = {"action": argparse.BooleanOptionalAction} if convert is bool else {
            "type": (lambda text: tuple(text.split(","))) if convert is tuple else convert,
            "choices": knob.metadata["choices"]}
        shown = [",".join(value) if convert is tuple else value for value in knob.metadata["presets"]]
        presets = "\n(tiny {}, else {}, paper {})" if len({*shown}) > 1 else "\n(default {})"
        text = knob.metadata["text"] + presets.format(*shown) * ({*shown} not in ({None}, {""}))
        add(flag(knob.name), help=text, **how)
    return vars(parser.parse_args(arguments))


def configure(given):
    """What was given → (Config, Run). Raises UsageError for values that cannot work."""
    for name, value in given.items():
        if value == "":
            raise UsageError(f"{flag(name)} is empty; give it a value or leave it out")
        if "resume" in given and name not in (*KEPT, "resume", "max_flags"):
            raise UsageError(f"--resume goes on with the run's own values; drop {flag(name)}")
    max_flags = given.get("max_flags", sys.maxsize)
    if max_flags < 0:
        raise UsageError(f"--max-flags is {max_flags}; it must be at least 0")
    changes = {knob.name: given[knob.name] for knob in fields(Config) if knob.name in given}
    for name in {"model", "heldout"} & changes.keys():  # paths hold from any folder
        if changes[name] not in (*SHIPPED, "cruxeval") and Path(changes[name]).exists():
            changes[name] = os.path.abspath(changes[name])
    if "resume" in given:
        run = Run(given["resume"], max_flags)
        return run.config(changes), run
    column = PAPER if "paper" in given else TINY if given.get("model", "tiny") in SHIPPED else CARD
    cfg = preset(column, **changes)
    if cfg.heldout == "cruxeval" and "heldout" not in changes:
        try:
            load_heldout("cruxeval")
        except UsageError as error:
            say(f"{error}\nheld-out tasks are the tiny model's, which say little of another")
            cfg = replace(cfg, heldout="tiny")
    run = Run(given.get("out", f"runs/{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"), max_flags)
    run.create(cfg)
    return cfg, run


def main(arguments=None):
    given, run = parse(arguments), None
    with parallel.joined():
        name = "train.py" if parallel.ranks() == 1 else f"train.py, rank {parallel.rank()}"
        try:
            if given.get("report"):
                print(write_page(given["report"]))
                return 0
            cfg, run = configure(given) if parallel.rank() == 0 else (None, Follower())
            return train(parallel.of_first(cfg), run)
        except UsageError as error:
            if run and "resume" not in given:
                run.abandon()
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            say(f"\nstopped at once; {run.resume_hint() if run else 'nothing was written'}")
            return 130
        except (OSError, MemoryError, SafetensorError, torch.OutOfMemoryError) as error:
            print(f"{name}: {error or 'out of memory'}; {run and run.resume_hint() or ''}", file=sys.stderr)
            return 1
        finally:
            if run:
                run.close()


if __name__ == "__main__":
    sys.exit(main())
