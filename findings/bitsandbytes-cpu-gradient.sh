#!/usr/bin/env bash
# On newer CPUs, QLoRA's gradient is wrong after a single pass in eval mode, and the loss is right.
#
# bitsandbytes trains 4-bit layers on a CPU. On CPUs with AVX512-BF16 (Intel since Cooper Lake and Sapphire Rapids,
# AMD since Zen 4) the first pass in eval mode packs the weights in another order for a faster kernel of inference,
# and they stay so. Back in train mode the forward pass knows of it, so the loss is right; the backward pass does
# not: no gradient flows back through the frozen weights. Each adapter gets only what reaches it by the residual
# connections and the other adapters. Evaluating before training, or sampling in between as reinforcement learning does, is
# enough. Nothing fails and the loss goes down a little; a warning of PyTorch speaks of an operator without an
# autograd kernel.
#
# The guess, written down first: train() and eval() differ in dropout; a pass under no_grad changes no gradient.
# What is right: support_avx512bf16_for_cpu = False on every Linear4bit before its first pass.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2 peft==0.21.2 bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - "$folder/model" 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr" >&2; exit 1; }
import sys

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.1)).save_pretrained(sys.argv[1])
ids = torch.arange(40)[None]


def loss_and_gradient(evaluates_first, packs):
    base = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32))
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, module in model.named_modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
        if hasattr(module, "support_avx512bf16_for_cpu") and not packs:
            module.support_avx512bf16_for_cpu = False
    if evaluates_first:
        with torch.no_grad():
            model.eval()(ids)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    return float(loss), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}")
if not has_avx512bf16():
    print("this CPU has no AVX512-BF16: there is nothing to see on it")
    sys.exit()
loss, gradient = loss_and_gradient(evaluates_first=False, packs=True)
cosines = []
for packs in (True, False):
    other_loss, other = loss_and_gradient(evaluates_first=True, packs=packs)
    cosines.append(float(torch.cosine_similarity(gradient, other, dim=0)))
    print(f"after a pass in eval mode, {'with' if packs else 'without'} packing: loss {other_loss:.3f} for {loss:.3f}, "
          f"cosine of the gradient to the right one {cosines[-1]:.3f}")
if cosines[0] > 0.9 or cosines[1] < 0.999:
    sys.exit("the behaviour has changed: a pass in eval mode leaves the gradient as it was")
PYTHON
