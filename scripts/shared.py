"""The update of responses to one prompt: the prompt read once for each, and once for all.

    python scripts/shared.py          # CPU, half a minute

Prints seconds of forward and backward and the largest differences of logprobs and gradients. The second way is
the one that trr_update takes for models that are not shipped (model.py, `_hidden_states`).
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from model import Policy, response_logprobs
from rewards import Rollout


def make_policy():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True)).eval()
    model.set_attn_implementation("grouped_sdpa")
    lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return Policy(lora, model, None, frozenset([0]), 0, chat=False, shares_prompts=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=700, help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=100, help="tokens of a response")
    parser.add_argument("--copies", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy, rng = make_policy(), random.Random(0)
    prompt = rng.choices(range(2000), k=options.prompt)
    rollouts = [Rollout("solve", "deduction", prompt, rng.choices(range(2000), k=options.response))
                for _ in range(options.copies)]
    weights_N = torch.randn(options.copies * options.response)
    found = {}
    for way, rows in (("for each", [[rollout] for rollout in rollouts]), ("for all", [rollouts])):
        seconds = []
        for _ in range(3):
            policy.causal.zero_grad()
            started = time.process_time()
            logps_N, _ = response_logprobs(policy, rows)
            (logps_N * weights_N).mean().backward()
            seconds.append(time.process_time() - started)
        grads = torch.cat([weight.grad.flatten() for weight in policy.trainable().values()])
        found[way] = logps_N.detach(), grads
        print(f"{way:10}{min(seconds):6.2f} s")
    for name, ours, theirs in zip(("logprobs", "gradients"), *found.values()):
        print(f"{name}: {float((ours - theirs).abs().max()):.0e} of at most {float(ours.abs().max()):.0e}")


if __name__ == "__main__":
    main()
