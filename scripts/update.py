"""Memory and time of the policy update: this code, the naive way, and TRL, on the same tokens.

    python scripts/update.py            # CPU, about three minutes
    pip install trl==1.16.0                # optional: then TRL's GRPOTrainer loss is measured too

A small Qwen2 (width 128, two layers, LoRA) with the real vocabulary of 151,936, where the output head is
what costs. Each way runs in a process of its own, so that its peak memory is its own; the table gives
medians and ratios to naive. "Naive" computes all logits of the batch in fp32, log-softmax, entropy, and
lets autograd keep them.
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
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from azr import Policy, Rollout, trr_update  # noqa: E402

VOCABULARY, WIDTH, PROMPT = 151_936, 128, 64
WAYS = {"this code": "ours", "naive": "naive", "TRL GRPOTrainer loss": "trl"}


def make_policy():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
    peft_model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    return Policy(peft_model, model, None, frozenset([0]), 0, chat=False)


def make_rollouts(tokens, rows=16):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [Rollout("solve", "deduction", draw(PROMPT), draw(tokens // rows), "", advantage=(-1.0) ** row)
            for row in range(rows)]


def naive_update(policy, optimizer, rollouts, cfg):
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


def trl_update(policy, optimizer, rollouts, cfg, trainers={}):
    """TRL's own loss on the same tokens; its trainer is built once, with data that is never used."""
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


def measure(way, tokens, repeats):
    """Seconds of an update (median) and peak memory beyond what was there before (GB)."""
    torch.set_num_threads(1)
    policy, rollouts = make_policy(), make_rollouts(tokens)
    cfg = SimpleNamespace(micro_tokens=10 ** 9, logit_chunk=256, clip=0.2, entropy_coef=0.001, max_grad_norm=1.0)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
    update = {"ours": trr_update, "naive": naive_update, "trl": trl_update}[way]
    if way == "trl":
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    policy.causal.train()
    update(policy, optimizer, make_rollouts(16), cfg)  # buffers of optimizer and trainer exist from here on
    before = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        update(policy, optimizer, rollouts, cfg)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "gb": (memory_kb("VmHWM") - before) / 2 ** 20}


def memory_kb(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="response tokens of the batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print("RESULT", json.dumps(measure(options.way, options.tokens[0], options.repeats)))
        return
    ways = dict(WAYS)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed; its row is left out (pip install trl==1.16.0)\n")
        ways.pop("TRL GRPOTrainer loss")
    print(f"width {WIDTH}, vocabulary {VOCABULARY:,}, one CPU thread, median of {options.repeats}\n")
    print("| response tokens | way | seconds | peak memory, GB | time / naive | memory / naive |\n|---|---|---|---|---|---|")
    for tokens in options.tokens:
        results = {}
        for name, way in ways.items():
            child = subprocess.run([sys.executable, __file__, "--way", way, "--tokens", str(tokens), "--repeats", str(options.repeats)],
                                   capture_output=True, text=True)
            if child.returncode:
                sys.exit(f"{name} failed:\n{child.stderr[-2000:]}")
            results[name] = json.loads(next(line for line in child.stdout.splitlines() if line.startswith("RESULT"))[7:])
        for name, result in results.items():
            naive = results["naive"]
            print(f"| {tokens} | {name} | {result['seconds']:.2f} | {result['gb']:.2f} | {result['seconds'] / naive['seconds']:.2f} "
                  f"| {result['gb'] / naive['gb']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
