#!/bin/bash
# transformers: Cache.batch_select_indices(rows) keeps rows of a batch in mid-generation, for example those that have
# not ended. On layers that hold attention and a recurrent state at once (Falcon-H1), it selects the keys and values
# and leaves the recurrent and convolutional states as they are. Where the number of rows stays the same, as when rows
# are reordered or copied, nothing fails: each row goes on with its own text and another row's state, and says other
# things. `reorder_cache` selects both. Whoever writes a decoding loop of their own gets wrong text without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2
cat > "$folder/look.py" <<'PYTHON'
import copy
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = AutoConfig.for_model(
    "falcon_h1", vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_state=8, initializer_range=0.1)
model = AutoModelForCausalLM.from_config(config).eval()
prompts, following = torch.tensor([[5, 6, 7, 8], [50, 60, 70, 80]]), torch.tensor([[9], [90]])
swap = torch.tensor([1, 0])

with torch.no_grad():
    cache = DynamicCache(config=config)
    model(prompts, past_key_values=cache)
    whole = model(torch.cat([prompts, following], 1)[swap]).logits[:, -1]
    print("transformers", transformers.__version__, "layers", type(cache.layers[0]).__name__)
    gaps = {}
    for method in ("reorder_cache", "batch_select_indices"):
        swapped = copy.deepcopy(cache)
        getattr(swapped, method)(swap)
        logits = model(following[swap], past_key_values=swapped).logits[:, -1]
        gaps[method] = float((logits - whole).abs().max())
        print(f"two rows swapped with {method}: logits of the next token off by {gaps[method]:.2g}")
sys.exit(not (gaps["reorder_cache"] < 1e-4 and gaps["batch_select_indices"] > 0.1))
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
