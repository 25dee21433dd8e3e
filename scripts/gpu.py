"""Does a step fit, and how long does it take? Models of the real shapes on a GPU, under memory caps.

    python scripts/gpu.py                   # needs CUDA; under ten minutes
    python scripts/gpu.py --smoke           # tiny shapes, also on a CPU: checks that the script runs

The models have the published shapes of Qwen2.5 and random weights (nothing is downloaded). Memory caps are
set with torch.cuda.set_per_process_memory_fraction, so that a large card speaks for smaller ones about
memory; its speed says nothing about theirs. A step is one whole step of the default batch as train.py
does it: 3·B proposals, the n tries of 3·B tasks, 3·B solutions, one update over 6·B rollouts. Random weights
say nothing sensible, so lengths are drawn: a response ends at each token with a fixed chance that makes its
mean --mean-response tokens, and prompts have --prompt tokens.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import azr  # noqa: E402
from train import CARD, preset  # noqa: E402

# hidden, layers, heads, key-value heads, intermediate, tied: config.json of Qwen/Qwen2.5-* on the Hugging Face hub
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, True), "1.5B": (1536, 28, 12, 2, 8960, True),
    "3B": (2048, 36, 16, 2, 11008, True), "7B": (3584, 28, 28, 4, 18944, False),
    "smoke": (64, 2, 4, 2, 128, True),
}
VOCABULARY = {"7B": 152_064, "smoke": 1000}
MATRIX = [("0.5B", "bf16", 8), ("1.5B", "4bit", 8), ("3B", "4bit", 8), ("3B", "4bit", 12), ("3B", "4bit", 16),
          ("3B", "bf16", 16), ("3B", "4bit", 24), ("7B", "4bit", 12), ("7B", "4bit", 16), ("7B", "4bit", 24), ("7B", "bf16", 24)]


class NoText:
    """Stands for a tokenizer: nothing a random model says is the text `</answer>`."""

    def decode(self, ids, **_):
        return ""


def make_policy(size, quantize, device, mean_response):
    """A Policy with random weights of the real shape, loaded as load_policy does."""
    hidden, layers, heads, kv_heads, intermediate, tied = SHAPES[size]
    vocabulary = VOCABULARY.get(size, 151_936)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=intermediate, tie_word_embeddings=tied,
                         max_position_embeddings=32768)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(dtype)
    if quantize == "4bit":
        quantize_linears(model, dtype, device)
    for module in model.modules():  # what is not a quantized matrix is made here, a module at a time
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.empty(parameter.shape, dtype=dtype, device=device)
                torch.nn.init.ones_(fresh) if "norm" in type(module).__name__.lower() else torch.nn.init.normal_(fresh, std=0.02)
                setattr(module, name, torch.nn.Parameter(fresh, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    ends = max(1, round(vocabulary / mean_response))  # logits are nearly uniform
    model.generation_config = GenerationConfig(eos_token_id=list(range(ends)), pad_token_id=vocabulary - 1)
    peft_model = get_peft_model(model, LoraConfig(r=preset(CARD).lora_rank, lora_alpha=2 * preset(CARD).lora_rank,
                                                  target_modules="all-linear", task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_attn_implementation("grouped_sdpa")
    return azr.Policy(peft_model, model, NoText(), frozenset(range(ends)), vocabulary - 1, chat=False)


def quantize_linears(model, dtype, device):
    import bitsandbytes
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                weight = torch.randn(child.weight.shape, dtype=dtype, device=device) * 0.02
                bias = child.bias is not None
                layer = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=bias, compute_dtype=dtype,
                                                   compress_statistics=True, quant_type="nf4", device="meta")
                layer.weight = bitsandbytes.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)._quantize(torch.device(device))
                if bias:
                    layer.bias = torch.nn.Parameter(torch.zeros(child.out_features, dtype=dtype, device=device), requires_grad=False)
                setattr(parent, name, layer)


def peak_gb(device):
    return torch.cuda.max_memory_reserved() / 2 ** 30 if device == "cuda" else float("nan")


def one_step(policy, cfg, prompt_tokens, device):
    """Seconds by phase of one step, and tokens; everything but the sandbox."""
    draw = lambda count: [torch.randint(1000 if policy.pad_id > 2000 else 0, policy.pad_id, (prompt_tokens,)).tolist()  # noqa: E731
                          for _ in range(count)]
    clock = {}

    def timed(name, action):
        started = time.perf_counter()
        result = action()
        if device == "cuda":
            torch.cuda.synchronize()
        clock[name] = time.perf_counter() - started
        return result

    prompts = draw(3 * cfg.batch)
    proposals = timed("propose", lambda: azr.generate(policy, prompts, cfg.max_response))
    estimates = timed("estimate", lambda: azr.generate(policy, prompts, cfg.max_response, copies=cfg.samples))
    solutions = timed("solve", lambda: azr.generate(policy, prompts, cfg.max_response))
    rollouts = [azr.Rollout("solve", "deduction", prompts[i % len(prompts)], ids, "", advantage=(-1.0) ** i)
                for i, ids in enumerate(proposals + solutions)]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    timed("update", lambda: azr.trr_update(policy, optimizer, rollouts, cfg))
    sampled = sum(map(len, proposals + estimates + solutions))
    trained = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    generate_seconds = clock["propose"] + clock["estimate"] + clock["solve"]
    return {**{k: round(v, 2) for k, v in clock.items()}, "generate tokens/s": round(sampled / generate_seconds),
            "update tokens/s": round(trained / clock["update"])}


def measure(size, quantize, cap, options):
    """One row of the table, in a process of its own: a cap holds for the life of a process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    if device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole))
        free = lambda *_: (max(0, int(cap * 2 ** 30) - torch.cuda.memory_reserved()), int(cap * 2 ** 30))  # noqa: E731
        torch.cuda.mem_get_info = free  # the driver does not know of the cap
    cfg = preset(CARD)
    if size == "smoke":
        cfg, options.prompt, options.mean_response = preset(CARD, batch=2, samples=2, max_response=64), 32, 16
    result = {"fits": "no"}
    try:
        policy = make_policy(size, quantize, device, options.mean_response)
        result["model GB"] = round(peak_gb(device), 2)
        speeds = []
        for rows in options.rows:  # tokens/s at a fixed number of rows, short: the step below is the real thing
            policy.rows = rows
            prompts = [[1000 % policy.pad_id] * options.prompt] * rows
            started = time.perf_counter()
            sampled = sum(map(len, azr.generate(policy, prompts, min(128, cfg.max_response))))
            speeds.append(f"{rows}: {sampled / (time.perf_counter() - started):.0f}")
        policy.rows = 0
        result["tokens/s at rows"] = ", ".join(speeds)
        gc.collect()
        result |= one_step(policy, cfg, options.prompt, device)
        result["fits"] = "yes"
        seconds = sum(result[name] for name in ("propose", "estimate", "solve", "update"))
        result["hours for 200 steps"] = round(seconds * 200 / 3600, 2)
    except torch.OutOfMemoryError:
        pass
    result["peak GB"] = round(peak_gb(device), 2)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--prompt", type=int, default=600, help="tokens of a prompt")
    parser.add_argument("--mean-response", type=int, default=300, help="mean tokens of a response")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 128], help="batch sizes for the generation speed")
    parser.add_argument("--only", help="one row: size,quantize,GB (3B,4bit,12)")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        print("gpu.py: no CUDA GPU here; --smoke checks that the script runs on a CPU", file=sys.stderr)
        return 2
    matrix = MATRIX
    if options.smoke:  # bitsandbytes' CPU kernel cannot train layers that have a bias, as Qwen2's
        matrix = [("smoke", "bf16", 8)] + [("smoke", "4bit", 8)] * torch.cuda.is_available()
    if options.only:
        size, quantize, cap = options.only.split(",")
        matrix = [(size, quantize, float(cap))]
        if options.json:
            print("RESULT", json.dumps(measure(*matrix[0], options)))
            return 0
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}; prompts of {options.prompt} tokens, responses of {options.mean_response} on average; default batch\n")
    header = ["model", "weights", "cap GB", "fits", "model GB", "peak GB", "tokens/s at rows", "generate tokens/s", "update tokens/s",
              "propose", "estimate", "solve", "update", "hours for 200 steps"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for size, quantize, cap in matrix:
        child = subprocess.run(
            [sys.executable, __file__, *["--smoke"] * options.smoke, "--only", f"{size},{quantize},{cap}", "--json", "--prompt", str(options.prompt),
             "--mean-response", str(options.mean_response), "--rows", *map(str, options.rows)], capture_output=True, text=True)
        lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT")]
        result = json.loads(lines[0][7:]) if lines else {"fits": "failed: " + (child.stderr.strip().splitlines() or ["?"])[-1]}
        result |= {"model": size, "weights": quantize, "cap GB": cap}
        print("| " + " | ".join(str(result.get(column, "–")) for column in header) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
