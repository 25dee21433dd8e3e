"""What it brings that rows join and leave a batch: sampling with it and without, attention and recurrent layers.

    python scripts/joining.py           # CPU, about two minutes

Both ways sample the same prompts with the same numbers of tokens, drawn so that half of the responses are shorter
than a tenth of the longest allowed. `fixed` waits for the longest response of a batch before it takes prompts in.
Random models of equal width and depth: Qwen3 has attention in every layer, Qwen3.5 in every fourth, and recurrent
layers between.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import sampling
from model import Policy

RECURRENT = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
MODELS = {"qwen3": {}, "qwen3_5_text": RECURRENT}
VOCABULARY = 2000


class Dots:
    """Stands for a tokenizer: nothing here is ever the text `</answer>`."""

    def decode(self, ids, **_):
        return "." * len(ids)


def make_policy(model_type, width, layers):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, **MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="grouped_sdpa").eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return Policy(model, model, Dots(), frozenset(), 0, chat=False, shares_prompts=False)


def make_requests(options):
    """[(Completion, the length of its response)]: a geometric distribution, cut at the cap."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(options.prompts).geometric_(0.693 / (options.cap / 10), generator=generator)
    widths = torch.randint(options.prompt_tokens // 3, options.prompt_tokens, (options.prompts,), generator=generator)
    requests = []
    for length, width in zip(lengths.tolist(), widths.tolist()):
        ids = torch.randint(VOCABULARY, (width,), generator=generator).tolist()
        requests.append((sampling.Completion(ids), int(min(length, options.cap))))
    return requests


def seconds(policy, options):
    requests = make_requests(options)
    lengths = {id(request.response_ids): length for request, length in requests}  # lists that sampling extends

    def end_of(policy, ids, checked):
        return lengths[id(ids)] if len(ids) >= lengths[id(ids)] else None

    sampling._end_of = end_of
    started = time.perf_counter()
    for _ in sampling.Sampler(policy, options.rows).stream([request for request, _ in requests], options.cap):
        pass
    assert all(len(request.response_ids) == length for request, length in requests)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"width {options.width}, {options.layers} layers, one CPU thread, {options.prompts} prompts, cap {options.cap}, "
          f"{options.rows} rows; medians of 3\n\n| model | fixed, s | joining, s | ratio |\n|---|---|---|---|")
    joins = sampling._Batch.can_grow
    for model_type in MODELS:
        policy = make_policy(model_type, options.width, options.layers)
        fixed, joining = [], []
        for _ in range(3):  # turn by turn, so that other work on the machine slows both
            sampling._Batch.can_grow = lambda batch: False
            fixed.append(seconds(policy, options))
            sampling._Batch.can_grow = joins
            joining.append(seconds(policy, options))
        before, after = sorted(fixed)[1], sorted(joining)[1]
        print(f"| {model_type} | {before:.1f} | {after:.1f} | {before / after:.2f} |", flush=True)


if __name__ == "__main__":
    main()
