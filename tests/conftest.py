"""What the tests share: the repository on the import path, a random model, one sandbox."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = "1"  # else each run of a model that is not shipped asks for CRUXEval

import torch  # noqa: E402

# a shell starts its background jobs with Ctrl-C ignored, and what the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings


def make_random_model(folder, seed=0, vocab_size=None, **changes):
    """A Qwen2 with random weights and a byte-level tokenizer, saved as any Hugging Face model is.

    Its generation_config asks for odd sampling, as those of real models do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(**{
        "vocab_size": vocab_size or len(tokenizer), "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "initializer_range": 0.1,
        "max_position_embeddings": 8192,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **changes})
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.2, top_k=3, top_p=0.5, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("random-model"))


@pytest.fixture
def policy(random_model):
    """The random model with LoRA whose B matrices are not zero, so that the adapter matters."""
    from azr import load_policy
    torch.manual_seed(1)
    policy = load_policy(random_model, lora_rank=4, device="cpu")
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return policy


@pytest.fixture(scope="session")
def executor():
    from executor import Executor
    with Executor(workers=2, timeout=5.0) as executor:
        yield executor
