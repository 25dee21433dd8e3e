"""Models that come as a GGUF file, the format of llama.cpp. Needs the package gguf."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def read_gguf(path, dtype, device="cpu"):
    """A GGUF file, with its weights unpacked to `dtype`. → (tokenizer, transformers model)

    transformers reads it, but for three things that are put right here.
    """
    # 1. Unless it is told to unpack all, it keeps the file's way of quantizing where it has kernels for it,
    # and everywhere a mark of it that makes the saved model one that is quantized.
    unpacked = GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(path.resolve().parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, device_map={"": device},
                                                 quantization_config=unpacked)
    from gguf import GGUFReader  # installed, or the tokenizer had not been read
    reader = GGUFReader(path)
    # 2. A head that is tied to the embedding is often there a second time, in another precision. Both are
    # the same but for rounding (cosine over 0.9), where two that were trained apart are near 0.
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    some_D, others_D = embedding[:1000].flatten().float(), head[:1000].flatten().float()
    if head is not embedding and torch.cosine_similarity(some_D, others_D, dim=0) > 0.9:
        sizes = {tensor.name: tensor.n_bytes for tensor in reader.tensors}
        if sizes["output.weight"] > sizes["token_embd.weight"]:
            embedding.data.copy_(head.data)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    # 3. Some tokenizers are read without the <bos> that the file asks for, and without it Gemma writes
    # nonsense. As in llama.cpp, a file that says nothing asks for it if it is of SentencePiece ("llama").
    asks, kind = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "model"))
    asks_for_bos = asks.contents() if asks else kind and kind.contents() == "llama"
    if asks_for_bos and tokenizer.bos_token and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    return tokenizer, model.eval()
