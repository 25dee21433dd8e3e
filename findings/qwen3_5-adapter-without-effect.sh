#!/usr/bin/env bash
# An adapter that was trained on Qwen3.5 through AutoModelForCausalLM does nothing on Qwen3.5.
#
# The checkpoints of Qwen3.5 name Qwen3_5ForConditionalGeneration. AutoModelForCausalLM reads the same files as
# the text model inside, without a word, with the same logits, and training scripts load models that way. Its
# weights are called model.layers, and those of the named class model.language_model.layers, so the keys of the
# adapter fit nowhere when it is put on the class that the checkpoint names, as servers do. PEFT raises nothing:
# it leaves the fresh adapter, which is zero, and warns of missing keys. The served model is the untrained one,
# to the last bit, while the trainer's curves go up.
#
# The guess, written down first: one checkpoint is one model, so its adapter loads wherever it does, or fails.
# What is right: train the class that config.architectures names, or load with
# PeftModel.from_pretrained(..., key_mapping={"model.layers": "model.language_model.layers"}).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2 peft==0.21.2
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr" >&2; exit 1; }
import sys
import warnings

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

torch.manual_seed(0)
torch.set_num_threads(1)
config = AutoConfig.for_model(
    "qwen3_5", tie_word_embeddings=True,
    text_config={"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                 "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2,
                 "initializer_range": 0.1, "tie_word_embeddings": True},
    vision_config={"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
                   "num_position_embeddings": 16})
checkpoint, adapter = sys.argv[1] + "/model", sys.argv[1] + "/adapter"
AutoModelForImageTextToText.from_config(config).save_pretrained(checkpoint)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(16)[None]).logits


text = AutoModelForCausalLM.from_pretrained(checkpoint)
named = AutoModelForImageTextToText.from_pretrained(checkpoint)
assert torch.equal(logits(text), logits(named))
untrained = logits(named)
trained = peft.get_peft_model(text, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, weight in trained.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.1)  # in place of training
trained.save_pretrained(adapter)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    served = peft.PeftModel.from_pretrained(named, adapter)
repaired = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(checkpoint), adapter,
                                          key_mapping={"model.layers": "model.language_model.layers"})
effects = [float((after - untrained).abs().max()) for after in (logits(trained), logits(served), logits(repaired))]
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
print(f"trained as {type(text).__name__}, served as {type(named).__name__}")
print(f"the adapter changes logits by {effects[0]:.2f} where it was trained, and by {effects[1]:.2f} where it is served")
print(f"with key_mapping it changes them by {effects[2]:.2f}")
print("said:", [str(warning.message)[:60] + "…" for warning in said if "adapter" in str(warning.message)])
if effects[1] > 0 or effects[0] < 0.1:
    sys.exit("the behaviour has changed: the adapter has effect")
PYTHON
