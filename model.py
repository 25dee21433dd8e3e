"""The policy: load a causal language model, frame its prompts, and compute logprobs of its responses.

    load_policy        base model (4-bit on a GPU) + LoRA, checked against transformers
    save_policy        the trained weights, as a folder for other programs to load
    describe           one line on the trained weights and the precision of the rest
    check_lengths      whether prompt and response fit into the model's context
    Policy.encode      a question as token ids
    response_logprobs  the forward pass of the update

docs/models.md lists the model families that were tried, and how.

Tensors carry their axes as a suffix: B rows of a (micro-)batch, T prompt and response tokens, N response
tokens of all rows laid end to end, C a chunk of these, D hidden width, V vocabulary.
"""

import contextlib
import copy
import datetime
import functools
import inspect
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

# peft imports bitsandbytes, which on a CPU reports at every start that a faster kernel is missing
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import jinja2
import torch
import transformers
from peft import (LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights,
                  set_peft_model_state_dict)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig,
                          GenerationConfig, GenerationMixin, GgufConfig)
from transformers.pytorch_utils import Conv1D

from rewards import Rollout
from sampling import Sampler, attends_to_all, has_dense_attention
from tasks import CHAT_FRAME, FRAME, THINK, UsageError

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each of its retries
# drops the table of a file's keys. A higher level would not do: this logger then reports tensor parallelism
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "LOAD REPORT" not in record.getMessage())

TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny/longer": TINY / "longer"}
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "Meta": "meta-llama", "gemma": "google"}
# Errors that transformers, peft and safetensors raise for a wrong name, a damaged file, a missing package, or
# an unsupported model
LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError,
                  AssertionError, SafetensorError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMPTY_THOUGHT = re.compile(r"(<think>\s*)?</think>\s*$")
LOGITS = 20_000_000  # held at once in the update: 80 MB, or 131 tokens with Qwen2.5's vocabulary
ROUTING = {"router", "gate", "experts"}  # whole parts of a module's name, unlike `gate_proj`, for example
CHECK_TEXT = "def f(x):\n    return [x, x + 1]"  # check_policy reads half of it, and all of it,
CHECK_TOKENS = 8                                  # and samples this many tokens after each
FAMILIES = "docs/models.md lists the families that work"


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the facts in which model families differ."""

    model: torch.nn.Module   # the PeftModel, or the bare model when everything is trained
    causal: torch.nn.Module  # the transformers model inside: generate, backbone and head
    tokenizer: object
    end_ids: frozenset       # every token that ends a response (instruct models have several)
    pad_id: int              # never trained or attended to, because masks come from lengths, not ids
    chat: bool               # whether prompts go through the chat template
    shares_prompts: bool     # whether the update may read a prompt once for all its responses
    half: torch.dtype | None = None  # of autocast over fp32 weights, if all weights are trained
    date: datetime.date = field(default_factory=datetime.date.today)  # that chat templates may write

    @property
    def device(self):
        return self.causal.device

    def encode(self, question):
        """A question as token ids, framed for a base or an instruct model, with <think> opened."""
        if not self.chat:
            return self.encode_text(FRAME.replace("{question}", question))
        text = self.chat_text(CHAT_FRAME.replace("{question}", question))
        # a template whose thinking switch has another name may write an empty thought, which turns it off
        text = EMPTY_THOUGHT.sub("", text)
        if not text.rstrip().endswith(THINK):  # some templates open the thought themselves
            text += THINK
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_text(self, text):
        """A text as token ids, without a chat template, for the model to continue."""
        ids = self.tokenizer(text).input_ids
        while ids and ids[-1] in self.end_ids:  # some tokenizers append their end token to every text
            ids.pop()
        return ids

    def chat_text(self, question, thinking=True):
        """A user's turn and the start of the model's own, by its chat template. → text

        thinking: for templates that can switch it off. For example, those of Qwen3.5 up to 2B switch it off
        by default. None keeps the template's default.
        """
        turn = [{"role": "user", "content": question}]
        switches = {} if thinking is None else {"enable_thinking": thinking}
        return self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, **switches,
            strftime_now=self.date.strftime)  # in place of transformers' function of that name

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def text(self, response_ids):
        """A response as text, without the end token."""
        return self.decode([i for i in response_ids if i not in self.end_ids])

    def autocast(self):
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def trainable(self):
        """{name: parameter} of the trained weights."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


# --- loading ----------------------------------------------------------------------------------------

def resolve_model(name):
    """'Qwen2.5-3B' → 'Qwen/Qwen2.5-3B', 'tiny' → the shipped folder. Other names stay as they are."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    family = re.match("[A-Za-z]*", name)[0]
    if family in ORGANISATIONS and "/" not in name and not Path(name).exists():
        return f"{ORGANISATIONS[family]}/{name}"
    return name


def load_policy(name, quantize="auto", lora_rank=32, dtype="auto", device=None, adapter=None,
                trained=True, frame="long", date=None):
    """Load a base model for sampling and training. → Policy

    name: 'tiny' or 'tiny/longer' (shipped), a local folder, a GGUF file, or a Hugging Face name (see
    `resolve_model`). quantize: '4bit' (nf4, bitsandbytes), 'none', or 'auto': 4-bit on a GPU, with LoRA.
    dtype: 'bf16', 'fp16', 'fp32' or 'auto'. lora_rank: on the layers of `lora_layers`, with alpha twice the
    rank. 0 trains every weight that text passes through. adapter: a PEFT folder to start from instead of
    fresh LoRA weights. trained=False saves memory for inference. frame: only the frame "long" uses a model's
    chat template. date: "YYYY-MM-DD" for chat templates that write today's date, so that a run has a single
    one (None: today).
    Raises UsageError if the model is not available, fails `check_policy`, or options contradict each other.
    """
    if name in SHIPPED and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # because their matrices are too small for more threads
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":  # the GPU of this rank
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"torch cannot use device {device!r} ({torch.cuda.device_count()} GPUs visible); "
                         "use --device cpu or cuda:0, or launch fewer processes") from error
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # where graphs are captured and memory is counted
    if quantize == "auto":
        has_lora = bool(lora_rank or adapter)
        quantize = "4bit" if on_gpu and has_lora and not name.endswith(".gguf") else "none"
    try:
        date = datetime.date.fromisoformat(date) if date else datetime.date.today()
    except ValueError as error:
        raise UsageError(f"--date is {date!r}; it must be like 2026-03-31") from error
    if trained and quantize == "4bit" and not lora_rank and not adapter:
        raise UsageError("4-bit weights cannot be trained; use --lora-rank 32 or --quantize none")
    if dtype == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    half = None
    if trained and not (lora_rank or adapter) and dtype != "fp32":
        # a step of 1e-6 is lost in most bf16 weights, so they stay fp32, and autocast uses half precision
        dtype, half = "fp32", DTYPES[dtype]
    tokenizer, model = _load_base(name, DTYPES[dtype], quantize == "4bit", device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, turn_end(tokenizer)}
    ends -= {None}
    if not ends:
        raise UsageError(f"the model {name!r} has no end token; set eos_token in its tokenizer_config.json")
    # A model's own generation_config merges into every generate call (Qwen2.5: temperature 0.7,
    # top_p 0.8, top_k 20, repetition penalty 1.05), so that rollouts would not come from the trained policy.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=min(ends))
    with _loading(f"run the model {name!r}", FAMILIES):
        used = _modules_of_text(model, tokenizer)
        peft_model = model
        if adapter:
            with _loading(f"load the adapter {adapter}"):
                peft_model = _with_adapter(model, adapter)
        elif lora_rank:
            peft_model = _with_lora(model, used, lora_rank)
        else:
            _freeze_towers(model, used)
        policy = Policy(peft_model, model, tokenizer, frozenset(ends), min(ends),
                        chat=bool(tokenizer.chat_template) and frame == "long", half=half,
                        shares_prompts=name not in SHIPPED and attends_to_all(model.config),
                        date=date)
        if name not in SHIPPED:
            # acts in train mode only. prepare_model_for_kbit_training would also upcast to fp32
            model.gradient_checkpointing_enable({"use_reentrant": False})
            check_policy(policy, trained)
    return policy


def turn_end(tokenizer):
    """The token with which a chat template closes the model's turn. → id, or None if there is none

    Base models need it as well. For example, the files of Qwen's name <|endoftext|>, but after an answer they
    write the <|im_end|> of their template. If a turn ends with ordinary text, there is no such token.
    """
    if not tokenizer.chat_template:
        return None
    answer = "Fine."
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:  # the template cannot render answers
        return None
    _, found, closing = text.rpartition(answer)
    longest, end = 0, None
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if found and closing.lstrip().startswith(token.content) and len(token.content) > longest:
            longest, end = len(token.content), token_id
    return end


def _load_base(name, dtype, in_4bit, device):
    """→ (tokenizer, transformers model). Raises UsageError."""
    source = resolve_model(name)
    with _loading(f"load the model {name!r} ({source})", FAMILIES):
        if source.endswith(".gguf"):
            if in_4bit:
                raise UsageError("a GGUF file is unpacked when it is loaded: use --quantize none, or make a "
                                 f"folder of it: python scripts/real_model.py --model {source} --out FOLDER")
            tokenizer, model = read_gguf(Path(source), dtype, device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = _from_pretrained(source, dtype, in_4bit, device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # added tokens that occur in no text may lie beyond it, for example Gemma 3's <image_soft_token>
    tokens = max(tokenizer.vocab_size, (tokenizer.eos_token_id or 0) + 1)
    if tokens > vocabulary:
        raise UsageError(f"the tokenizer of {name!r} has {tokens} tokens and its model {vocabulary}: they "
                         "belong to different models; give a folder with a matching pair")
    for module in model.modules():
        if device.type == "cpu" and hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack its weights for inference, and treat them as unpacked in training
            module.support_avx512bf16_for_cpu = False
        # with dropout or noise in a router, the trained policy would not be the one that sampled
        for attribute, value in [*vars(module).items()]:
            if isinstance(value, float) and ("drop" in attribute or isinstance(module, torch.nn.Dropout)):
                setattr(module, attribute, 0.0)
            if "jitter" in attribute:  # not set to zero, because PhiMoE also reads it in eval mode
                module.train = lambda mode=True: None
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2. SDPA would ignore it
        model.set_attn_implementation("eager")
    elif config._attn_implementation == "sdpa" and has_dense_attention(config):
        model.set_attn_implementation("grouped_sdpa")
    return tokenizer, model


def _from_pretrained(source, dtype, in_4bit, device):
    """Load a folder or a model of the hub, as the class that its checkpoint names. → transformers model"""
    config = AutoConfig.from_pretrained(source)
    if config.is_encoder_decoder:
        raise UsageError(f"{source} has an encoder; only causal language models can be trained")
    quantized = (getattr(config, "quantization_config", None) or {}).get("quant_method", "bitsandbytes")
    if in_4bit and quantized != "bitsandbytes":
        raise UsageError(f"{source} is quantized already ({quantized}): use --quantize none")
    # AutoModelForCausalLM does not know some multimodal models. Of others it loads the text model, whose
    # weights have other names, so that an adapter of it would have no effect on the class named here
    named = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    if not issubclass(named, GenerationMixin):
        named = AutoModelForCausalLM
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype)
    model, found = named.from_pretrained(
        source, dtype=dtype, device_map={"": device}, output_loading_info=True,
        quantization_config=nf4 if in_4bit else None, ignore_mismatched_sizes=True)  # raised below
    if found["missing_keys"]:  # transformers would use random ones
        raise OSError(f"its files lack {len(found['missing_keys'])} of its weights.")
    for weight, in_file, in_config in sorted(found["mismatched_keys"]):
        raise OSError(f"{weight} is {tuple(in_file)} in its files and {tuple(in_config)} by its config.")
    return model.eval()


def read_gguf(path, dtype, device="cpu"):
    """A GGUF file, with its weights unpacked to `dtype`. → (tokenizer, transformers model)

    transformers reads it, and three of its errors are corrected here.
    """
    # 1. Unless told to unpack everything, it keeps weights quantized where it has kernels for their format,
    # and always marks the model as quantized, which then also holds for the saved model.
    unpacked = GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(path.resolve().parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, device_map={"": device},
                                                 quantization_config=unpacked)
    from gguf import GGUFReader  # installed, because reading the tokenizer needs it
    reader = GGUFReader(path)
    # 2. Files often hold a second copy of a tied head, in another precision. Then head and embedding differ
    # only by rounding (cosine over 0.9), whereas two that were trained separately have a cosine near 0.
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    some_D, others_D = embedding[:1000].flatten().float(), head[:1000].flatten().float()
    if head is not embedding and torch.cosine_similarity(some_D, others_D, dim=0) > 0.9:
        sizes = {tensor.name: tensor.n_bytes for tensor in reader.tensors}
        if sizes["output.weight"] > sizes["token_embd.weight"]:
            embedding.data.copy_(head.data)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    # 3. SentencePiece tokenizers are read without the <bos> that the file asks for. If a file does not say,
    # SentencePiece (there called "llama") counts as asking for it, as in llama.cpp.
    asks, kind = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "model"))
    asks_for_bos = asks.contents() if asks else kind and kind.contents() == "llama"
    if asks_for_bos and tokenizer.bos_token and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True
    return tokenizer, model.eval()


@contextlib.contextmanager
def _loading(action, advice=""):
    """Turns the libraries' errors into a UsageError of one line: cannot {action}, the reason, {advice}."""
    try:
        yield
    except UsageError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError(f"cannot {action}: it does not fit into the GPU; try 4 bits and LoRA, "
                         "or a smaller model") from error
    except LOADING_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ImportError):
            advice = "Install the package that it names"
        elif isinstance(error, (OSError, SafetensorError)) and advice:
            advice = ("Check the name and the network, or download it elsewhere and give the folder: "
                      "--model PATH")
        raise UsageError(f"cannot {action}: {reason.rstrip('.')}. {advice}".rstrip(". ")) from error


# --- trained weights --------------------------------------------------------------------------------

@torch.no_grad()
def _modules_of_text(model, tokenizer):
    """{module: whether its output is one tensor} of all modules that a plain forward pass on text runs."""
    used = {}

    def note(module, inputs, output):
        used[module] = isinstance(output, torch.Tensor)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model(input_ids=torch.tensor([tokenizer(CHECK_TEXT).input_ids], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return used


def lora_layers(model, used):
    """The names of the linear layers that get LoRA, in the model's order. → [name]

    All but the output head, routers and routed experts, layers that text does not pass through (vision and
    audio towers), and those whose weight the surrounding module reads directly, so that LoRA would have no
    effect. used: see `_modules_of_text`. Experts are left out because transformers stores those of a layer as
    one parameter, and PEFT would add its update to all of it at every sampled token.
    """
    names = []
    for name, module in model.named_modules():
        is_layer = isinstance(module, (torch.nn.Linear, Conv1D)) and used.get(module, False)
        is_left_out = module is model.get_output_embeddings() or ROUTING & {*name.split(".")}
        if is_layer and not is_left_out and not _is_read_past(model, name):
            names.append(name)
    return names


source_of = functools.cache(inspect.getsource)  # cached, because it reads a whole file each time


def _is_read_past(model, name):
    """Whether the module around a layer reads its weight directly, for example for a fused kernel (Mamba)."""
    parent, _, leaf = name.rpartition(".")
    source = source_of(type(model.get_submodule(parent)))
    # reading dtype and the like does not use the weight, and Bloom's slices only serve exact rounding
    return bool(re.search(rf"self\.{leaf}\.weight\b(?!\.dtype|\.device|\.shape|\[)", source))


def _with_lora(model, used, rank):
    """The model with fresh LoRA weights. → PeftModel"""
    names = lora_layers(model, used)
    leaves = {name.rpartition(".")[2] for name in names}
    namesakes = [name for name, _ in model.named_modules()
                 if name.rpartition(".")[2] in leaves and name not in names]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=leaves,
                        exclude_modules=namesakes or None, task_type="CAUSAL_LM")
    # In some mixtures of experts, PEFT takes names such as up_proj to mean the experts, as in transformers 4.
    # There, layers with these names are given as parameters instead, which is not possible in 4 bits.
    renamed = copy.deepcopy(config)
    convert_peft_config_for_transformers(renamed, model, None)
    if renamed.target_parameters:
        config.target_modules = leaves & renamed.target_modules
        taken = [name for name in names if name.rpartition(".")[2] not in config.target_modules
                 and not _is_4bit(model.get_submodule(name).weight)]
        config.target_parameters = sorted({re.search(r"\w+\.\w+$", name)[0] + ".weight" for name in taken})
    peft_model = get_peft_model(model, config)
    _take_up(peft_model, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    return peft_model


def _with_adapter(model, folder):
    """The model with the LoRA weights of a PEFT folder. → PeftModel"""
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    peft_model = get_peft_model(model, config)
    _take_up(peft_model, load_peft_weights(folder, device=str(model.device)))
    return peft_model


def _take_up(peft_model, weights):
    """Load weights by their names in a file. Raises ValueError unless they are exactly the trained ones."""
    result = set_peft_model_state_dict(peft_model, weights)
    trained = {name for name, weight in peft_model.named_parameters() if weight.requires_grad}
    lost = sorted(trained & {*result.missing_keys})
    strange = sorted(result.unexpected_keys)
    if lost or strange:
        raise ValueError(f"{len(strange)} of the {len(weights)} weights in the adapter's file have no place "
                         f"in this model, and {len(lost)} of the {len(trained)} that it trains are not there "
                         f"(for example {[*lost, *strange][0]})")


def _freeze_towers(model, used):
    """Freeze the parts that text does not pass through, such as a vision tower."""
    for part in model.base_model.children():
        if not any(module in used for module in part.modules()):
            part.requires_grad_(False)


def _is_4bit(weight):
    return type(weight).__name__ == "Params4bit"


def count_weights(model):
    """The weights of a model, also of those that are packed in 4 bits."""
    count = 0
    for weight in model.parameters():
        packed = 2 * weight.element_size() if _is_4bit(weight) else 1
        count += packed * weight.numel()
    return count


def describe(policy):
    """The trained weights, and the precision of the rest. → one line

    >>> describe(policy)      # doctest: +SKIP
    'LoRA of rank 8 on down_proj, q_proj, v_proj: 51,456 weights'
    """
    trained = policy.trainable()
    count = sum(weight.numel() for weight in trained.values())
    if policy.model is policy.causal:
        return f"full fine-tuning of {count:,} weights"
    # the last part of a layer's name that is not a number
    layers = {re.search(r"(\w+)(\.\d+)*\.lora_", name)[1] for name in trained}
    rank = policy.model.peft_config["default"].r
    line = f"LoRA of rank {rank} on {', '.join(sorted(layers))}: {count:,} weights"
    held = policy.causal.get_memory_footprint() / 1e9
    in_4bit = sum(weight.nbytes for weight in policy.causal.parameters() if _is_4bit(weight)) / 1e9
    if in_4bit:
        line += f"; of {held:.1f} GB that it holds {in_4bit:.1f} GB are in 4 bits"
    return line


# --- checks -----------------------------------------------------------------------------------------

@torch.no_grad()
def check_policy(policy, trained=True):
    """Raises UsageError unless this code runs the model correctly.

    Prompts of unequal length are continued greedily, and compared with a plain forward pass of each row
    alone: the tokens, the sampler's logprobs and, if `trained`, those of `response_logprobs` in eval mode and
    in train mode. The mean difference per token must be within rounding.
    """
    ids = policy.tokenizer(CHECK_TEXT).input_ids
    prompts = [ids[:len(ids) // 2], ids]
    # two copies of each, because the sampler reads a prompt once for both
    sampled = iter(Sampler(policy, rows=4).generate(prompts, CHECK_TOKENS, copies=2, temperature=0))
    rows, own, best, sampler_logps, largest = [], [], [], [], 0.0
    for prompt in prompts:
        copies = []
        for response, logps in (next(sampled), next(sampled)):
            if not copies or response != copies[0].response_ids:
                with policy.autocast():
                    text_1T = torch.tensor([prompt + response], device=policy.device)
                    logits_TV = policy.causal(text_1T).logits[0]
                logps_NV = torch.log_softmax(logits_TV[len(prompt) - 1:-1].float(), -1)
            copies.append(Rollout("solve", "", prompt, response))
            sampler_logps += logps
            own.append(logps_NV.gather(1, torch.tensor(response, device=policy.device)[:, None])[:, 0])
            best.append(logps_NV.max(1).values)
            largest = max(largest, float(logits_TV.abs().max()))
        # as in the update, where a row may hold several responses to a prompt
        rows += [copies] if policy.shares_prompts else [[rollout] for rollout in copies]
    own_N, best_N = torch.cat(own), torch.cat(best)
    rounding = 0.002 + 3 * torch.finfo(policy.half or policy.causal.dtype).eps * largest

    def compare(what, logps_N, other_N, advice):
        gap = float((logps_N - other_N).abs().mean())
        if not gap < rounding:  # NaN, too
            raise UsageError(f"this model cannot be used: {what} are {gap:.2g} nats a token off those of a "
                             f"plain forward pass; {advice}")

    other_model = f"give another model ({FAMILIES})"
    compare("the likeliest tokens that the sampler finds", own_N, best_N, other_model)
    compare("logprobs of the sampler", torch.tensor(sampler_logps).to(own_N), own_N, other_model)
    if not trained:
        return
    for mode in ("eval", "train"):
        policy.causal.train(mode == "train")
        with policy.autocast():
            logps_N = response_logprobs(policy, rows)[0]
        compare(f"logprobs in {mode} mode", logps_N, own_N, "it changes logits, or draws random numbers, in "
                "a way that response_logprobs in model.py does not know; add it there")
    policy.causal.eval()


def check_lengths(policy, max_prompt, max_response):
    """Raises UsageError if prompt and response may be longer than the model's context.

    The context is the number of positions in its config. If rotary embeddings change with the longest row
    (longrope, dynamic), it is the length at which they change, because beyond it the logprobs of a row would
    depend on the other rows of its batch.
    """
    config = policy.causal.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return
    reason = f"the context of this model has {limit} tokens"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *ropes.values()]:  # one of all layers, or one per kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic"):
            limit = min(limit, rope.get("original_max_position_embeddings") or limit)
            reason = f"rotary embeddings of this model change for all rows once one is over {limit} tokens"
    if max_prompt + max_response > limit:
        raise UsageError(f"{reason}: --max-prompt {max_prompt} and --max-response {max_response} together "
                         "must not be more")


# --- saving -----------------------------------------------------------------------------------------

def save_policy(policy, folder):
    """Write the trained weights into an empty folder: a PEFT adapter, or the full model with its tokenizer.

    Raises UsageError unless every trained weight is in the files and can be loaded again.
    """
    # PEFT's "auto" would ask the hub whether the vocabulary has grown. A bare model ignores the option
    policy.model.save_pretrained(folder, save_embedding_layers=False)
    trained = policy.trainable()
    with _loading(f"load what was written to {folder}"):
        if policy.model is policy.causal:
            policy.tokenizer.save_pretrained(folder)
            # names may differ in the files, because loading maps them: the size tells whether all are there
            written = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            if written < sum(weight.nbytes for weight in policy.causal.parameters()):
                raise ValueError(f"{written} bytes are less than the model has.")
        else:
            before = {name: weight.clone() for name, weight in trained.items()}
            _take_up(policy.model, load_peft_weights(folder, device=str(policy.device)))
            changed = [name for name in trained if not torch.equal(trained[name], before[name])]
            if changed:
                raise ValueError(f"{len(changed)} weights come back as other numbers, such as {changed[0]}")


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
        # logits are dropped and recomputed in the backward pass, because [N, V] of them would fill the memory
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

    A row is a prompt followed by all responses to it. If there are several, a mask hides them from each
    other, and the positions of each continue from the end of the prompt.
    """
    layouts = [_layout(row) for row in rows]
    ids_BT = _padded(policy, [layout.ids for layout in layouts], policy.pad_id)
    options = {}  # padding is on the right, where a causal model never looks: a mask would only cost time
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
    """A prompt followed by the responses of a row's rollouts. → _Layout"""
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
