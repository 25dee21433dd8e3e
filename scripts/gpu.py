"""How long does a token take, how long the update, and which way to decode is fastest? On a GPU.

    python scripts/gpu.py                                # 0.5B to 7B, 4-bit and bf16: needs CUDA, some minutes
    python scripts/gpu.py --shapes 3B --caps 24          # one model, as on a card of 24 GB
    python scripts/gpu.py --shapes tiny --device cpu     # seconds: only checks that every way runs

The models have the published shapes of Qwen2.5 and random weights; nothing is downloaded. The caps are set by
torch.cuda.set_per_process_memory_fraction: a large card then speaks for smaller ones about memory, but not
about speed. A token's time is that of --rows rows, the time of a few tokens subtracted from that of more, so
that reading the prompts does not count. The update reads as many responses as there are rows, eight a prompt.

Ways to decode:
    azr      this code's Sampler, with CUDA graphs of its own
    eager    the same without them
    fused    azr, with each LoRA layer as two matrix products in the dtype of the base weights
    plain    transformers' `generate` on padded batches; the others are checked against its greedy tokens
    paged    transformers' `generate_batch`: a paged cache and CUDA graphs
    static   plain with a static cache in fixed buckets, which transformers compiles; only if asked for
In bf16 other kernels round differently, and greedy tokens part after a while: `equal` is the share of tokens
before they do. It must be 1 on a CPU, where the weights are fp32.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft.tuners.lora import LoraLayer
from shapes import SHAPES, make_policy
from tables import markdown
from transformers import GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from azr import trr_update
from rewards import Rollout
from sampling import Sampler
from train import CARD, preset

COLUMNS = "model weights cap way equal ms_a_token tokens_per_second peak_gb note".split()
BUCKET = 256  # columns of a static cache, and of a padded prompt, come in multiples of it
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = {"do_sample": False}


# --- ways to decode: (policy, rows, prompts, max_tokens, copies, greedy) → [ids], prompt by prompt ------

def plain(policy, rows, prompts, max_tokens, copies=1, greedy=False, caches=None):
    """Batches of so many rows, longest prompts first, that wait for their longest response."""
    responses = {}
    waiting = sorted(enumerate(repeated(prompts, copies)), key=lambda pair: -len(pair[1]))
    for start in range(0, len(waiting), rows):
        part = waiting[start:start + rows]
        part += part[-1:] * (rows - len(part)) if caches is not None else []  # a graph is of one shape
        width = -(-len(part[0][1]) // BUCKET) * BUCKET if caches is not None else len(part[0][1])
        ids_BP = torch.tensor([[policy.pad_id] * (width - len(p)) + p for _, p in part], device=policy.device)
        mask_BP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in part], device=policy.device)
        ids_BT = policy.causal.generate(
            ids_BP, attention_mask=mask_BP, max_new_tokens=max_tokens, past_key_values=caches and caches(width),
            **(GREEDY if greedy else SAMPLED))
        for (place, _), ids in zip(part, ids_BT[:, width:].tolist()):
            responses[place] = _ended(policy, ids)
    return [responses[place] for place in range(len(waiting))]


def repeated(prompts, copies):
    """Each prompt `copies` times, next to each other."""
    requests = []
    for prompt in prompts:
        requests += [prompt] * copies
    return requests


def _ended(policy, ids):
    return ids[:next((i + 1 for i, token in enumerate(ids) if token in policy.end_ids), len(ids))]


def static(policy, rows, prompts, max_tokens, copies=1, greedy=False):
    """`plain` with one static cache for each bucket; on a GPU transformers compiles its forward pass."""
    made = {}

    def cache(width):
        columns = -(-(width + max_tokens) // BUCKET) * BUCKET
        if columns not in made:
            made[columns] = StaticCache(config=policy.causal.config, max_cache_len=columns)
        made[columns].reset()
        return made[columns]

    return plain(policy, rows, prompts, max_tokens, copies, greedy, cache)


def paged(policy, rows, prompts, max_tokens, copies=1, greedy=False):
    """Continuous batching: rows come and go at every token, keys and values live in pages."""
    config = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=sorted(policy.end_ids),
                              pad_token_id=policy.pad_id, **(GREEDY if greedy else SAMPLED))
    on_gpu = policy.device.type == "cuda"  # elsewhere it would fill all memory with pages
    batching = ContinuousBatchingConfig(use_cuda_graph=on_gpu, max_requests_per_batch=rows,
                                        num_blocks=None if on_gpu else 64, max_batch_tokens=None if on_gpu else 512)
    policy.causal.set_attn_implementation("sdpa")  # it knows no other but flash
    try:
        results = policy.causal.generate_batch(repeated(prompts, copies), config, batching)
    finally:
        policy.causal.set_attn_implementation("grouped_sdpa")
    responses = [result.generated_tokens for result in results.values() if result.error is None]
    if len(responses) < len(prompts) * copies:  # it logs errors and raises none
        raise RuntimeError(f"generate_batch answered {len(responses)} of {len(prompts) * copies} requests")
    return responses


def ours(policy, rows, prompts, max_tokens, copies=1, greedy=False):
    """This code's Sampler."""
    responses = Sampler(policy, rows).generate(prompts, max_tokens, copies, temperature=0 if greedy else 1)
    return [ids for ids, logps in responses]


def fused(policy, *arguments):
    """`ours`, with a LoRA layer as base(x) + (x Aᵀ) (α/r · B)ᵀ: two products, no casts."""
    with contextlib.ExitStack() as stack:
        for layer in [m for m in policy.causal.modules() if isinstance(m, LoraLayer)]:
            stack.enter_context(mock.patch.object(layer, "forward", _two_products(layer, policy.causal.dtype)))
        return ours(policy, *arguments)


def _two_products(layer, dtype):
    down = layer.lora_A["default"].weight.detach().to(dtype).t()
    up = (layer.lora_B["default"].weight.detach() * layer.scaling["default"]).to(dtype).t()

    def forward(x):
        result = layer.base_layer(x)
        return torch.addmm(result.flatten(0, -2), x.flatten(0, -2) @ down, up).view(result.shape)
    return forward


def eager(policy, *arguments):
    """`ours` without CUDA graphs."""
    with mock.patch("sampling.uses_graphs", lambda policy: False):
        return ours(policy, *arguments)


WAYS = {"azr": ours, "eager": eager, "fused": fused, "plain": plain, "paged": paged, "static": static}


# --- what is measured --------------------------------------------------------------------------------

def share_equal(policy, rows, way):
    """Share of the greedy tokens of `plain` that the way gives, up to each response's first difference."""
    low, generator = len(policy.end_ids), torch.Generator().manual_seed(0)
    prompts = [torch.randint(low, policy.pad_id, (length,), generator=generator).tolist()
               for length in (40, 7, 300, 23, 64)]  # uneven, so that padding matters
    pairs = list(zip(way(policy, rows, prompts, 32, 1, True), plain(policy, rows, prompts, 32, 1, True)))
    alike = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair))) for pair in pairs]
    return sum(alike) / sum(max(map(len, pair)) for pair in pairs)


def seconds_of(policy, action):
    started = time.perf_counter()
    action()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def decoding(policy, way, options):
    """Milliseconds a token of options.rows rows, and tokens a second of all of them."""
    prompts = some_prompts(policy, options)
    few = options.tokens // 4
    _, short, long = (seconds_of(policy, lambda: way(policy, options.rows, prompts, tokens, options.copies))
                      for tokens in (few, few, few + options.tokens))  # the first warms up
    token = (long - short) / options.tokens
    return {"ms_a_token": round(1000 * token, 1), "tokens_per_second": round(options.rows / token)}


def updating(policy, options):
    """Tokens a second of trr_update, prompts and responses counted once for each response."""
    prompts = some_prompts(policy, options)
    rollouts = [Rollout("solve", "deduction", prompt, prompt[:options.response], advantage=(-1.0) ** i)
                for i, prompt in enumerate(repeated(prompts, options.copies))]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    cfg = preset(CARD)
    micro_tokens = trr_update(policy, optimizer, rollouts, cfg)["micro_tokens"]  # it warms up, and finds what fits
    seconds = seconds_of(policy, lambda: trr_update(policy, optimizer, rollouts, cfg, micro_tokens))
    return {"tokens_per_second": round(sum(r.tokens for r in rollouts) / seconds), "note": f"{seconds:.1f} s"}


def some_prompts(policy, options):
    generator = torch.Generator().manual_seed(0)
    shape = options.rows // options.copies, options.prompt
    return torch.randint(1, policy.pad_id, shape, generator=generator).tolist()


def measure(shape, weights, cap, options):
    """The rows of one model, in a process of its own: a cap holds for the life of a process. → [{column: value}]"""
    on_gpu, cap, rows = options.device == "cuda", float(cap), []
    torch.manual_seed(0)
    if on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2 ** 30 / whole))
        torch.cuda.mem_get_info = lambda *_: (  # the driver does not know of the cap
            max(0, int(cap * 2 ** 30) - torch.cuda.memory_reserved()), int(cap * 2 ** 30))
    else:
        torch.set_num_threads(1)
    if shape == "tiny":
        options.prompt, options.response, options.rows, options.tokens = 32, 16, 8, 16
    policy = make_policy(shape, weights, options.device, torch.bfloat16 if on_gpu else torch.float32, 10 ** 9)
    policy.shares_prompts = True
    for name in [*options.ways, "update"]:
        row = {"model": shape, "weights": weights, "cap": f"{cap:g}" if on_gpu else "–", "way": name}
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if name == "update":
                row |= updating(policy, options)
            else:
                row["equal"] = round(share_equal(policy, options.rows, WAYS[name]), 3)
                row |= decoding(policy, WAYS[name], options)
        except (RuntimeError, ValueError) as error:  # out of memory, and what a library cannot do
            row["note"] = (str(error).splitlines() or ["failed"])[0]
        rows.append(row | {"peak_gb": _peak_gb(on_gpu)})
        print(*(rows[-1].get(column, "–") for column in COLUMNS), file=sys.stderr, flush=True)
    return rows


def _peak_gb(on_gpu):
    return round(torch.cuda.max_memory_reserved() / 2 ** 30, 2) if on_gpu else "–"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "3B", "7B"])
    add("--weights", nargs="+", choices=("4bit", "bf16"), default=["4bit", "bf16"])
    add("--caps", nargs="+", type=float, default=[24], help="GB of the card")
    add("--ways", nargs="*", choices=WAYS, default=[way for way in WAYS if way != "static"])
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--rows", type=int, default=64, help="responses decoded at once")
    add("--copies", type=int, default=8, help="responses to one prompt")
    add("--prompt", type=int, default=600, help="tokens of a prompt")
    add("--response", type=int, default=300, help="tokens of a response in the update")
    add("--tokens", type=int, default=64, help="tokens whose time is taken")
    add("--row", nargs=3, help=argparse.SUPPRESS)  # one model, for the process that prints the table
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("gpu.py: no CUDA GPU here; --shapes tiny --device cpu checks that every way runs", file=sys.stderr)
        return 2
    if options.row:
        print(json.dumps(measure(*options.row, options)))
        return 0
    rows = [COLUMNS]
    for shape, weights, cap in itertools.product(options.shapes, options.weights, options.caps if on_gpu else [0]):
        if not on_gpu and weights == "4bit":
            print("4-bit layers with biases cannot be trained on a CPU: left out", file=sys.stderr)
            continue
        child = subprocess.run([sys.executable, __file__, *arguments, "--row", shape, weights, str(cap)],
                               stdout=subprocess.PIPE, text=True)
        found = json.loads(child.stdout) if child.returncode == 0 else [{"model": shape, "note": "failed: see above"}]
        rows += [[row.get(column, "–") for column in COLUMNS] for row in found]
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU, one thread'}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
