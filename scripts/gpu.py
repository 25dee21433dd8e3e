"""Does a step fit, how long does it take, and which way to decode is fastest? On a GPU, under memory caps.

    python scripts/gpu.py                                # every row: needs CUDA, and some hours
    python scripts/gpu.py --shapes 3B --caps 24          # the rows of one model on one card
    python scripts/gpu.py --shapes tiny --device cpu     # seconds: only checks that every way runs

The models have the published shapes of Qwen2.5 and random weights; nothing is downloaded. The caps are set by
torch.cuda.set_per_process_memory_fraction: a large card then speaks for smaller ones about memory, but not
about speed. A step is one of train.py's at its defaults, without the sandbox: 3·B proposals, n tries of each
of 3·B tasks, 3·B solutions, one update over all of them. Random weights say nothing sensible, so a response
ends at each token with the chance that makes its mean --mean-response tokens.

Ways to decode:
    azr      this code's `generate`
    plain    transformers' `generate` on padded batches; the others are checked against its greedy tokens
    static   the same with a static cache in fixed buckets, where transformers compiles to CUDA graphs
    paged    transformers' `generate_batch`: a paged cache and CUDA graphs
    fused    azr, with each LoRA layer as two matrix products in the dtype of the base weights
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
from transformers import GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import azr
from report import layout
from train import CARD, preset

COLUMNS = ("model weights cap way fits model_gb peak_gb equal tokens_per_second propose estimate solve update "
           "hours note").split()
BUCKET = 256  # columns of a static cache, and of a padded prompt, come in multiples of it
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = {"do_sample": False}


# --- ways to decode: (policy, prompts, max_tokens, copies, greedy) → [response], as azr.generate ---------

def plain(policy, prompts, max_tokens, copies=1, greedy=False, caches=None):
    """Batches of policy.rows rows, longest prompts first, that wait for their longest response."""
    rows, responses = policy.rows, {}
    waiting = [(i * copies + copy, prompt) for i, prompt in enumerate(prompts) for copy in range(copies)]
    waiting.sort(key=lambda pair: -len(pair[1]))
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


def _ended(policy, ids):
    return ids[:next((i + 1 for i, token in enumerate(ids) if token in policy.end_ids), len(ids))]


def static(policy, prompts, max_tokens, copies=1, greedy=False):
    """`plain` with one static cache for each bucket; on a GPU transformers compiles its forward pass."""
    made = {}

    def cache(width):
        columns = -(-(width + max_tokens) // BUCKET) * BUCKET
        if columns not in made:
            made[columns] = StaticCache(config=policy.causal.config, max_cache_len=columns)
        made[columns].reset()
        return made[columns]

    return plain(policy, prompts, max_tokens, copies, greedy, cache)


def paged(policy, prompts, max_tokens, copies=1, greedy=False):
    """Continuous batching: rows come and go at every token, keys and values live in pages."""
    config = GenerationConfig(max_new_tokens=max_tokens, eos_token_id=sorted(policy.end_ids),
                              pad_token_id=policy.pad_id, **(GREEDY if greedy else SAMPLED))
    on_gpu = policy.device.type == "cuda"  # elsewhere it would fill all memory with pages
    batching = ContinuousBatchingConfig(use_cuda_graph=on_gpu, max_requests_per_batch=policy.rows,
                                        num_blocks=None if on_gpu else 64, max_batch_tokens=None if on_gpu else 512)
    policy.causal.set_attn_implementation("sdpa")  # it knows no other but flash
    try:
        results = policy.causal.generate_batch(
            [prompt for prompt in prompts for _ in range(copies)], config, batching)
    finally:
        policy.causal.set_attn_implementation("grouped_sdpa")
    responses = [result.generated_tokens for result in results.values() if result.error is None]
    if len(responses) < len(prompts) * copies:  # it logs errors and raises none
        raise RuntimeError(f"generate_batch answered {len(responses)} of {len(prompts) * copies} requests")
    return responses


def fused(policy, prompts, max_tokens, copies=1, greedy=False):
    """azr.generate, with a LoRA layer as base(x) + (x Aᵀ) (α/r · B)ᵀ: two products, no casts."""
    with contextlib.ExitStack() as stack:
        for layer in [m for m in policy.causal.modules() if isinstance(m, LoraLayer)]:
            stack.enter_context(mock.patch.object(layer, "forward", _two_products(layer, policy.causal.dtype)))
        return azr.generate(policy, prompts, max_tokens, copies, greedy)


def _two_products(layer, dtype):
    down = layer.lora_A["default"].weight.detach().to(dtype).t()
    up = (layer.lora_B["default"].weight.detach() * layer.scaling["default"]).to(dtype).t()

    def forward(x):
        result = layer.base_layer(x)
        return torch.addmm(result.flatten(0, -2), x.flatten(0, -2) @ down, up).view(result.shape)
    return forward


WAYS = {"azr": azr.generate, "plain": plain, "static": static, "paged": paged, "fused": fused}


# --- what is measured --------------------------------------------------------------------------------

def share_equal(policy, way):
    """Share of the greedy tokens of `plain` that the way gives, up to each response's first difference."""
    low, generator = len(policy.end_ids), torch.Generator().manual_seed(0)
    prompts = [torch.randint(low, policy.pad_id, (length,), generator=generator).tolist()
               for length in (40, 7, 300, 23, 64)]  # uneven, so that padding matters
    pairs = list(zip(way(policy, prompts, 32, 1, True), plain(policy, prompts, 32, 1, True)))
    alike = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair))) for pair in pairs]
    return sum(alike) / sum(max(map(len, pair)) for pair in pairs)


def one_step(policy, way, cfg, prompt_tokens):
    """A step of train.py without the sandbox. → seconds by phase, sampled tokens a second"""
    low, clock = len(policy.end_ids), {}
    prompts = torch.randint(low, policy.pad_id, (3 * cfg.batch, prompt_tokens)).tolist()

    def timed(name, action):
        started = time.perf_counter()
        result = action()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        clock[name] = time.perf_counter() - started
        return result

    sampled = {name: timed(name, lambda: way(policy, prompts, cfg.max_response, copies))
               for name, copies in (("propose", 1), ("estimate", cfg.samples), ("solve", 1))}
    rollouts = [azr.Rollout("solve", "deduction", prompts[i * len(prompts) // len(responses)], ids, "",
                            advantage=(-1.0) ** i)
                for responses in sampled.values() for i, ids in enumerate(responses)]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    speed = sum(len(r.response_ids) for r in rollouts) / sum(clock.values())
    timed("update", lambda: azr.trr_update(policy, optimizer, rollouts, cfg))
    return {name: round(seconds, 1) for name, seconds in clock.items()} | {"tokens_per_second": round(speed)}


def measure(shape, weights, cap, way, options):
    """One row of the table, in a process of its own: a cap holds for the life of a process."""
    on_gpu, cfg, cap = options.device == "cuda", preset(CARD), float(cap)
    torch.manual_seed(0)
    if on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2 ** 30 / whole))
        torch.cuda.mem_get_info = lambda *_: (  # the driver does not know of the cap
            max(0, int(cap * 2 ** 30) - torch.cuda.memory_reserved()), int(cap * 2 ** 30))
    else:
        torch.set_num_threads(1)
    if shape == "tiny":
        cfg, options.prompt, options.mean_response = preset(CARD, batch=2, samples=2, max_response=32), 32, 16
    result = {"note": "–" if on_gpu or way not in ("static", "paged") else "without CUDA graphs: they need CUDA"}
    try:
        policy = make_policy(shape, weights, options.device, torch.bfloat16 if on_gpu else torch.float32,
                             options.mean_response)
        policy.rows = options.rows
        result["model_gb"] = _peak_gb(on_gpu)
        result["equal"] = round(share_equal(policy, WAYS[way]), 3)
        result |= one_step(policy, WAYS[way], cfg, options.prompt)
        seconds = sum(result[phase] for phase in ("propose", "estimate", "solve", "update"))
        result |= {"fits": "yes", "hours": round(seconds * cfg.steps / 3600, 2)}
    except torch.OutOfMemoryError:
        result["fits"] = "no"
    return result | {"peak_gb": _peak_gb(on_gpu)}


def _peak_gb(on_gpu):
    return round(torch.cuda.max_memory_reserved() / 2 ** 30, 2) if on_gpu else "–"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "3B", "7B"])
    add("--weights", nargs="+", choices=("4bit", "bf16"), default=["4bit", "bf16"])
    add("--caps", nargs="+", type=float, default=[12, 16, 24], help="GB of the card")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--prompt", type=int, default=600, help="tokens of a prompt")
    add("--mean-response", type=int, default=300, help="mean tokens of a response")
    add("--rows", type=int, default=64, help="responses decoded at once")
    add("--row", nargs=4, help=argparse.SUPPRESS)  # one, for the process that prints the table
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
    for shape, weights, cap, way in itertools.product(
            options.shapes, options.weights, options.caps if on_gpu else [0], options.ways):
        result = {"note": "needs CUDA: 4-bit layers with biases cannot be trained on a CPU"}
        if on_gpu or weights == "bf16":
            result = in_own_process([*arguments, "--row", shape, weights, str(cap), way])
        result |= {"model": shape, "weights": weights, "cap": f"{cap:g}" if on_gpu else "–", "way": way}
        rows.append([result.get(column, "–") for column in COLUMNS])
        print(*rows[-1], file=sys.stderr)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU, one thread'}\n\n{layout(rows, True)}")
    return 0


def in_own_process(arguments):
    child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"fits": "failed", "note": (child.stderr.strip().splitlines() or ["killed"])[-1]}


if __name__ == "__main__":
    sys.exit(main())
