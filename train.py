"""The Absolute Zero Reasoner: python train.py

One model invents Python tasks, solves them, and learns from both; the sandbox is the only judge.
Read `train` first: it is Algorithm 1 of the paper (Zhao et al. 2025, arXiv 2505.03335).
"""

import argparse
import io
import json
import os
import pickle
import platform
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from azr import SHIPPED, draft, load_policy, propose, solve, trr_update
from eval import (HELDOUT, chosen, evaluate_benchmarks, heldout_accuracy, load_benchmarks, load_heldout,
                  mean_score, table)
from executor import Executor
from report import alarms, draw_curves, measured_splits, screen, write_page
from rewards import TRAITS, task_relative_advantages
from tasks import TASK_TYPES, TaskBuffer, UsageError

# Every number that shapes a run. Three columns: the shipped tiny model on a CPU, a model of 3B on one
# 24 GB GPU, and the paper's values (--paper). A flag beats its column.
KNOBS = {  #              tiny   24 GB   paper   what it is
    "steps":             (  60,    200,    500, "updates"),
    "batch":             (  16,     16,     64, "B: proposals, and solutions, for each type in a step"),
    "samples":           (   4,      8,      8, "n: tries that estimate a new task's learnability"),
    "references":        (   2,      6,      6, "K: tasks from the buffer that the proposer is shown; 0 shows none"),
    "inputs":            (   6,     10,     10, "N: inputs of an induction task; half of them stay hidden"),
    "seed_factor":       (   4,      4,      4, "S: the buffers are seeded with B·S valid tasks"),
    "buffer":            (16384, 16384,  16384, "tasks kept for each type; a full buffer evicts at random"),
    "max_prompt":        ( 512,   4096,   6144, "tokens of a prompt; references are dropped until it fits"),
    "max_response":      (  96,   2048,   8096, "tokens of a response; longer ones are cut and count as malformed"),
    "lr":                (1e-4,   2e-5,   1e-6, "learning rate of AdamW (paper: of full fine-tuning)"),
    "lr_final":          ( 1.0,    1.0,    1.0, "share of --lr that is left at the last step, on a straight line"),
    "lora_rank":         (  32,     32,      0, "LoRA rank on all linear layers, alpha is twice it; 0 trains all weights"),
    "clip":              ( 0.2,    0.2,    0.2, "PPO's epsilon; with one update a step the ratio is 1"),
    "entropy_coef":      (0.001, 0.001,  0.001, "weight of the entropy bonus in the loss"),
    "solve_weight":      ( 1.0,    1.0,    1.0, "λ of equation 3: weight of the solver's advantages"),
    "max_grad_norm":     ( 1.0,    1.0,    1.0, "gradients are scaled down to this norm"),
    "micro_tokens":      (4096,   8192,  16384, "tokens of a micro-batch, padding counted; changes memory, not results"),
    "logit_chunk":       (1024,    256,    256, "tokens whose logits exist at once; changes memory, not results"),
    "eval_every":        (  10,     20,     20, "steps between held-out evaluations; 0: only before and after"),
    "save_every":        (   5,      5,      5, "steps between checkpoints"),
    "timeout":           ( 5.0,   10.0,   10.0, "seconds a sandboxed run may take"),
    "threads":           (   1,      0,      0, "CPU threads of torch; 0 leaves torch's choice (one is fastest for tiny)"),
}
DEFAULT, CARD, PAPER = range(3)


# --- Algorithm 1 -----------------------------------------------------------------------------------

def train(cfg, run):
    """Self-play from `cfg` into the run folder `run`, from its checkpoint if it holds one. → exit code"""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    policy = load_policy(cfg.model, cfg.quantize, cfg.lora_rank, cfg.dtype, cfg.device, rows=cfg.generate_batch)
    optimizer = make_optimizer(policy, cfg)
    buffer = TaskBuffer(cfg.buffer, rng)
    heldout = heldout_tasks(cfg)
    benchmarks = benchmark_problems(cfg)

    with Executor(cfg.workers, cfg.timeout) as executor, Interrupt() as interrupt:
        done = run.restore(policy, optimizer, buffer, rng)
        if done is None:  # a seed set from the identity triplet and the model itself
            seeds = seed_buffers(policy, executor, buffer, cfg, interrupt)
            done = 0
            run.record(0, measure(policy, executor, heldout, benchmarks, cfg, buffer), tasks=all_tasks(buffer),
                       flags=screen(0, seeds))
            run.save(0, policy, optimizer, buffer, rng)
        bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, unit="step", dynamic_ncols=True)
        for step in bar:
            step += 1
            started = time.perf_counter()
            policy.clock.clear()

            # PROPOSE: the model invents B tasks of each type; valid ones join the buffer and are tried n times
            bar.set_description("propose")
            proposals, new_tasks, estimates = propose(policy, executor, buffer, cfg)

            # SOLVE: the model answers B tasks of each type, the new ones first
            bar.set_description("solve")
            batch = [task for type in cfg.types
                     for task in buffer.fill(type, [t for t in new_tasks if t.type == type], cfg.batch)]
            solutions = solve(policy, executor, batch, cfg)

            # LEARN: task-relative advantages over all rollouts, and one TRR++ update
            bar.set_description("update")
            rollouts = (proposals * cfg.train_proposer + solutions + estimates * cfg.train_on_estimates)
            if cfg.rejection_sampling:  # a control: imitate what was right, whatever it took, and nothing else
                rollouts = [rollout for rollout in rollouts if rollout.verdict == "correct"]
            set_advantages(rollouts, cfg, rng)
            for group in optimizer.param_groups:
                group["lr"] = lr = cfg.lr * (1 - (1 - cfg.lr_final) * (step - 1) / max(1, cfg.steps - 1))
            with policy.timed("update"):
                update = trr_update(policy, optimizer, rollouts, cfg)

            metrics = {**describe(proposals, solutions, buffer, cfg), **update, "lr": lr,
                       **cost(policy, time.perf_counter() - started)}
            if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0):
                bar.set_description("evaluate")
                metrics |= measure(policy, executor, heldout, benchmarks, cfg, buffer)
            tries = estimates + [rollout for proposal in proposals for rollout in proposal.bare]
            run.record(step, metrics, proposals, solutions, flags=screen(step, proposals + solutions + tries))
            for alarm in run.new_alarms():
                bar.write(f"step {step}: {alarm}", file=sys.stderr)
            bar.set_postfix(run.headline(metrics), refresh=False)
            flagged = cfg.max_flags is not None and run.flags > cfg.max_flags
            stop = interrupt.requested or flagged
            if stop or step == cfg.steps or step % cfg.save_every == 0:
                run.save(step, policy, optimizer, buffer, rng)
            if stop or "heldout/mean" in metrics:
                try:
                    write_page(run.folder)
                except UsageError as error:  # a log that somebody edited is no reason to end the run
                    bar.write(f"warning: report.html is not written: {error}", file=sys.stderr)
            if flagged or stop and step < cfg.steps:
                bar.close()
                return run.stopped(step, flagged)
        bar.close()
    run.finish()
    return 0


def set_advantages(rollouts, cfg, rng):
    """Equation 8 over the (type, role) groups, six of them when all types and both roles train.

    --baseline task: solutions of one task, where a step holds several, are compared with each other alone, as in
    GRPO. A hard task solved once then counts for more than an easy one solved as always.
    """
    if cfg.rejection_sampling:
        for rollout in rollouts:
            rollout.advantage = 1.0
        return
    groups = [(rollout.type, rollout.role) for rollout in rollouts]
    if cfg.baseline == "task":
        tries = Counter(rollout.task for rollout in rollouts if rollout.role == "solve")
        groups = [(*group, rollout.task if rollout.role == "solve" and tries[rollout.task] > 1 else None)
                  for group, rollout in zip(groups, rollouts)]
    rewards = [rollout.reward for rollout in rollouts]
    if cfg.shuffle_rewards:  # a control: the same rewards, but no longer those of the responses
        for group in dict.fromkeys(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            for i, reward in zip(members, rng.sample([rewards[i] for i in members], len(members))):
                rewards[i] = reward
    for rollout, advantage in zip(rollouts, task_relative_advantages(rewards, groups)):
        rollout.advantage = advantage * (cfg.solve_weight if rollout.role == "solve" else 1.0)


def seed_buffers(policy, executor, buffer, cfg, interrupt):
    """Fill the buffers with B·S valid tasks of the untrained model, starting from the identity.

    Both deduction and abduction start with the same triplets (D_ded = D_abd = D_seed in the paper); induction tasks
    are then made from their programs. A model that seldom writes valid tasks gets 10·S rounds. → [Rollout]
    """
    drafts = []
    target = cfg.batch * cfg.seed_factor
    bar = tqdm(total=2 * target, desc="seed the buffers", unit="task", dynamic_ncols=True)
    for types in (("deduction", "abduction"), ("induction",)):
        if types[0] == "induction" and "induction" not in cfg.types:
            continue
        bucket = buffer.tasks[types[0]]
        for _ in range(10 * cfg.seed_factor):
            drafts += draft(policy, executor, buffer, types, cfg)
            for rollout in drafts[-cfg.batch * len(types):]:
                task, before = rollout.task, len(bucket)
                if not task or before >= target:
                    continue
                if task.type != "induction" and cfg.dedup and buffer.is_repeat(task.program):
                    continue
                for type in types:
                    buffer.add(replace(task, type=type))
                bar.update(len(bucket) - before)
            if interrupt.requested:
                raise KeyboardInterrupt
            if len(bucket) >= target:
                break
        else:
            bar.write(f"warning: only {len(bucket)} of {target} seed tasks for {' and '.join(types)}; "
                      "the model seldom writes valid ones, and batches will repeat tasks", file=sys.stderr)
    bar.close()
    buffer.protect()
    return drafts


def make_optimizer(policy, cfg):
    parameters = list(policy.trainable().values())
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)
    import bitsandbytes  # on a CPU-only machine its import prints warnings, so only where it is used
    kind = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kind[cfg.optimizer](parameters, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)


# --- what is measured -------------------------------------------------------------------------------

def heldout_tasks(cfg):
    """{prefix of the metrics: [Task]}: the first split is `heldout`, others `heldout/<split>`. Raises UsageError."""
    splits = load_heldout(cfg.heldout, cfg.heldout_limit)
    names = cfg.heldout_splits.split(",") if cfg.heldout_splits else ["easy"] if "easy" in splits else []
    if not names:  # a file of the user's own, with whatever splits
        splits, names = {"all": [task for tasks in splits.values() for task in tasks]}, ["all"]
    for name in names:
        if not splits.get(name):
            raise UsageError(f"there are no held-out tasks of the split {name!r} in {cfg.heldout}; "
                             f"it has {', '.join(splits) or 'none'}")
    return {f"heldout/{name}" if i else "heldout": splits[name] for i, name in enumerate(names)}


def benchmark_problems(cfg):
    """{benchmark: problems} of --eval-benchmarks, fetched before the first step. Raises UsageError."""
    if not cfg.eval_benchmarks:
        return {}
    problems, missing = load_benchmarks(chosen(cfg.eval_benchmarks), cfg.eval_data, cfg.heldout_limit)
    for name, reason in missing.items():
        raise UsageError(f"--eval-benchmarks: {name} cannot be had: {' '.join(reason.split())}")
    return problems


def measure(policy, executor, heldout, benchmarks, cfg, buffer):
    """Greedy accuracy on held-out tasks and benchmarks, and the buffer's sizes."""
    metrics = {}
    for prefix, tasks in heldout.items():
        scores = heldout_accuracy(policy, executor, tasks, cfg)
        for name, (score, error, *_) in (scores | {"mean": mean_score(scores)}).items():
            metrics[f"{prefix}/{name}"] = score
            metrics[f"{prefix}/{name}".replace("heldout", "heldout_stderr", 1)] = error
    if benchmarks:
        scores = evaluate_benchmarks(policy, benchmarks, cfg.max_response, cfg.workers)
        metrics |= {f"benchmark/{name}": score for name, (score, _, _) in scores.items()}
        metrics |= {f"benchmark_stderr/{name}": error for name, (_, error, _) in scores.items()}
    return metrics | {f"buffer/{type}": len(tasks) for type, tasks in buffer.tasks.items()}


def mean(values):
    """The mean, or None (JSON null) of nothing: a zero would be a lie."""
    values = list(values)
    return sum(values) / len(values) if values else None


VALID = ("valid", "repeat", "padded")


def describe(proposals, solutions, buffer, cfg):
    """The metrics of a step that follow from its rollouts; README explains each in one line."""
    metrics = {}
    for type in cfg.types:
        ours = [r for r in proposals if r.type == type]
        metrics |= {
            f"propose/{type}/valid": mean(r.verdict in VALID for r in ours),
            f"propose/{type}/reward": mean(r.reward for r in ours),
            f"propose/{type}/learnable": mean(
                r.solve_rate is not None and 0 < r.solve_rate < 1 for r in ours),
            f"propose/{type}/solve_rate": mean(r.solve_rate for r in ours if r.solve_rate is not None),
            f"response_tokens/propose/{type}": mean(len(r.response_ids) for r in ours)}
    for type in cfg.types:
        ours = [r for r in solutions if r.type == type]
        metrics |= {
            f"solve/{type}/accuracy": mean(r.verdict == "correct" for r in ours),
            f"solve/{type}/reward": mean(r.reward for r in ours),
            f"solve/{type}/well_formed": mean(r.well_formed for r in ours),
            f"response_tokens/solve/{type}": mean(len(r.response_ids) for r in ours)}
    written = [r for r in proposals if r.type != "induction" and r.verdict in VALID]
    new = [r for r in written if r.verdict == "valid"]
    return metrics | {
        "truncated": mean(r.truncated for r in proposals + solutions),
        "diversity/unique_ast": mean(r.fresh for r in proposals if r.fresh is not None),
        **{f"diversity/{name}": mean(r.traits[name] for r in proposals if name in r.traits) for name in TRAITS},
        "diversity/padded": mean(r.verdict == "padded" for r in written) if cfg.unpadded else None,
        "diversity/trivial": mean(r.task.output == r.task.input for r in new),
        **{f"buffer/{type}": len(tasks) for type, tasks in buffer.tasks.items()}}


def cost(policy, seconds):
    if policy.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    clock = policy.clock
    return {**{f"seconds/{phase}": round(clock[phase], 3) for phase in ("generate", "execute", "update")},
            "seconds/total": round(seconds, 3),
            "tokens_per_second": round(clock["tokens"] / clock["generate"], 1), "memory_gb": round(memory / 2**30, 3)}


def all_tasks(buffer):
    return [task for tasks in buffer.tasks.values() for task in tasks]


# --- the run folder ---------------------------------------------------------------------------------

class Run:
    """A run's folder: config, logs, the newest whole checkpoint, adapter, picture.

    Logs are appended a line at a time; a checkpoint replaces the one before it in a single rename.
    A run that was killed therefore loses at most the steps since its checkpoint: `restore` cuts the
    logs back to that step, and the steps are done again exactly as they were (on a CPU).
    """

    LOGS = ("metrics.jsonl", "samples.jsonl", "tasks.jsonl", "flags.jsonl")

    def __init__(self, folder):
        self.folder = Path(folder)
        self.state_file = self.folder / "checkpoint" / "state.pt"
        self.metrics, self.flags, self.alarms, self.writer = [], 0, [], None

    def create(self, values):
        """Make the folder and write config.json. Raises UsageError rather than touch what is there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "config.json").exists():
                raise UsageError(f"{self.folder} holds another run: go on with it by --resume {self.folder}, "
                                 "or give another --out")
            if any(self.folder.iterdir()):
                raise UsageError(f"{self.folder} is not empty and holds no run; give another --out")
            versions = {name: version(name) for name in ("torch", "transformers", "peft")}
            values = values | {"versions": versions | {"python": platform.python_version()}}
            replace_file(self.folder / "config.json", (json.dumps(values, indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"cannot write to the run folder {self.folder}: {error.strerror}") from error

    def config(self, changes):
        """The run's values, with `changes` taken over for good. Raises UsageError."""
        try:
            values = json.loads((self.folder / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{self.folder} is not a run folder: cannot read its config.json") from error
        if changes:
            values |= changes
            replace_file(self.folder / "config.json", (json.dumps(values, indent=1) + "\n").encode())
        values.pop("versions", None)
        missing = (set(KNOBS) | set(DEFAULTS)) - set(values)
        if missing:
            raise UsageError(f"{self.folder}/config.json lacks {', '.join(sorted(missing))}; it was "
                             "edited, or written by another version of this code")
        return values

    def abandon(self):
        """Remove the folder again if nothing but its config was ever written."""
        if [path.name for path in self.folder.glob("*")] == ["config.json"]:
            (self.folder / "config.json").unlink()
            self.folder.rmdir()

    def resume_hint(self):
        if self.state_file.exists():
            return f"the checkpoint is whole, go on with: python train.py --resume {self.folder}"
        return f"no checkpoint was written yet; start again with: python train.py --resume {self.folder}"

    def save(self, step, policy, optimizer, buffer, rng):
        """Write everything that the next step depends on, then the adapter for others to load."""
        state = {"step": step, "weights": {n: p.detach().cpu() for n, p in policy.trainable().items()},
                 "optimizer": optimizer.state_dict(), "buffer": json.dumps(buffer.state()),
                 "python_rng": json.dumps(rng.getstate()), "torch_rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        self.state_file.parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        torch.save(state, content)
        replace_file(self.state_file, content.getbuffer())
        name = "model" if policy.model is policy.causal else "adapter"
        self._save_pretrained(policy, name)

    def _save_pretrained(self, policy, name):
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

    def restore(self, policy, optimizer, buffer, rng):
        """Take up the checkpoint and cut the logs back to its step. → the step, or None if there is none."""
        step = None
        if self.state_file.exists():
            try:
                state = torch.load(self.state_file, map_location="cpu", weights_only=True)
                parameters = policy.trainable()
                if parameters.keys() != state["weights"].keys():
                    raise KeyError("its weights are of another model")
                with torch.no_grad():
                    for name, weight in state["weights"].items():
                        parameters[name].copy_(weight)
                optimizer.load_state_dict(state["optimizer"])
                buffer.restore(json.loads(state["buffer"]))
                kind, numbers, gauss = json.loads(state["python_rng"])
                rng.setstate((kind, tuple(numbers), gauss))
                torch.set_rng_state(state["torch_rng"])
                if state["cuda_rng"] and torch.cuda.is_available():
                    torch.cuda.set_rng_state_all(state["cuda_rng"])
                step = state["step"]
            except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UsageError(f"the checkpoint {self.state_file} is damaged ({reason}); "
                                 "put a copy back, or start a new run") from error
        for name in self.LOGS:
            path = self.folder / name
            # bytes, whose lines end at \n alone: model text may hold U+2028, where str.splitlines would cut
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if step is not None and line.endswith(b"\n")
                    and json.loads(line)["step"] <= step]
            replace_file(path, b"".join(kept))
            if name == "metrics.jsonl":
                self.metrics = [json.loads(line) for line in kept]
            if name == "flags.jsonl":
                self.flags = len(kept)
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=(step or 0) + 1 if step is not None else 0)
        return step

    def record(self, step, metrics, proposals=(), solutions=(), tasks=(), flags=()):
        """Append the step to metrics.jsonl, samples.jsonl, tasks.jsonl, flags.jsonl and TensorBoard."""
        metrics = {"step": step, **metrics, "flags": len(flags)}
        self.flags += len(flags)
        self._append("flags.jsonl", flags)
        self.metrics.append(metrics)
        self._append("metrics.jsonl", [metrics])
        accepted = [(r.task, r.solve_rate) for r in proposals if r.verdict == "valid"]
        self._append("tasks.jsonl", [{"step": step, "solve_rate": rate, **asdict(task)}
                                     for task, rate in accepted + [(task, None) for task in tasks]])
        samples = pick_samples(step, list(proposals) + list(solutions))
        self._append("samples.jsonl", samples)
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, step)
        for sample in samples:
            text = "\n\n".join(f"**{name}**\n\n```\n{sample[name]}\n```" for name in
                               ("prompt", "response", "verdict", "reward", "advantage"))
            self.writer.add_text(f"{sample['role']}/{sample['type']}", text, step)
        self.writer.flush()
        if "heldout/mean" in metrics and step:
            draw_curves(self.metrics, self.folder / "curves.png")

    def _append(self, name, rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def new_alarms(self):
        """Figures that left their bands since the last call, a line each: which, its band, what to try."""
        before, self.alarms = {alarm["name"] for alarm in self.alarms}, alarms(self.metrics)
        return [f"{a['name']} is {a['value']:.3g}, should be {a['band']}: {a['advice']}"
                for a in self.alarms if a["name"] not in before]

    def headline(self, metrics):
        """The figures of the progress bar."""
        heldout = [m["heldout/mean"] for m in self.metrics if "heldout/mean" in m][-1]
        averages = {name: mean(value for key, value in metrics.items() if value is not None
                               and key.startswith(prefix) and key.endswith(suffix))
                    for name, prefix, suffix in (("solver", "solve/", "/accuracy"), ("valid", "propose/", "/valid"),
                                                 ("learnable", "propose/", "/learnable"))}
        return {"held-out": f"{heldout:.2f}",
                **{name: f"{value:.2f}" for name, value in averages.items() if value is not None},
                "tok/s": f"{metrics['tokens_per_second']:.0f}", **({"flags": self.flags} if self.flags else {}),
                **({"ALARM": ", ".join(alarm["name"] for alarm in self.alarms)} if self.alarms else {})}

    def stopped(self, step, flagged):
        """Say how to go on after a stop by a person (exit code 0) or by --max-flags (3). → exit code"""
        reason = f": {self.flags} flags; read {self.folder}/flags.jsonl first" if flagged else ""
        print(f"stopped after step {step}{reason}; go on with: python train.py --resume {self.folder}"
              + " --max-flags N" * flagged)
        return 3 if flagged else 0

    def finish(self):
        """Print held-out accuracy before and after, and where everything is."""
        measured = [m for m in self.metrics if "heldout/mean" in m]
        for prefix in measured_splits(measured[-1]):
            error = prefix.replace("heldout", "heldout_stderr", 1)
            columns = {f"step {m['step']}": {type: (m[f"{prefix}/{type}"], m[f"{error}/{type}"]) for type in TASK_TYPES
                                             if f"{prefix}/{type}" in m} for m in (measured[0], measured[-1])}
            print("\n" + table(columns, prefix.replace("heldout", "held-out accuracy").replace("/", ", ")))
        print(f"\nrun folder  {self.folder}\n"
              f"picture     {self.folder}/curves.png\npage        {self.folder}/report.html"
              + f"\nflags       {self.flags}, in {self.folder}/flags.jsonl" * bool(self.flags))


def pick_samples(step, rollouts):
    """One rollout of each role and type, whole, a different one each step."""
    groups = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.role, rollout.type].append(rollout)
    rows = []
    for group in groups.values():
        chosen = group[step % len(group)]
        rows.append({"step": step, **{name: getattr(chosen, name) for name in (
            "role", "type", "prompt", "response", "verdict", "reward", "advantage", "solve_rate", "truncated")}})
    return rows


def replace_file(path, content):
    """Write a file so that at any moment either the old or the new content is there, whole."""
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


class Interrupt:
    """The first Ctrl-C (or SIGTERM) asks for an end after this step; the second stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# --- the command line -------------------------------------------------------------------------------

def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawTextHelpFormatter,
        description="Self-play training of a language model on Python reasoning tasks, from zero data.")
    add = parser.add_argument
    add("--model", help="tiny (shipped, the default), tiny/longer (shipped), a local folder or a Hugging Face name such as Qwen2.5-3B")
    add("--out", help="run folder; default: runs/<model>-<date>")
    add("--resume", metavar="RUN", help="go on with this run; only --steps and --max-flags may be given beside it")
    add("--report", metavar="RUN", help="only write RUN/report.html anew, from the run's logs")
    add("--max-flags", type=int, help="stop, with a checkpoint, after more than so many flags; default: never")
    add("--paper", action="store_true", help="the paper's values instead of the defaults below, and --no-dedup")
    for name, (tiny, card, paper, text) in KNOBS.items():
        add("--" + name.replace("_", "-"), type=type(tiny), help=f"{text}\n(tiny {tiny}, else {card}, paper {paper})")
    add("--types", help="task types to train, with commas; default: deduction,abduction,induction")
    add("--no-train-proposer", dest="train_proposer", action="store_false", default=None,
        help="ablation: the proposer proposes but is not trained")
    add("--shuffle-rewards", action="store_true", default=None,
        help="control: rewards are shuffled within each group before advantages")
    add("--rejection-sampling", action="store_true", default=None,
        help="control: fine-tune on the correct solutions alone, all with the same weight")
    add("--train-on-estimates", action="store_true", default=None,
        help="also train the solver on the n tries of each new task")
    add("--baseline", choices=("group", "task"),
        help="advantages against the mean of a role and type (default, the paper's), or of the tries of one task")
    add("--no-dedup", dest="dedup", action="store_false", default=None,
        help="reward and store programs that were seen before")
    add("--unpadded", action="store_true", default=None,
        help="programs from which a statement can be left out, with the same output, count as repeats")
    add("--message-gain", action="store_true", default=None,
        help="an induction proposal earns only if its message raises the solve rate; costs n more tries")
    add("--intrinsic", metavar="NAME=WEIGHT,…",
        help="reward added to learnability for edit_distance, complexity, answers (the paper's); default: none")
    add("--zero-learnability", choices=("paper", "official"),
        help="reward of tasks solved never or always: paper 0 (default), official code -0.5")
    add("--seed", type=int, help="random seed (0)")
    add("--quantize", choices=("auto", "4bit", "none"), help="4-bit base weights; auto (default): on a GPU")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), help="auto (default): bf16 or fp16 by the GPU, fp32 on a CPU")
    add("--device", help="cuda, cuda:1, cpu; default: cuda where there is one")
    add("--optimizer", choices=("adamw", "adamw8bit", "paged8bit"), help="adamw (default), or 8-bit by bitsandbytes")
    add("--generate-batch", type=int, help="responses sampled at once; default: as free memory allows")
    add("--workers", type=int, help="sandbox workers; default: all cores")
    add("--heldout", help="JSON lines of held-out tasks; default: the tiny model's")
    add("--heldout-limit", type=int, help="at most so many held-out tasks a type, and of each benchmark; default: all")
    add("--heldout-splits", help="splits of that file to measure, with commas; default: easy, or all together")
    add("--eval-benchmarks", help="benchmarks of eval.py to measure at every evaluation, with commas; default: none")
    add("--eval-data", help="a folder with their files; default: the Hugging Face hub")
    return parser.parse_args(arguments)


DEFAULTS = {"model": "tiny", "types": ",".join(TASK_TYPES), "train_proposer": True, "shuffle_rewards": False, "rejection_sampling": False,
            "train_on_estimates": False, "baseline": "group", "dedup": True, "unpadded": False, "message_gain": False, "intrinsic": "",
            "zero_learnability": "paper", "seed": 0,
            "quantize": "auto", "dtype": "auto", "device": None, "optimizer": "adamw", "generate_batch": 0,
            "workers": None, "heldout": str(HELDOUT), "heldout_limit": None, "heldout_splits": "", "eval_benchmarks": "",
            "eval_data": None, "max_flags": None}


def configure(options):
    """Command line → (cfg, Run). Raises UsageError for values that cannot work."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.resume:
        extra = set(given) - {"resume", "steps", "max_flags", "paper"} | ({"paper"} if options.paper else set())
        if extra:
            raise UsageError(f"--resume goes on with the run's own values; drop --{min(extra).replace('_', '-')}")
        run = Run(options.resume)
        values = run.config({name: given[name] for name in ("steps", "max_flags") if name in given})
    else:
        column = PAPER if options.paper else DEFAULT if options.model in (None, *SHIPPED) else CARD
        values = DEFAULTS | {name: columns[column] for name, columns in KNOBS.items()}
        if options.paper:
            values["dedup"] = False
        values |= {name: value for name, value in given.items() if name not in ("out", "resume")}
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        run = Run(options.out or f"runs/{Path(values['model']).name}-{stamp}")
    cfg = SimpleNamespace(**values)
    check(cfg)
    cfg.types = tuple(cfg.types.split(","))
    cfg.intrinsic = weights_of(cfg.intrinsic)
    cfg.zero = -0.5 if cfg.zero_learnability == "official" else 0.0
    if not options.resume:
        run.create(values)
    return cfg, run


def weights_of(text):
    """'answers=0.2,complexity=0.1' → {name: weight}. Raises UsageError."""
    try:
        weights = {name: float(weight) for name, weight in (pair.split("=") for pair in text.split(",") if text)}
    except ValueError as error:
        raise UsageError(f"--intrinsic {text!r}: give NAME=WEIGHT pairs with commas, as answers=0.2") from error
    if not set(weights) <= set(TRAITS) or any(not 0 <= weight < float("inf") for weight in weights.values()):
        raise UsageError(f"--intrinsic {text!r}: the names are {', '.join(TRAITS)}, and no weight is negative")
    return weights


def check(cfg):
    """Raise UsageError for the first value that is out of range."""
    at_least = {"steps": 1, "batch": 1, "references": 0, "inputs": 2, "seed_factor": 1, "buffer": 2,
                "max_prompt": 1, "max_response": 1, "lora_rank": 0, "micro_tokens": 1, "logit_chunk": 1,
                "eval_every": 0, "save_every": 1, "generate_batch": 0, "samples": 0, "entropy_coef": 0,
                "solve_weight": 0, "threads": 0, "max_flags": 0}
    for name, least in at_least.items():
        if getattr(cfg, name) is not None and getattr(cfg, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be at least {least}")
    for name in ("lr", "lr_final", "clip", "max_grad_norm", "timeout"):
        if not 0 < getattr(cfg, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be greater than 0")
    for name in ("workers", "heldout_limit"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be at least 1")
    if cfg.samples < 2 and cfg.train_proposer:
        raise UsageError(f"--samples is {cfg.samples}, but learnability needs at least 2 tries a task: one try is "
                         "solved always or never (use --no-train-proposer to go without)")
    if cfg.rejection_sampling and cfg.shuffle_rewards:
        raise UsageError("--rejection-sampling knows no rewards to shuffle; give one of the two")
    unknown = [name for name in cfg.types.split(",") if name not in TASK_TYPES]
    if unknown or len(set(cfg.types.split(","))) != len(cfg.types.split(",")):
        raise UsageError(f"--types {cfg.types!r}: give some of {','.join(TASK_TYPES)}, each once")


def main(arguments=None):
    options = parse(arguments)
    run = None
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
    except OSError as error:  # a full disk, a folder gone: what is on disk is whole
        print(f"train.py: {error}; {run.resume_hint() if run else ''}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
