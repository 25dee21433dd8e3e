#!/usr/bin/env bash
# transformers reads the tokenizer of a GGUF file without the <bos> that the file asks for.
#
# A GGUF file says in tokenizer.ggml.add_bos_token whether texts begin with <bos>, and llama.cpp adds it. Read by
# AutoTokenizer.from_pretrained(..., gguf_file=...), the SentencePiece tokenizers of Llama and Gemma do not add it,
# whatever the file says, while those of the same models' folders do. Weights and vocabulary are right and nothing
# is said, so one looks for the fault in the quantization. Perplexities, evaluations and fine-tuning from the
# file are all of a model that reads texts as it never did in its training.
#
# The guess, written down first: the flag in the file is read like the tokens beside it.
# What is right: compare tokenizer("a").input_ids[0] with bos_token_id, and set tokenizer.add_bos_token = True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.20.2 gguf==0.19.0
"$folder/venv/bin/python" - "$folder" 2> "$folder/stderr" <<'PYTHON' || { cat "$folder/stderr" >&2; exit 1; }
import importlib.metadata
import sys

import gguf
import transformers
from transformers import AutoTokenizer


def write(path, family):
    """The tokenizer of a small model: 256 bytes and a few letters in a SentencePiece vocabulary."""
    writer = gguf.GGUFWriter(path, family)
    for name, value in (("context_length", 512), ("embedding_length", 64), ("block_count", 1), ("feed_forward_length", 96),
                        ("head_count", 4), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6), ("key_length", 16),
                        ("value_length", 16), ("sliding_window", 16)):
        getattr(writer, f"add_{name}")(value)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * 9])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


print(f"transformers {transformers.__version__}, gguf {importlib.metadata.version('gguf')}")
begins = {}
for family in ("llama", "gemma3"):
    write(f"{sys.argv[1]}/{family}.gguf", family)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=f"{family}.gguf")
    ids = tokenizer("abc").input_ids
    begins[family] = ids[0] == tokenizer.bos_token_id
    print(f"{family}: the file says add_bos_token = True, <bos> is {tokenizer.bos_token_id}, and 'abc' is read as {ids}")
if any(begins.values()):
    sys.exit("the behaviour has changed: the flag is read")
PYTHON
