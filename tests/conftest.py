"""What the tests share: the repository on the import path, a random model, one sandbox."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = "1"  # else each run of a model that is not shipped asks for CRUXEval

import torch  # noqa: E402

from sampling import AnySampler  # noqa: E402

# a shell starts its background jobs with Ctrl-C ignored, and what the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["azr", "eval", "parallel", "pytest", "train", "torch.utils.tensorboard",
                              "transformers.models.qwen2.modeling_qwen2"])


class Forked:
    """A process that runs `code`, with those parts of subprocess.Popen that the tests use. It is forked from one
    that has imported what takes seconds to import. file_size: bytes that a file may have at most."""

    def __init__(self, code, arguments=(), environment=(), file_size=None):
        readers, writers = zip(*(FORKS.Pipe(duplex=False) for _ in range(2)))
        self.process = FORKS.Process(target=live, args=(code, [*map(str, arguments)], dict(environment), file_size, *writers))
        self.process.start()
        self.pid, self.texts = self.process.pid, ["", ""]
        for writer in writers:
            writer.close()
        self.threads = [threading.Thread(target=self.read, args=each, daemon=True) for each in enumerate(readers)]
        for thread in self.threads:
            thread.start()

    def read(self, place, reader):
        with open(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as file:
            self.texts[place] = file.read()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def communicate(self, timeout=240):
        """What it wrote to (stdout, stderr), once it has ended."""
        for end in (self.process, *self.threads):
            end.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return tuple(self.texts)

    def wait(self):
        self.communicate()
        return self.returncode

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)


def live(code, arguments, environment, file_size, *writers):
    """The life of a Forked process."""
    os.setsid()
    for fd, writer in zip((1, 2), writers):
        os.dup2(writer.fileno(), fd)
        writer.close()
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})


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


class Scripted(AnySampler):
    """A stand-in for a sampler: reply(prompt) is the text that the model answers. All else is real."""

    def __init__(self, policy, reply):
        self.policy, self.reply = policy, reply

    def generate(self, prompts, max_tokens, copies=1, temperature=1.0):
        responses = []
        for prompt in prompts:
            for _ in range(copies):
                ids = self.policy.tokenizer(self.reply(self.policy.decode(prompt))).input_ids
                responses.append((ids, [-1.0] * len(ids)))
        return responses


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("random-model"))


@pytest.fixture
def policy(random_model):
    """The random model with LoRA whose B matrices are not zero, so that the adapter matters."""
    from model import load_policy
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
