"""Sampling speed: this code's Sampler beside plain ways, at equal memory (the same number of rows).

    python scripts/generate.py          # CPU, about two minutes

Uneven lengths are the point: a small random model whose next token is nearly uniform ends a response
with a fixed probability at each token, so half of the responses are shorter than a tenth of the cap.
Ways: `fixed` reads prompts in order of arrival, in batches that wait for their longest row, each copy of
a prompt read anew (what `model.generate` on chunks does); `static` is that with a static cache and
torch.compile; `continuous` is transformers' own `generate_batch`. All but `fixed` and this code are left
out unless asked for with --ways.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from model import Policy
from sampling import Sampler


class Bytes:
    """Stands for a tokenizer: nothing here is ever the text `</answer>`."""

    def decode(self, ids, **_):
        return "." * len(ids)


def make_policy(width, layers, cap):
    torch.manual_seed(0)
    vocabulary = 2000
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).eval()
    ends = round(vocabulary * 0.693 / (cap / 10))  # half-life: a tenth of the cap
    model.generation_config = GenerationConfig(eos_token_id=list(range(ends)), pad_token_id=vocabulary - 1)
    return Policy(model, model, Bytes(), frozenset(range(ends)), vocabulary - 1, chat=False, shares_prompts=False)


@torch.no_grad()
def fixed(policy, prompts, cap, copies, rows, **more):
    queue = [prompt for prompt in prompts for _ in range(copies)]
    responses = []
    for start in range(0, len(queue), rows):
        part = queue[start:start + rows]
        width = max(map(len, part))
        ids_BT = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in part])
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = policy.causal.generate(ids_BT, attention_mask=mask_BT, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                     max_new_tokens=cap, **more)
        for ids in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(ids) if token in policy.end_ids), len(ids))
            responses.append(ids[:end])
    return responses


def ours(policy, prompts, cap, copies, rows):
    policy.causal.set_attn_implementation("grouped_sdpa")  # as load_policy does
    try:
        return [ids for ids, logps in Sampler(policy, rows).generate(prompts, cap, copies)]
    finally:
        policy.causal.set_attn_implementation("sdpa")


def static(policy, prompts, cap, copies, rows):
    plain = policy.causal.forward  # on a CPU transformers does not compile by itself
    policy.causal.forward = compiled(policy)
    try:
        return fixed(policy, prompts, cap, copies, rows, cache_implementation="static")
    finally:
        policy.causal.forward = plain


COMPILED = {}  # once for all repeats: the first one pays for it, and the median is printed


def compiled(policy):
    return COMPILED.setdefault(id(policy), torch.compile(policy.causal.forward, dynamic=True))


def continuous(policy, prompts, cap, copies, rows):
    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=cap,
                              eos_token_id=sorted(policy.end_ids), pad_token_id=policy.pad_id)
    out = policy.causal.generate_batch([p for p in prompts for _ in range(copies)], generation_config=config)
    return [result.generated_tokens for result in out.values()]


WAYS = {"fixed": fixed, "this code": ours, "static": static, "continuous": continuous}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--cap", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--ways", default="fixed,this code")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = make_policy(options.width, options.layers, options.cap)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(200, 1999, (int(torch.randint(options.prompt_tokens // 3, options.prompt_tokens, (1,), generator=generator)),),
                             generator=generator).tolist() for _ in range(options.prompts)]
    print(f"width {options.width}, {options.layers} layers, one CPU thread, {options.prompts} prompts × {options.copies}, "
          f"cap {options.cap}, {options.rows} rows\n\n| way | tokens/s | ratio | median length / cap |\n|---|---|---|---|")
    base = None
    for name in options.ways.split(","):
        rates = []
        for repeat in range(3):
            torch.manual_seed(repeat)
            started = time.perf_counter()
            responses = WAYS[name](policy, prompts, options.cap, options.copies, options.rows)
            rates.append(sum(map(len, responses)) / (time.perf_counter() - started))
        rate = sorted(rates)[1]
        base = base or rate
        lengths = sorted(map(len, responses))
        print(f"| {name} | {rate:.0f} | {rate / base:.2f} | {lengths[len(lengths) // 2] / options.cap:.2f} |", flush=True)


if __name__ == "__main__":
    main()
