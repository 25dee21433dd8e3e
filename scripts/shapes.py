"""Policies of real shapes with random weights, for what is measured or simulated without a download."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from model import Policy
from train import CARD, preset

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied: config.json of Qwen/Qwen2.5-*, and of
# SmolLM2-135M (whose layers have no biases; here they do). `narrow` is nearly all output head.
SHAPES = {"narrow": (128, 2, 4, 2, 512, 151_936, True), "SmolLM2-135M": (576, 30, 9, 3, 1536, 49_152, True),
          "0.5B": (896, 24, 14, 2, 4864, 151_936, True), "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
          "3B": (2048, 36, 16, 2, 11008, 151_936, True), "7B": (3584, 28, 28, 4, 18944, 152_064, False),
          "14B": (5120, 48, 40, 8, 13824, 152_064, False), "tiny": (64, 2, 4, 2, 128, 1000, True)}


class NoText:
    """Stands for a tokenizer: nothing that a random model says is the text `</answer>`."""

    def decode(self, ids, **_):
        return ""


def make_policy(shape, weights, device, dtype=torch.bfloat16, mean_response=300):
    """A Policy of that shape with random weights, LoRA that is not zero, all else as load_policy does it.

    weights: '4bit' (nf4) or 'bf16' (those of `dtype`). device: also 'meta', whose tensors hold no data.
    """
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=32768)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(dtype)
    for module in list(model.modules()):  # a module at a time, so that bf16 weights are never there as a whole
        for name, child in module.named_children():
            if weights == "4bit" and type(child) is torch.nn.Linear and name != "lm_head":
                setattr(module, name, _quantized(child, device))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and not hasattr(parameter, "quant_state"):
                setattr(module, name, torch.nn.Parameter(_random(parameter, device), requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        model.tie_weights()
        rank = preset(CARD).lora_rank
        peft_model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ends = max(1, round(vocabulary / mean_response))  # logits are nearly uniform
    model.generation_config = GenerationConfig(eos_token_id=list(range(ends)), pad_token_id=vocabulary - 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_attn_implementation("grouped_sdpa")
    return Policy(peft_model, model.eval(), NoText(), frozenset(range(ends)), vocabulary - 1, chat=False,
                  shares_prompts=False)


def _random(like, device):
    fresh = torch.empty(like.shape, dtype=like.dtype, device=device)
    return fresh.fill_(1.0) if fresh.ndim == 1 else fresh.normal_(std=0.02)


def _quantized(linear, device):
    import bitsandbytes
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type="nf4", device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(
        _random(linear.weight, device), quant_type="nf4", module=layer)._quantize(torch.device(device))
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(_random(linear.bias, device), requires_grad=False)
    return layer
