#!/usr/bin/env bash
# With "dynamic" or "longrope" rotary embeddings, what a model thinks of a text depends on the others in its batch.
#
# transformers looks at the longest position of a batch, and once that passes the length of training (4,096 tokens
# for Phi-3.5-mini and Phi-4-mini) it takes other frequencies for all rows, the short ones too. No row is
# computed wrongly by itself; but the logprobs of a row of 40 tokens are others beside a row of 80 than alone. The
# same holds for padding. An evaluation changes with the batch size and with the order of its rows, and in
# reinforcement learning the logprobs of the sampler and of the update belong to two different policies.
#
# The guess, written down first: rows of a batch are independent, but for rounding; a causal mask sees to it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2
"$folder/venv/bin/python" - 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr" >&2; exit 1; }
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

torch.set_num_threads(1)
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
models = {  # the length of training is 64 here, to be quick
    "Llama, default": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **SIZES)),
    "Llama, dynamic": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, **SIZES)),
    "Phi-3, longrope": lambda: Phi3ForCausalLM(Phi3Config(max_position_embeddings=512, original_max_position_embeddings=64,
                                                          rope_parameters=LONGROPE, **SIZES)),
}


@torch.no_grad()
def logprobs(model, texts):
    """Of the first text's tokens, in a batch that is padded on the right."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    scores = model(input_ids=ids, attention_mask=mask).logits[0, :len(texts[0]) - 1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:len(texts[0]), None])[:, 0]


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
gaps = {}
for name, make in models.items():
    torch.manual_seed(0)
    model = make().eval()
    text, shorter, longer = ([*range(3, 3 + length)] for length in (40, 60, 80))
    alone = logprobs(model, [text])
    gaps[name] = [float((logprobs(model, [text, other]) - alone).abs().max()) for other in (shorter, longer)]
    print(f"{name}: a row of 40 tokens is off by {gaps[name][0]:.5f} nats beside one of 60, and by {gaps[name][1]:.5f} beside one of 80")
if gaps["Llama, default"][1] > 1e-4 or any(gaps[name][1] < 0.01 for name in ("Llama, dynamic", "Phi-3, longrope")):
    sys.exit("the behaviour has changed: rows are independent")
PYTHON
