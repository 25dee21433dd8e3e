"""The policy: load a causal language model, frame its prompts, and take the logprobs of its responses.

    load_policy        base model (4-bit on a GPU) + LoRA, with a check that this code reads it right
    Policy.encode      a question as token ids
    response_logprobs  the forward pass of the update

Tensors carry their axes as a suffix: B rows of a (micro-)batch, T prompt and response tokens, N response
tokens of all rows laid end to end, C a chunk of these, D hidden width, V vocabulary.
"""

import contextlib
import datetime
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

# peft imports bitsandbytes, which on a CPU says at every start that a faster kernel is not installed
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import jinja2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from rewards import Rollout
from sampling import attends_to_all
from tasks import CHAT_FRAME, FRAME, THINK, UsageError

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each of its retries

TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny/longer": TINY / "longer"}
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "Meta": "meta-llama", "gemma": "google"}
# All that transformers, peft and safetensors raise for a wrong name or a damaged file
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMPTY_THOUGHT = re.compile(r"(<think>\s*)?</think>\s*$")
LOGITS = 39_000_000  # at once in the update: 160 MB; 256 tokens of Qwen2.5's vocabulary


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the facts in which model families differ."""

    model: torch.nn.Module   # the PeftModel, or the bare model when everything is trained
    causal: torch.nn.Module  # the transformers model inside: generate, backbone and head
    tokenizer: object
    end_ids: frozenset       # every token that ends a response (instruct models have several)
    pad_id: int              # never trained or attended to: masks come from lengths, not from ids
    chat: bool               # whether prompts go through the chat template
    shares_prompts: bool     # whether the update may read a prompt once for all its responses
    half: torch.dtype | None = None  # in which fp32 weights are computed with, when all are trained
    date: datetime.date = field(default_factory=datetime.date.today)  # for chat templates that write today's

    @property
    def device(self):
        return self.causal.device

    def encode(self, question):
        """A question as token ids, framed for a base or an instruct model, with <think> opened."""
        if not self.chat:
            return self.encode_text(FRAME.replace("{question}", question))
        text = self.chat_text(CHAT_FRAME.replace("{question}", question))
        # a template whose switch has another name may write an empty thought, which says not to think
        text = EMPTY_THOUGHT.sub("", text)
        if not text.rstrip().endswith(THINK):  # some templates open the thought themselves
            text += THINK
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_text(self, text):
        """A text without a chat template as token ids, for the model to go on with."""
        ids = self.tokenizer(text).input_ids
        while ids and ids[-1] in self.end_ids:  # some tokenizers append their end token to every text
            ids.pop()
        return ids

    def chat_text(self, question, thinking=True):
        """A user's turn and the start of the model's own, by its chat template. → text

        thinking: for templates that can switch it off; those of Qwen3.5 up to 2B do so by default.
        """
        turn = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking,
            strftime_now=self.date.strftime)  # in place of transformers' function of that name

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def text(self, response_ids):
        """A response as text, without the end token."""
        return self.decode([i for i in response_ids if i not in self.end_ids])

    def autocast(self):
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def trainable(self):
        """{name: parameter} of all that the update changes."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


# --- loading ----------------------------------------------------------------------------------------

def resolve_model(name):
    """'Qwen2.5-3B' → 'Qwen/Qwen2.5-3B'; 'tiny' → the shipped folder; paths and full names as they are."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    family = re.match("[A-Za-z]*", name)[0]
    if family in ORGANISATIONS and "/" not in name and not Path(name).exists():
        return f"{ORGANISATIONS[family]}/{name}"
    return name


def load_policy(name, quantize="auto", lora_rank=32, dtype="auto", device=None, adapter=None,
                trained=True, frame="long", date=None):
    """Load a base model for sampling and training. → Policy

    name: 'tiny' or 'tiny/longer' (shipped), a local folder, or a Hugging Face name (see `resolve_model`).
    quantize: '4bit' (nf4, bitsandbytes), 'none', or 'auto': 4-bit on a GPU, with LoRA. dtype: 'bf16', 'fp16',
    'fp32' or 'auto'. lora_rank: on all linear layers, alpha twice the rank; 0 trains every weight.
    adapter: a PEFT folder to start from instead of fresh LoRA weights. trained=False saves memory where
    only answers are wanted. frame: a model with a chat template uses it for the frame "long" alone.
    date: "YYYY-MM-DD" for chat templates that write today's date, so that a run has one; None: today.
    Raises UsageError if the model cannot be had or the choices do not fit together.
    """
    if name in SHIPPED and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # their matrices are too small for more
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":  # that of this rank
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"{device} is no device that torch can use here, with {torch.cuda.device_count()} "
                         "GPUs; give --device cuda:0 or cpu, or start fewer ranks") from error
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # where graphs are captured and memory is counted
    if quantize == "auto":
        quantize = "4bit" if on_gpu and lora_rank else "none"
    if trained and quantize == "4bit" and not lora_rank and not adapter:
        raise UsageError("4-bit weights cannot be trained; use --lora-rank 32 or --quantize none")
    if dtype == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    half = None
    if trained and not (lora_rank or adapter) and dtype != "fp32":
        # a step of 1e-6 is lost in most bf16 weights: they stay fp32, and are computed with in half precision
        dtype, half = "fp32", DTYPES[dtype]
    tokenizer, model = _load_base(name, DTYPES[dtype], quantize == "4bit", device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, turn_end(tokenizer)}
    ends -= {None}
    if not ends:
        raise UsageError(f"the model {name!r} has no end token; set eos_token in its tokenizer_config.json")
    # A model's own generation_config merges into every generate call (Qwen2.5: temperature 0.7,
    # top_p 0.8, top_k 20, repetition penalty 1.05), and rollouts would not be from the trained policy.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=min(ends))
    peft_model = model
    if adapter:
        with _loading(f"the adapter {adapter}"):
            peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif lora_rank:  # "all-linear" leaves the output head out, so tied embeddings stay tied
        peft_model = get_peft_model(model, LoraConfig(
            r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM"))
    if name not in SHIPPED:  # in train mode only; prepare_model_for_kbit_training would also upcast to fp32
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(peft_model, model, tokenizer, frozenset(ends), min(ends),
                    chat=bool(tokenizer.chat_template) and frame == "long", half=half,
                    shares_prompts=name not in SHIPPED and attends_to_all(model.config),
                    date=datetime.date.fromisoformat(date) if date else datetime.date.today())
    if trained and name not in SHIPPED:
        _check_logits(policy)
    return policy


def turn_end(tokenizer):
    """The token with which a chat template closes the model's turn. → id, or None where there is no such token

    Base models need it as well. By their files Qwen's end with <|endoftext|>, but behind an answer they write
    the <|im_end|> of their template. A closing that is ordinary text is no token.
    """
    if not tokenizer.chat_template:
        return None
    answer = "Fine."
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:  # it renders no answers
        return None
    _, found, closing = text.rpartition(answer)
    longest, end = 0, None
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if found and closing.lstrip().startswith(token.content) and len(token.content) > longest:
            longest, end = len(token.content), token_id
    return end


@torch.no_grad()
def _check_logits(policy):
    """Raises UsageError if the model does more to its logits than `response_logprobs` knows of."""
    ids = [*range(8)]
    with policy.autocast():
        ours_N = response_logprobs(policy, [[Rollout("solve", "", ids[:1], ids[1:])]])[0]
        logits_NV = policy.causal(torch.tensor([ids], device=policy.device)).logits[0, :-1].float()
    own_N = torch.log_softmax(logits_NV, -1).diagonal(1)
    rounding = 0.02 * float(logits_NV.abs().max())  # a few times that of bf16
    if (gap := float((ours_N - own_N).abs().max())) > 0.01 + rounding:
        raise UsageError(f"logprobs of this model are {gap:.2g} nats off: it changes logits in a way that "
                         "response_logprobs in model.py does not know; add it there")


def _load_base(name, dtype, in_4bit, device):
    """→ (tokenizer, transformers model). Raises UsageError."""
    source = resolve_model(name)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype)
    with _loading(f"the model {name!r} ({source})", "Check the name and the network, or download it "
                  "elsewhere and give the folder: --model PATH"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map={"": device}, output_loading_info=True,
            quantization_config=nf4 if in_4bit else None)
        if found["missing_keys"]:  # transformers would make random ones
            raise ValueError(f"its files lack {len(found['missing_keys'])} of its weights.")
    if in_4bit and device.type == "cpu" and any(
            type(module).__name__ == "Linear4bit" and module.bias is not None for module in model.modules()):
        raise UsageError(f"--quantize 4bit: on a CPU layers with biases, as those of {name!r}, cannot be "
                         "trained in 4 bits; use --quantize none")
    for module in model.modules():  # with dropout, what trains would not be the policy that samples
        for name, value in [*vars(module).items()]:
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2; SDPA would leave it out
        model.set_attn_implementation("eager")
    elif config._attn_implementation == "sdpa":
        model.set_attn_implementation("grouped_sdpa")
    return tokenizer, model.eval()


@contextlib.contextmanager
def _loading(what, advice=""):
    """Turns what the libraries raise inside into a UsageError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"{what} does not fit into the GPU; try 4 bits and LoRA, "
                         "or a smaller model") from error
    except LOADING_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot load {what}: {reason} {advice}".rstrip()) from error


# --- logprobs ---------------------------------------------------------------------------------------

def response_logprobs(policy, rows, chunk=None):
    """Logprob and entropy of every response token, given all before it. → logps_N, entropies_N

    rows: lists of rollouts with one prompt, of which only prompt_ids and response_ids are read (see
    `azr.micro_batches`). N runs over rows, over their rollouts and over the response tokens of these, as
    `response_tokens` does. Temperature 1, in nats, fp32, both with gradients. Logits never exist for more
    than `chunk` tokens (None: as many as LOGITS allows), forward or backward: the output head runs on the
    hidden states chunk by chunk.
    """
    config = policy.causal.config.get_text_config()
    scale = 1 / getattr(config, "logits_scaling", 1)  # Granite
    if "cohere" in config.model_type:
        scale = config.logit_scale or 1
    hidden_ND = _hidden_states(policy, rows) * scale
    targets_N = torch.tensor(response_tokens(rows), device=policy.device)
    head = policy.causal.get_output_embeddings()
    chunk = chunk or min(1024, max(1, LOGITS // len(head.weight)))
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    logps, entropies = [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk)):
        # logits are dropped and computed again in backward, because [N, V] of them would fill the memory
        logps_C, entropies_C = checkpoint(_head_logprobs, head, hidden_CD, targets_C, softcap,
                                          use_reentrant=False)
        logps.append(logps_C)
        entropies.append(entropies_C)
    return torch.cat(logps), torch.cat(entropies)


def response_tokens(rows):
    """The response tokens of rows of rollouts, laid end to end: the order of the axis N. → [id]"""
    tokens = []
    for row in rows:
        for rollout in row:
            tokens += rollout.response_ids
    return tokens


def _head_logprobs(head, hidden_CD, targets_C, softcap):
    logits_CV = head(hidden_CD).float()
    if softcap:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    logps_CV = torch.log_softmax(logits_CV, -1)
    entropies_C = -(logps_CV.exp() * logps_CV).sum(-1)
    return logps_CV.gather(-1, targets_C[:, None])[:, 0], entropies_C


def _hidden_states(policy, rows):
    """The last layer's output where the response tokens are predicted. → hidden_ND

    In a row stand a prompt and all responses to it, one behind the other. Where there are several, a mask
    hides them from each other, and the positions of each go on from the prompt's end.
    """
    layouts = [_layout(row) for row in rows]
    ids_BT = _padded(policy, [layout.ids for layout in layouts], policy.pad_id)
    options = {}  # a causal model never looks to the right: padding needs no mask, which would cost time
    if any(len(row) > 1 for row in rows):
        owners_BT = _padded(policy, [layout.owners for layout in layouts], -1)
        same_owner_BTT = owners_BT[:, None] == owners_BT[:, :, None]
        of_prompt_B1T = (owners_BT == 0)[:, None]
        visible_BTT = (of_prompt_B1T | same_owner_BTT).tril()
        options = {"attention_mask": visible_BTT[:, None],
                   "position_ids": _padded(policy, [layout.positions for layout in layouts], 0)}
    hidden_BTD = policy.causal.base_model(input_ids=ids_BT, use_cache=False, **options).last_hidden_state
    columns = [torch.tensor(layout.sources, device=policy.device) for layout in layouts]
    return torch.cat([hidden_TD[columns_N] for hidden_TD, columns_N in zip(hidden_BTD, columns)])


@dataclass
class _Layout:
    """One row of a forward pass, token by token."""

    ids: list
    positions: list
    owners: list   # 0 for a token of the prompt, k for one of the k-th response
    sources: list  # for each response token, the column whose output predicts it


def _layout(row):
    """A prompt, and behind it the responses of a row's rollouts. → _Layout"""
    prompt = row[0].prompt_ids
    width = len(prompt)
    layout = _Layout([*prompt], [*range(width)], [0] * width, [])
    for owner, rollout in enumerate(row, 1):
        start, length = len(layout.ids), len(rollout.response_ids)
        layout.ids += rollout.response_ids
        layout.positions += range(width, width + length)
        layout.owners += [owner] * length
        # the prompt's last token predicts the first of a response, and each token the next
        layout.sources += [width - 1, *range(start, start + length - 1)]
    return layout


def _padded(policy, lists, padding):
    tensors = [torch.tensor(values, device=policy.device) for values in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=padding)
