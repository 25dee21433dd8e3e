"""A training step of TRL's GRPOTrainer beside one of this code: seconds of sampling, of the update, and of all.

    python scripts/peer.py --model ~/smollm2 --env ~/trl    # CPU: hours; ~/trl is made, and used again
    python scripts/peer.py --model ~/smollm2 --env ~/trl --prompts 2 --copies 4 --max-response 32 --pairs 1    # minutes

Ways: TRL's default, TRL with use_transformers_continuous_batching, and this code's `Sampler.generate` and `trr_update`. All
read the solver's prompts of the frame "examples" for the worked examples of tasks.py, with the same limit, loss, LoRA layers,
fp32 weights and one thread. A micro-batch of TRL has --micro-rows completions, one of this code at most as many tokens. The
reward is the length of the text, so that advantages differ. Completions of this code also end with `</answer>`, for which TRL
has no option. With --full only the limit ends them, and all ways sample and train equally many tokens.

Each way runs in a process of its own, in a virtual environment with TRL and our requirements (1.5 GB, more where torch brings
CUDA). The ways take turns, and the first step of each is a warm-up that is left out. Seconds are medians of steps: "sampling"
from token ids to token ids, "update" from the advantages to the end of the optimizer's step, "step" all. Ratios are of seconds
per sampled token, to those of this code in the same round. On a busy machine --clock cpu holds better.

In the update TRL 1.16 computes logits of the completions on a GPU, but of the prompts as well on a CPU, so ratios of the update
say nothing about a GPU. The cache of continuous batching is given the size that the work needs, because by default it takes
half of the machine's memory, even where other processes use it.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from azr import trr_update
from model import load_policy
from rewards import Rollout, task_relative_advantages
from sampling import Sampler
from tables import markdown
from tasks import EXAMPLES, FRAME, TASK_TYPES, UsageError, solve_prompt
from train import CARD, preset

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TRL = "trl==1.16.0"  # the newest when this was written
CONTINUOUS = "TRL: continuous batching"
PAGE = 256  # tokens in a page of its cache, which is transformers' default
PHASES = ("sampling", "update", "step")


# --- in the process of a way -------------------------------------------------------------------------

class Steps:
    """The way's end of two pipes: it waits until a step is asked for, and reports the step's figures."""

    def __init__(self, clock):
        self.clock = CLOCKS[clock]
        self.reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no report

    def begin(self):
        if not sys.stdin.readline():
            sys.exit("no more steps are asked for")
        return self.clock()

    def end(self, begin, sampling, sampled, update, prompts, completions, weights):
        """begin, sampling, sampled, update: readings of the clock. prompts, completions: [[id]], row by row"""
        end = self.clock()
        figures = {"sampling": sampled - sampling, "update": end - update, "step": end - begin,
                   "tokens": sum(map(len, completions)), "prompt tokens": sum(map(len, prompts)),
                   "trained weights": sum(weight.numel() for weight in weights if weight.requires_grad)}
        print(json.dumps(figures), file=self.reports, flush=True)


def make_questions(count):
    """Different questions of all task types, at most 30."""
    tasks = [replace(EXAMPLES[place % len(EXAMPLES)], type=TASK_TYPES[place % len(TASK_TYPES)]) for place in range(count)]
    return [solve_prompt(task, "examples") for task in tasks]


def text_lengths(completions, **_):
    return [float(len(text)) for text in completions]


def this_code(options, cfg, policy, questions, steps):
    if options.full:
        policy.causal.generation_config.suppress_tokens = sorted(policy.end_ids)
        policy.decode = lambda ids: ""  # where the sampler looks for `</answer>`
    weights, sampler = [*policy.trainable().values()], Sampler(policy)
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr)
    for _ in range(options.pairs + 1):
        begin = steps.begin()
        prompts = [policy.encode(question) for question in questions]
        sampling = steps.clock()
        completions = sampler.generate(prompts, options.max_response, options.copies)
        sampled = steps.clock()
        texts = policy.tokenizer.batch_decode([ids for ids, _ in completions], skip_special_tokens=True)
        groups = [place // options.copies for place in range(len(texts))]
        rollouts = []
        for group, (ids, logps), advantage in zip(groups, completions, task_relative_advantages(text_lengths(texts), groups)):
            rollouts.append(Rollout("solve", "deduction", prompts[group], ids, logps, advantage=advantage))
        update = steps.clock()
        trr_update(policy, optimizer, rollouts, cfg, options.micro_rows * (max(map(len, prompts)) + options.max_response))
        steps.end(begin, sampling, sampled, update, [rollout.prompt_ids for rollout in rollouts],
                  [rollout.response_ids for rollout in rollouts], weights)


def trl(options, cfg, policy, questions, steps):
    """TRL reports its sampling time only to wandb, MLflow and Trackio, so its methods are wrapped to read the clock."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *arguments, **keywords):
            self.prompts, self.sampling = prompt_ids, steps.clock()
            self.completions, logps = super()._generate_single_turn(prompt_ids, *arguments, **keywords)
            self.sampled = steps.clock()
            return self.completions, logps

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.update = steps.clock()
            return batch

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begin = steps.begin()

        def on_step_end(self, *_, **__):
            steps.end(self.begin, trainer.sampling, trainer.sampled, trainer.update, trainer.prompts, trainer.completions,
                      trainer.model.parameters())

    rows = options.prompts * options.copies
    longest = max(len(policy.encode(question)) for question in questions) + options.max_response
    texts = [FRAME.replace("{question}", question) for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
            max_steps=options.pairs + 1, num_generations=options.copies, max_completion_length=options.max_response,
            per_device_train_batch_size=options.micro_rows,
            gradient_accumulation_steps=rows // options.micro_rows,
            learning_rate=cfg.lr, epsilon=cfg.clip, entropy_coef=cfg.entropy_coef, max_grad_norm=cfg.max_grad_norm,
            generation_kwargs={"suppress_tokens": sorted(policy.end_ids)} if options.full else None,
            use_transformers_continuous_batching=options.way == CONTINUOUS,
            transformers_continuous_batching_config={"num_blocks": rows * math.ceil(longest / PAGE), "page_size": PAGE})
        trainer = Trainer(options.model, text_lengths, config, Dataset.from_dict({"prompt": texts}),
                          callbacks=[Turns()], peft_config=policy.model.peft_config["default"])
        trainer.train()


WAYS = {"TRL: generate": trl, CONTINUOUS: trl, "this code": this_code}


# --- in the process that prints the table -----------------------------------------------------------

def check(options):
    """Raises UsageError for sizes that do not go together."""
    rows = options.prompts * options.copies
    for name, low, high in (("prompts", 1, 30), ("copies", 2, 10 ** 4), ("max_response", 1, 10 ** 4), ("micro_rows", 1, rows),
                            ("rank", 1, 10 ** 4), ("pairs", 1, 10 ** 4)):
        if not low <= getattr(options, name) <= high:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be between {low} and {high}")
    if rows % options.micro_rows:
        raise UsageError(f"--micro-rows is {options.micro_rows}; it must divide the {rows} completions of a step")
    if not (Path(options.model) / "config.json").exists():
        raise UsageError(f"--model is {options.model}; give a folder with a config.json, such as scripts/real_model.py makes")


def install(folder):
    """TRL and our requirements in a virtual environment. → its python. Raises UsageError."""
    python, requirements = folder / "bin" / "python", ROOT / "requirements.txt"
    if not python.exists():
        venv.create(folder, with_pip=True)
    torch_pin = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    for packages in ([torch_pin], ["-r", str(requirements), TRL]):  # torch first, so nothing else chooses it
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"pip cannot install {packages[-1]}: {done.stderr.strip().splitlines()[-1]}")
    return python


def end_reason(code, log):
    """Why a process ended, from its exit code and stderr: the first line of its last exception, if it wrote one."""
    if code < 0:
        return f"it was killed by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    _, traceback, last = log.rpartition("Traceback (most recent call last):\n")
    if traceback:
        return next(line for line in last.splitlines() if line and not line.startswith(" "))
    return [f"it ended with code {code}", *last.strip().splitlines()][-1]


def measure(python, options, flags):
    """Steps of all ways in turns, without the warm-up. → {way: [figures]}, {way: why it did not run}"""
    results, failures, processes, logs = {way: [] for way in WAYS}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        for way in WAYS:
            logs[way] = stack.enter_context(tempfile.TemporaryFile("w+"))
            processes[way] = stack.enter_context(subprocess.Popen(
                [python, __file__, *flags, "--way", way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=logs[way],
                bufsize=0, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}))
        for turn in range(options.pairs + 1):
            for way in [way for way in WAYS if way not in failures]:
                with contextlib.suppress(BrokenPipeError):  # then it reports nothing either
                    processes[way].stdin.write(b"\n")
                report = processes[way].stdout.readline()
                print(f"step {turn}, {way}: {report.decode().strip()}", file=sys.stderr, flush=True)
                if not report:
                    code = processes[way].wait()
                    logs[way].seek(0)
                    failures[way] = end_reason(code, logs[way].read())
                elif turn:
                    results[way].append(json.loads(report))
    return results, failures


def table(results, failures):
    """Medians by way, and ratios to this code. Raises UsageError where a comparison would mislead."""
    if "this code" in failures:
        raise UsageError(f"this code made no step: {failures['this code']}")
    lines = [["way", "tokens", *(f"{phase}: s" for phase in PHASES), *(f"{phase}: s / 1,000 tokens" for phase in PHASES),
              *(f"{phase}: ratio" for phase in PHASES)]]
    ours = results["this code"]
    for way, rows in results.items():
        if way in failures:
            lines.append([f"{way} did not run: {failures[way]}", *["–"] * (1 + 3 * len(PHASES))])
            continue
        for name in ("prompt tokens", "trained weights"):
            if rows[0][name] != ours[0][name]:
                raise UsageError(f"{way} has {rows[0][name]} {name}, this code {ours[0][name]}: the work is not the same")
        seconds, rates, ratios = [], [], []
        for phase in PHASES:
            a_token, our_token = ([row[phase] / row["tokens"] for row in found] for found in (rows, ours))
            seconds.append(f"{median(row[phase] for row in rows):.1f}")
            rates.append(f"{1000 * median(a_token):.1f}")
            ratios.append(f"{median(theirs / own for theirs, own in zip(a_token, our_token)):.2f}")
        lines.append([way, f"{median(row['tokens'] for row in rows):.0f}", *seconds, *rates, *ratios])
    return markdown(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a folder")
    add("--env", type=Path, metavar="FOLDER", help="a virtual environment to make or to use again; default: a temporary one")
    add("--prompts", type=int, default=8, help="at most 30")
    add("--copies", type=int, default=8, help="completions of each prompt")
    add("--max-response", type=int, default=96, help="most tokens of a completion")
    add("--micro-rows", type=int, default=8, help="completions in a micro-batch of TRL")
    add("--rank", type=int, default=32, help="of LoRA")
    add("--pairs", type=int, default=3, help="rounds: steps of each way after its warm-up")
    add("--clock", choices=CLOCKS, default="wall", help="seconds that pass, or those that the process computes")
    add("--full", action="store_true", help="all completions reach the limit")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # the process of one way
    flags = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(flags)
    try:
        check(options)
        if options.way:
            torch.set_num_threads(1)
            cfg = preset(CARD, lora_rank=options.rank, max_response=options.max_response)
            policy = load_policy(options.model, quantize="none", lora_rank=options.rank, device="cpu", frame="examples")
            WAYS[options.way](options, cfg, policy, make_questions(options.prompts), Steps(options.clock))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            python = install(options.env or Path(folder))
            print(table(*measure(python, options, flags)))
    except UsageError as error:
        print(f"peer.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
