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
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from azr import (HELDOUT, SHIPPED, draft, heldout_accuracy, load_heldout, load_policy, propose, solve,
                 trr_update)
from executor import Executor
from report import alarms, draw_curves, mean_score, measured_splits, screen, table, write_page
from rewards import Verdict, task_relative_advantages
from tasks import KINDS, TASK_TYPES, TaskBuffer, UsageError


# --- every number that shapes a run ----------------------------------------------------------------

def setting(text, tiny, card=None, paper=None, low=0, high=10 ** 6, choices=None):
    """A field of Config. Its presets: the tiny model on a CPU, a 3B model on one 24 GB card, the paper."""
    presets = [tiny if value is None else value for value in (tiny, card, paper)]
    return field(default=tiny, metadata={"text": text, "presets": presets, "range": (low, high),
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
    max_prompt: int = setting("tokens of a prompt; references leave until it fits", 512, 4096, 6144, low=1)
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
    train_proposer: bool = setting("without: the proposer proposes but is not trained", True)
    shuffle_rewards: bool = setting("control: rewards are shuffled within each group", False)
    dedup: bool = setting("programs that were seen before earn nothing and are not stored", True, True, False)
    zero_learnability: str = setting("reward of tasks solved never or always: paper 0, official code -0.5",
                                     "paper", choices=("paper", "official"))

    eval_every: int = setting("steps between held-out evaluations; 0: only before and after", 10, 20, 20)
    save_every: int = setting("steps between checkpoints", 5, low=1)
    heldout: str = setting("JSON lines of held-out tasks; default: the tiny model's", "")
    heldout_limit: int | None = setting("most held-out tasks a type and split; default: all", None, low=1)
    heldout_splits: str = setting("splits of that file to measure, with commas; default: easy, or all", "")

    seed: int = setting("random seed", 0, high=2 ** 63 - 1)
    quantize: str = setting("4-bit base weights; auto: on a GPU", "auto", choices=("auto", "4bit", "none"))
    device: str | None = setting("cuda, cuda:1 or cpu; default: cuda where there is one", None)
    workers: int | None = setting("sandbox workers; default: all cores", None, low=1, high=512)
    threads: int = setting("CPU threads of torch (tiny: one is best); 0: its choice", 1, 0, 0, high=256)
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
        if not set(self.types) <= set(KINDS) or len(set(self.types)) != len(self.types):
            raise UsageError(f"--types is {','.join(self.types)}; give some of {','.join(KINDS)}, each once")


TINY, CARD, PAPER = range(3)
# what --resume may change: length, place, memory and speed, but not results
KEPT = "steps save_every heldout device workers threads generate_batch micro_tokens".split()


def preset(column, **changes):
    return Config(**{knob.name: knob.metadata["presets"][column] for knob in fields(Config)} | changes)


def flag(name):
    return "--" + name.replace("_", "-")


# --- Algorithm 1 -----------------------------------------------------------------------------------

def train(cfg, run):
    """Self-play from `cfg` into the run folder `run`, from its checkpoint if it holds one. → exit code"""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    policy = load_policy(cfg.model, cfg.quantize, cfg.lora_rank, device=cfg.device, rows=cfg.generate_batch)
    if policy.device.type == "cuda":
        print(forecast(policy, cfg, torch.cuda.get_device_properties(policy.device).total_memory))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    buffer = TaskBuffer(cfg.buffer, rng)
    state = policy, optimizer, buffer, rng

    with Executor(cfg.workers, cfg.timeout) as executor, interruptible() as asked:
        heldout = heldout_tasks(cfg, executor)
        done = run.restore(cfg, *state)
        if done is None:  # a seed set from the identity triplet and the model itself
            done, seeds = 0, seed_buffers(policy, executor, buffer, cfg, asked)
            tasks = [task for tasks in buffer.tasks.values() for task in tasks]
            metrics = measure(policy, executor, heldout, cfg) | sizes(buffer)
            run.record(0, metrics, tasks=tasks, flags=screen(0, seeds))
            run.save(0, *state)
        bar = tqdm(range(done + 1, cfg.steps + 1), initial=done, total=cfg.steps, dynamic_ncols=True)
        for step in bar:
            started = time.perf_counter()
            policy.clock.clear()

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
            for group in optimizer.param_groups:
                group["lr"] = lr
            with policy.timed("update"):
                update = trr_update(policy, optimizer, rollouts, cfg)

            metrics = {**describe(proposals, solutions, cfg), **update, "lr": lr, **sizes(buffer),
                       **cost(policy, time.perf_counter() - started)}
            last = step == cfg.steps
            if last or cfg.eval_every and step % cfg.eval_every == 0:
                metrics |= measure(policy, executor, heldout, cfg)
            flags = screen(step, proposals + solutions + estimates)
            run.record(step, metrics, proposals, solutions, flags=flags)
            run.show(bar, metrics)
            stop = asked or run.flagged()
            if stop or last or step % cfg.save_every == 0:
                run.save(step, *state)
            if stop or "heldout/mean" in metrics:
                run.write_page(bar)
            if run.flagged() or stop and not last:
                bar.close()
                return run.stopped(step)
        bar.close()
    run.finish()
    return 0


def set_advantages(rollouts, cfg, rng):
    """Equation 8 over the (type, role) groups, six of them when all types and both roles train.

    --baseline task: solutions of one task, where a step holds several, are compared with each other alone,
    as in GRPO. A hard task solved once then counts for more than an easy one solved as always.
    """
    groups = [(rollout.type, rollout.role) for rollout in rollouts]
    if cfg.baseline == "task":
        tries = Counter(rollout.task for rollout in rollouts if rollout.role == "solve")
        groups = [(*group, rollout.task if group[1] == "solve" and tries[rollout.task] > 1 else None)
                  for group, rollout in zip(groups, rollouts)]
    rewards = [rollout.reward for rollout in rollouts]
    if cfg.shuffle_rewards:  # a control: the same rewards, but no longer those of the responses
        for group in dict.fromkeys(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            for i, reward in zip(members, rng.sample([rewards[i] for i in members], len(members))):
                rewards[i] = reward
    for rollout, advantage in zip(rollouts, task_relative_advantages(rewards, groups)):
        rollout.advantage = advantage * (cfg.solve_weight if rollout.role == "solve" else 1.0)


def seed_buffers(policy, executor, buffer, cfg, asked):
    """Fill the buffers with B·S valid tasks of the untrained model, starting from the identity. → [Rollout]

    Deduction and abduction start with the same triplets (D_ded = D_abd = D_seed in the paper); induction
    tasks are then made from their programs. A model that seldom writes valid tasks gets 10·S rounds.
    """
    drafts, target = [], cfg.batch * cfg.seed_factor
    triplets = [kind for kind in KINDS if KINDS[kind].is_triplet]
    groups = [triplets, *([kind] for kind in cfg.types if kind not in triplets)]
    bar = tqdm(total=len(groups) * target, desc="seed the buffers", unit="task", dynamic_ncols=True)
    for kinds in groups:
        bucket, rounds = buffer.tasks[kinds[0]], 10 * cfg.seed_factor
        while len(bucket) < target and rounds:
            rounds -= 1
            fresh = draft(policy, executor, buffer, kinds, cfg)
            drafts += fresh
            for task in (rollout.task for rollout in fresh if rollout.task):
                if len(bucket) < target and not (cfg.dedup and buffer.is_repeat(task)):
                    for kind in kinds:
                        buffer.add(replace(task, type=kind))
                    bar.update()
            if asked:
                raise KeyboardInterrupt
        if len(bucket) < target:
            bar.write(f"warning: only {len(bucket)} of {target} seed tasks for {' and '.join(kinds)}; "
                      "the model seldom writes valid ones, and batches will repeat tasks", file=sys.stderr)
    bar.close()
    buffer.protect()
    return drafts


def forecast(policy, cfg, memory):
    """Keep micro-batches to what a card of `memory` bytes holds. → a line that says what to expect there

    Memory is a fit to scripts/memory.py; 2.2e9 are for CUDA, gradients and AdamW. Seconds are estimates for
    a 24 GB card: 4,100 tokens decoded one after the other, 1.25 ms a layer to launch its kernels; an update
    of 1,000 tokens a rollout, at 60 TFLOP/s.
    """
    config = policy.causal.config.get_text_config()
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    a_token = (2 * layers + 50) * width + 14 * inner  # bytes: the inputs of all layers, and all of one layer
    held = policy.causal.get_memory_footprint() + 2.2e9
    policy.micro_tokens = max(1, min(cfg.micro_tokens, (memory - held) // a_token))
    seconds = layers * (5 + 1.1e-9 * cfg.batch * (2 + cfg.samples) * width * inner)
    return (f"expected, not measured: {(held + a_token * policy.micro_tokens) / 2 ** 30:.0f} GB, "
            f"{seconds:.0f} seconds a step, {seconds * cfg.steps / 3600:.0f} hours in all")


# --- what is measured -------------------------------------------------------------------------------

def heldout_tasks(cfg, executor):
    """{prefix of the metrics: [Task]}: `heldout`, then `heldout/<split>` for others. Raises UsageError."""
    path = cfg.heldout or HELDOUT
    splits = load_heldout(path, cfg.heldout_limit, executor if cfg.heldout else None)
    default = "easy" if "easy" in splits else ",".join(splits)
    names = (cfg.heldout_splits or default).split(",")
    for name in names:
        if name not in splits:
            raise UsageError(f"there are no held-out tasks of the split {name!r} in {path}; "
                             f"it has {', '.join(splits) or 'none'}")
    return {f"heldout/{name}" if i else "heldout": splits[name] for i, name in enumerate(names)}


def measure(policy, executor, heldout, cfg):
    """Greedy accuracy on the held-out tasks, with standard errors."""
    metrics = {}
    for prefix, tasks in heldout.items():
        scores = heldout_accuracy(policy, executor, tasks, cfg)
        for name, (score, error, *_) in (scores | {"mean": mean_score(scores)}).items():
            metrics |= {f"{prefix}/{name}": score, f"{with_error(prefix)}/{name}": error}
    return metrics


def with_error(prefix):
    return prefix.replace("heldout", "heldout_stderr", 1)


def sizes(buffer):
    return {f"buffer/{kind}": len(tasks) for kind, tasks in buffer.tasks.items()}


def mean(values):
    """The mean of all that is not None, or None (JSON null) of nothing: a zero would be a lie."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def describe(proposals, solutions, cfg):
    """The metrics of a step that follow from its rollouts."""
    metrics = {}
    for kind in cfg.types:
        new, solved = ([r for r in rollouts if r.type == kind] for rollouts in (proposals, solutions))
        metrics |= {
            f"propose/{kind}/valid": mean(r.verdict in (Verdict.VALID, Verdict.REPEAT) for r in new),
            f"propose/{kind}/reward": mean(r.reward for r in new),
            f"propose/{kind}/learnable": mean(r.solve_rate not in (None, 0, 1) for r in new),
            f"propose/{kind}/solve_rate": mean(r.solve_rate for r in new),
            f"response_tokens/propose/{kind}": mean(len(r.response_ids) for r in new),
            f"solve/{kind}/accuracy": mean(r.verdict is Verdict.CORRECT for r in solved),
            f"solve/{kind}/reward": mean(r.reward for r in solved),
            f"solve/{kind}/well_formed": mean(r.well_formed for r in solved),
            f"response_tokens/solve/{kind}": mean(len(r.response_ids) for r in solved)}
    return metrics | {
        "truncated": mean(r.truncated for r in proposals + solutions),
        "diversity/unique_ast": mean(r.fresh for r in proposals),
        **{f"diversity/{name}": mean(r.traits.get(name) for r in proposals)
           for name in ("edit_distance", "complexity", "answers", "trivial")}}


def cost(policy, seconds):
    """Seconds by phase, sampled tokens a second, and the most memory held so far."""
    memory = (torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    clock = policy.clock
    return {**{f"seconds/{phase}": round(clock[phase], 3) for phase in ("generate", "execute", "update")},
            "seconds/total": round(seconds, 3), "memory_gb": round(memory / 2 ** 30, 3),
            "tokens_per_second": round(clock["tokens"] / clock["generate"], 1)}


# --- the run folder ---------------------------------------------------------------------------------

class Run:
    """A run's folder: config, logs, the newest whole checkpoint, adapter, picture.

    Logs are appended a line at a time; a checkpoint replaces the one before it in a single rename.
    A run that was killed therefore loses at most the steps since its checkpoint: `restore` cuts the
    logs back to that step, and the steps are done again exactly as they were (on a CPU).
    """

    LOGS = ("metrics.jsonl", "samples.jsonl", "tasks.jsonl", "flags.jsonl")

    def __init__(self, folder, max_flags=None):
        self.folder, self.max_flags = Path(folder), max_flags
        self.checkpoint = self.folder / "checkpoint" / "state.pt"
        self.metrics, self.lines, self.alarms, self.changes = [], Counter(), {}, {}

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

    def abandon(self):
        """Remove what a run that could not start has made."""
        if self.folder.is_dir() and {*os.listdir(self.folder)} <= {"config.json", "lock"}:
            shutil.rmtree(self.folder)

    def write_config(self, cfg):
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        values = asdict(cfg) | {"versions": versions}
        replace_file(self.folder / "config.json", (json.dumps(values, indent=1) + "\n").encode())

    def config(self, changes):
        """The run's Config with some values changed; `restore` keeps the changes. Raises UsageError."""
        try:
            values = json.loads((self.folder / "config.json").read_text())
            del values["versions"]
            values["types"] = tuple(values["types"])
            if values.keys() != asdict(Config()).keys():
                raise KeyError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.folder} is not a run folder, or one of another version of this code: "
                             "cannot read its config.json") from error
        self.changes = {name: value for name, value in changes.items() if value != values[name]}
        cfg = Config(**values | changes)
        self.acquire()
        return cfg

    def resume_hint(self):
        hint = "the checkpoint is whole, go on" if self.checkpoint.exists() else "no checkpoint yet, begin"
        return f"{hint} with: python train.py --resume {self.folder}"

    def save(self, step, policy, optimizer, buffer, rng):
        """Write everything that the next step depends on, then the adapter for others to load."""
        for name in self.LOGS:  # what the checkpoint counts must be on the disk before it
            with open(self.folder / name, "a") as file:
                os.fsync(file.fileno())
        state = {"step": step, "lines": dict(self.lines), "optimizer": optimizer.state_dict(),
                 "weights": {n: p.detach().cpu() for n, p in policy.trainable().items()},
                 "buffer": buffer.state(), "python_rng": rng.getstate(), "torch_rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        self.checkpoint.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        torch.save(state, content)
        replace_file(self.checkpoint, content.getbuffer())
        try:
            self.save_pretrained(policy)
        except SafetensorError as error:  # a full disk, in its words
            raise OSError(str(error)) from error

    def save_pretrained(self, policy):
        name = "model" if policy.model is policy.causal else "adapter"
        fresh, final = self.folder / f"{name}.new", self.folder / name
        if name == "adapter":  # "auto" would ask the hub whether the vocabulary has grown
            policy.model.save_pretrained(fresh, save_embedding_layers=False)
        else:
            policy.model.save_pretrained(fresh)
            policy.tokenizer.save_pretrained(fresh)
        final.mkdir(exist_ok=True)
        for path in fresh.iterdir():
            os.replace(path, final / path.name)
        fresh.rmdir()

    def restore(self, cfg, policy, optimizer, buffer, rng):
        """Take up the checkpoint and cut the logs back to its step. → the step, or None if there is none.

        Nothing is written before all has been read. Raises UsageError.
        """
        step, logs = None, dict.fromkeys(self.LOGS, ())
        if self.checkpoint.exists():
            step, counts = self.load(policy, optimizer, buffer, rng)
            logs = {name: self.read_log(name, step, counts[name]) for name in self.LOGS}
        if step is not None and cfg.steps < step:
            raise UsageError(f"--steps is {cfg.steps}, but {self.folder} has done {step} steps already")
        for name, kept in logs.items():
            self.lines[name] = len(kept)
            replace_file(self.folder / name, b"".join(kept))
        self.metrics = [json.loads(line) for line in logs["metrics.jsonl"]]
        if self.changes:
            self.write_config(cfg)
            print("kept from now on:", *(f"{flag(name)} {value}" for name, value in self.changes.items()))
        if self.killed:
            print(f"the last process of this run was killed after step {step}; if the system was out of "
                  "memory, lower --micro-tokens, --generate-batch or --workers", file=sys.stderr)
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        threading.excepthook = lambda _: None  # what its thread cannot write, it raises again in this one
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=0 if step is None else step + 1)
        return step

    def load(self, policy, optimizer, buffer, rng):
        """Everything of the checkpoint into its place. → its step, and the lines of the logs up to it"""
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            parameters = policy.trainable()
            if parameters.keys() != state["weights"].keys():
                raise KeyError("its weights are of another model")
            with torch.no_grad():
                for name, weight in state["weights"].items():
                    parameters[name].copy_(weight)
            optimizer.load_state_dict(state["optimizer"])
            buffer.restore(state["buffer"])
            rng.setstate(state["python_rng"])
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            return state["step"], Counter(state["lines"])
        except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"the checkpoint {self.checkpoint} is damaged ({reason}); "
                             "put a copy back, or start a new run") from error

    def read_log(self, name, step, count):
        """The lines of a log up to a step, as bytes. Raises UsageError for damaged or lost ones."""
        path, kept = self.folder / name, []
        # bytes, since model text may hold U+2028, where str.splitlines would cut
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:  # a kill may cut the last one
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UsageError(f"line {number} of {path} is damaged; put a copy back, or cut it") from error
        if len(kept) < count:
            raise UsageError(f"{path} has lost {count - len(kept)} of its {count} lines up to step {step}; "
                             "put a copy back, or start a new run")
        return kept

    def record(self, step, metrics, proposals=(), solutions=(), tasks=(), flags=()):
        """Append the step to metrics.jsonl, samples.jsonl, tasks.jsonl, flags.jsonl and TensorBoard."""
        metrics = {"step": step, **metrics, "flags": len(flags)}
        self.metrics.append(metrics)
        accepted = [(r.task, r.solve_rate) for r in proposals if r.verdict is Verdict.VALID]
        samples = pick_samples(step, [*proposals, *solutions])
        rows = {"flags.jsonl": flags, "samples.jsonl": samples, "metrics.jsonl": [metrics],
                "tasks.jsonl": [{"step": step, "solve_rate": rate, **asdict(task)}
                                for task, rate in accepted + [(task, None) for task in tasks]]}
        for name in self.LOGS:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
            self.lines[name] += len(rows[name])
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, step)
        for sample in samples:
            text = "\n\n".join(f"**{name}**\n\n```\n{value}\n```" for name, value in sample.items())
            self.writer.add_text(f"{sample['role']}/{sample['type']}", text, step)
        self.writer.flush()
        if "heldout/mean" in metrics and step:
            draw_curves(self.metrics, self.folder / "curves.png")

    def show(self, bar, metrics):
        """The step's figures in the progress bar, and alarms that are new: which, its band, what to try."""
        before, self.alarms = self.alarms, {alarm["name"]: alarm for alarm in alarms(self.metrics)}
        for name in self.alarms.keys() - before.keys():
            bar.write("step {step}: {name} is {value:.3g}, should be {band}: {advice}".format(
                step=self.metrics[-1]["step"], **self.alarms[name]), file=sys.stderr)
        solved = mean(value for key, value in metrics.items() if key.endswith("/accuracy"))
        bar.set_postfix({"solved": solved, "flags": self.lines["flags.jsonl"]}
                        | {"ALARM": name for name in self.alarms}, refresh=False)

    def flagged(self):
        """Whether there are more flags than --max-flags."""
        return self.max_flags is not None and self.lines["flags.jsonl"] > self.max_flags

    def write_page(self, bar):
        try:
            write_page(self.folder)
        except UsageError as error:  # a log that somebody edited is no reason to end the run
            bar.write(f"warning: report.html is not written: {error}", file=sys.stderr)

    def stopped(self, step):
        """Say how to go on after a stop by a person (exit code 0) or by --max-flags (3). → exit code"""
        reason = f": {self.lines['flags.jsonl']} flags; read {self.folder}/flags.jsonl first" * self.flagged()
        print(f"stopped after step {step}{reason}; go on with: python train.py --resume {self.folder}"
              + " --max-flags N" * self.flagged())
        return 3 * self.flagged()

    def finish(self):
        """Print held-out accuracy before and after, and where everything is."""
        measured = [m for m in self.metrics if "heldout/mean" in m]
        for prefix in measured_splits(measured[-1]):
            columns = {f"step {m['step']}": {kind: (m[f"{prefix}/{kind}"], m[f"{with_error(prefix)}/{kind}"])
                                             for kind in KINDS if f"{prefix}/{kind}" in m}
                       for m in (measured[0], measured[-1])}
            print("\n" + table(columns, prefix.replace("heldout", "held-out accuracy").replace("/", ", ")))
        print(f"\nrun folder  {self.folder}\npicture     {self.folder}/curves.png\n"
              f"page        {self.folder}/report.html")
        if self.lines["flags.jsonl"]:
            print(f"flags       {self.lines['flags.jsonl']}, in {self.folder}/flags.jsonl")


def pick_samples(step, rollouts):
    """One rollout of each role and type, whole, drawn anew each step."""
    names = "role type prompt response verdict reason reward advantage solve_rate truncated".split()
    chosen = {(r.role, r.type): r for r in random.Random(step).sample(rollouts, len(rollouts))}
    return [{"step": step, **{name: getattr(r, name) for name in names}} for r in chosen.values()]


def replace_file(path, content):
    """Write a file so that at any moment either the old or the new content is there, whole."""
    fresh = path.with_name(path.name + ".new")
    try:
        with open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def interruptible():
    """Yields a list that fills when Ctrl-C or SIGTERM asks for an end after this step; twice is at once."""
    asked = []

    def handle(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- the command line -------------------------------------------------------------------------------

def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawTextHelpFormatter,
        description="Self-play training of a language model on Python reasoning tasks, from zero data.")
    add = parser.add_argument
    add("--out", help="run folder; default: runs/<model>-<date>")
    add("--resume", metavar="RUN", help=f"go on with this run; beside it only {', '.join(map(flag, KEPT))}\n"
        "and --max-flags may be given")
    add("--report", metavar="RUN", help="only write RUN/report.html anew, from the run's logs")
    add("--max-flags", type=int, help="stop, with a checkpoint, after so many flags; default: never")
    add("--paper", action="store_true", default=None, help="the paper's values instead of the defaults below")
    for knob in fields(Config):
        convert = (*get_args(knob.type), knob.type)[0]
        how = {"action": argparse.BooleanOptionalAction} if convert is bool else {
            "type": (lambda text: tuple(text.split(","))) if convert is tuple else convert,
            "choices": knob.metadata["choices"]}
        presets = "\n(tiny {}, else {}, paper {})".format(*knob.metadata["presets"])
        add(flag(knob.name), help=knob.metadata["text"] + presets, **how)
    return parser.parse_args(arguments)


def configure(options):
    """Command line → (Config, Run). Raises UsageError for values that cannot work."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name, value in given.items():
        if value in ("", ("",)):
            raise UsageError(f"{flag(name)} is empty; give it a value or leave it out")
    if given.get("max_flags", 0) < 0:
        raise UsageError(f"--max-flags is {options.max_flags}; it must be at least 0")
    changes = {knob.name: given[knob.name] for knob in fields(Config) if knob.name in given}
    for name in {"model", "heldout"} & changes.keys():  # paths hold from any folder
        if changes[name] not in SHIPPED and Path(changes[name]).exists():
            changes[name] = str(Path(changes[name]).resolve())
    if options.resume:
        for name in given.keys() - {*KEPT, "resume", "max_flags"}:
            raise UsageError(f"--resume goes on with the run's own values; drop {flag(name)}")
        run = Run(options.resume, options.max_flags)
        return run.config(changes), run
    cfg = preset(PAPER if options.paper else TINY if options.model in (None, *SHIPPED) else CARD, **changes)
    run = Run(options.out or f"runs/{Path(cfg.model).name}-{datetime.now():%Y%m%d-%H%M%S}", options.max_flags)
    run.create(cfg)
    return cfg, run


def main(arguments=None):
    options, run = parse(arguments), None
    try:
        if options.report:
            print(write_page(options.report))
            return 0
        cfg, run = configure(options)
        return train(cfg, run)
    except UsageError as error:
        if run and not options.resume:
            run.abandon()
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped at once; {run.resume_hint() if run else 'nothing was written'}", file=sys.stderr)
        return 130
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # what is on disk is whole
        print(f"train.py: {error or 'out of memory'}; {run.resume_hint() if run else ''}", file=sys.stderr)
        return 1
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    sys.exit(main())
