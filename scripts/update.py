"""Memory and time of the policy update: this code, the naive way, and TRL, on the same tokens.

    python scripts/update.py                                        # CPU, about five minutes
    python scripts/update.py --shape SmolLM2-135M --tokens 1024     # the shape of a real model, random weights
    pip install trl==1.16.0                                         # optional: then TRL's loss is measured too

The default shape is `narrow`, a Qwen2 of width 128 with two layers and the real vocabulary of 151,936, where
the output head is what costs. All shapes have LoRA and checkpoint their layers. "Naive" computes all logits of
the batch in fp32, log-softmax, entropy, and lets autograd keep them.

Each update runs in a process of its own, so its peak memory is its own. The ways take turns, so a machine that
is busy for a while slows all of them. CPU seconds hold better than wall seconds beside other processes. The
ratios are of medians, to those of the first way.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # in this order: both have an executor.py

import torch
from shapes import SHAPES, make_policy
from tables import markdown

from azr import trr_update
from rewards import Rollout
from train import TINY, preset

PROMPT = 64


def make_rollouts(shape, tokens, rows):
    vocabulary = SHAPES[shape][5]
    generator = torch.Generator().manual_seed(0)
    ends = vocabulary - 1  # padding
    rollouts = []
    for row in range(rows):
        prompt = torch.randint(1, ends, (PROMPT,), generator=generator).tolist()
        response = torch.randint(1, ends, (tokens // rows,), generator=generator).tolist()
        rollouts.append(Rollout("solve", "deduction", prompt, response, advantage=(-1.0) ** row))
    return rollouts


def this_code(policy, optimizer, rollouts, cfg):
    trr_update(policy, optimizer, rollouts, cfg)


def naive(policy, optimizer, rollouts, cfg):
    """What one writes first: all logits, all positions, one graph."""
    ids_BT = torch.tensor([r.prompt_ids + r.response_ids for r in rollouts])
    logits_BTV = policy.causal(input_ids=ids_BT).logits.float()[:, PROMPT - 1:-1]
    logps_BTV = torch.log_softmax(logits_BTV, -1)
    logps_BT = logps_BTV.gather(-1, ids_BT[:, PROMPT:, None])[..., 0]
    entropies_BT = -(logps_BTV.exp() * logps_BTV).sum(-1)
    advantages_B1 = torch.tensor([[r.advantage] for r in rollouts])
    ratio_BT = torch.exp(logps_BT - logps_BT.detach())
    losses_BT = -torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(0.8, 1.2) * advantages_B1)
    (losses_BT - cfg.entropy_coef * entropies_BT).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trl(policy, optimizer, rollouts, cfg, trainers={}):
    """TRL's own loss on the same tokens; its trainer is built once, with data that is never used."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_random_model
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    if not trainers:
        folder = tempfile.mkdtemp()
        make_random_model(folder)
        trainers["it"] = GRPOTrainer(
            policy.causal, reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
            args=GRPOConfig(output_dir=folder, use_cpu=True, beta=0.0, report_to=[], num_generations=2,
                            per_device_train_batch_size=16, gradient_checkpointing=False, bf16=False))
        trainers["it"].current_gradient_accumulation_steps = 1
    prompts = torch.tensor([r.prompt_ids for r in rollouts])
    responses = torch.tensor([r.response_ids for r in rollouts])
    loss = trainers["it"]._compute_loss(policy.causal, {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": responses,
        "completion_mask": torch.ones_like(responses), "advantages": torch.tensor([r.advantage for r in rollouts]),
        "num_items_in_batch": torch.tensor(responses.numel())})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


WAYS = {"naive": naive, "this code": this_code, "TRL GRPOTrainer loss": trl}


def measure(way, options):
    """One update: wall and CPU seconds, and the peak memory over what was there before, in GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = make_policy(options.shape, "bf16", "cpu", torch.float32)
    cfg = preset(TINY, micro_tokens=10 ** 6)  # the whole batch at once
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
    policy.causal.train()
    WAYS[way](policy, optimizer, make_rollouts(options.shape, 4, 2), cfg)  # buffers of optimizer and trainer exist from here on
    rollouts = make_rollouts(options.shape, options.tokens, options.rows)
    policy.causal.train()
    before = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    wall, cpu = time.perf_counter(), time.process_time()
    WAYS[way](policy, optimizer, rollouts, cfg)
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
            "gb": (memory_kb("VmHWM") - before) / 2 ** 20}


def memory_kb(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])


def measured(way, options, script):
    """`measure` in a process of its own."""
    flags = ["--shape", options.shape, "--tokens", str(options.tokens), "--rows", str(options.rows), "--way", way]
    child = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if child.returncode:
        sys.exit(f"{way} failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def main(script=__file__):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of the batch")
    parser.add_argument("--rows", type=int, default=16, help="responses of the batch")
    parser.add_argument("--repeats", type=int, default=3, help="updates of each way")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one update, for the process that prints the table
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    ways = dict.fromkeys(WAYS)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed; its row is left out (pip install trl==1.16.0)\n")
        ways.pop("TRL GRPOTrainer loss", None)
    results = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            results[way].append(measured(way, options, script))
            print(way, results[way][-1], file=sys.stderr, flush=True)
    print(f"{options.shape}, {options.rows} prompts of {PROMPT} tokens, {options.tokens} response tokens, one CPU thread, "
          f"{options.repeats} updates of each way\n")
    print(table(results))


def table(results):
    """Rows of figures by way, and ratios to the first way."""
    lines = [["way", "seconds: median", "minimum", "CPU seconds: median", "minimum", "peak GB: median",
              "CPU time, ratio", "memory, ratio"]]
    first = None
    for way, rows in results.items():
        wall, cpu, memory = ([row[name] for row in rows] for name in ("seconds", "cpu", "gb"))
        middle = statistics.median(cpu), statistics.median(memory)
        first = first or middle
        lines.append([way, f"{statistics.median(wall):.2f}", f"{min(wall):.2f}", f"{middle[0]:.2f}", f"{min(cpu):.2f}",
                      f"{middle[1]:.3f}", f"{middle[0] / first[0]:.2f}", f"{middle[1] / first[1]:.2f}"])
    return markdown(lines)


if __name__ == "__main__":
    main()
