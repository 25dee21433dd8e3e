"""One policy, two roles: load it, let it propose, let it solve, and update it with TRR++.

    load_policy   base model (4-bit on a GPU) + LoRA
    propose       Algorithm 1, first half of a step: new tasks, validated, with their learnability
    solve         Algorithm 1, second half: answers, judged
    trr_update    Algorithm 1, last line: one clipped policy-gradient step over all rollouts
    heldout_accuracy   what it has learned: greedy answers to tasks that it never trained on

Tensors carry their axes as a suffix: B rows of a (micro-)batch, P prompt tokens, T prompt and
response tokens, N response tokens of all rows laid end to end, D hidden width, V vocabulary.
`logps_N` is one logprob for each trained token.

Token ids are stored when they are sampled and never made again from text: what is trained is exactly
what was sampled.
"""

import contextlib
import ctypes
import logging
import math
import os
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

# peft imports bitsandbytes, which on a CPU says at every start that a faster kernel is not installed
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from parallel import share, spread, sum_gradients
from rewards import Verdict, blame, composite_reward, judge, learnability, mean_error
from sampling import attends_to_all, decoded_logprobs, free_memory, generate, inner_width
from tasks import (CHAT_FRAME, FRAME, KINDS, THINK, ZERO_TRIPLET, Task, UsageError, complexity, edit_distance,
                   parse_answer, parse_proposal, propose_prompt, solve_prompt, within_limits)

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each of its retries

TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny/longer": TINY / "longer"}
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "Meta": "meta-llama", "gemma": "google"}
# All that transformers, peft and safetensors raise for a wrong name or a damaged file
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
M_MMAP_THRESHOLD = -3  # of malloc.h
CPU_TOKENS = 2048  # of a micro-batch at most: more are no faster, and few rows of unequal length are padded
LOGITS = 39_000_000  # at once in the update: 160 MB; 256 tokens of Qwen2.5's vocabulary


@dataclass
class Rollout:
    """One prompt, one sampled response, and what became of it."""

    role: str                       # propose | solve
    type: str                       # deduction | abduction | induction
    prompt_ids: list
    response_ids: list = field(default_factory=list)  # up to the end token, or what closes </answer>
    response: str = ""              # the same as text
    prompt: str = ""
    verdict: Verdict | None = None
    reason: str = ""                # of a verdict that needs one, such as "unsafe: imports os"
    task: Task | None = None        # what is solved, or what a valid proposal became
    program: str = ""               # what a proposer without a program of its own builds on
    references: list = field(default_factory=list)  # programs that a proposer was shown
    solve_rate: float | None = None  # of a new task: share of the n estimates that were correct
    reward: float = 0.0             # eq. 6
    advantage: float = 0.0          # eq. 8
    traits: dict = field(default_factory=dict)  # of a valid proposal: what diversity/… is the mean of

    @property
    def tokens(self):
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def truncated(self):
        """Whether it ran into the response limit."""
        return self.verdict is Verdict.TRUNCATED

    @property
    def well_formed(self):
        return self.verdict not in (Verdict.MALFORMED, Verdict.TRUNCATED)


# --- the policy -----------------------------------------------------------------------------------

@dataclass
class Policy:
    """A causal LM, its tokenizer, and the few facts in which model families differ."""

    model: torch.nn.Module   # the PeftModel, or the bare model when everything is trained
    causal: torch.nn.Module  # the transformers model inside: generate, backbone and head
    tokenizer: object
    end_ids: frozenset       # every token that ends a response (instruct models have several)
    pad_id: int              # never trained or attended to: masks come from lengths, not from ids
    chat: bool               # whether prompts go through the chat template
    rows: int = 0            # rows generated at once; 0: from free memory
    frame: str = "long"      # the long question, or "examples" before a short one: see tasks.propose_prompt
    shares_prompts: bool = False  # the update reads a prompt once for all its responses: see `micro_batches`
    mean_tokens: float = math.inf   # of the responses sampled last, by which rows are planned
    micro_tokens: float = math.inf  # tokens of a micro-batch that fit, where cfg.micro_tokens are too many
    half: torch.dtype | None = None  # in which fp32 weights are computed with, when all are trained
    clock: Counter = field(default_factory=Counter)  # seconds by phase, and tokens sampled

    @property
    def device(self):
        return self.causal.device

    def encode(self, question):
        """A question as token ids, framed for a base or an instruct model, with <think> opened."""
        if not self.chat:
            return self.tokenizer(FRAME.replace("{question}", question)).input_ids
        turn = [{"role": "user", "content": CHAT_FRAME.replace("{question}", question)}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if not text.rstrip().endswith(THINK):  # some templates open the thought themselves
            text += THINK
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def text(self, response_ids):
        """A response as text, without the end token."""
        return self.decode([i for i in response_ids if i not in self.end_ids])

    @contextlib.contextmanager
    def timed(self, phase):
        """Adds the seconds spent inside to clock[phase]."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.clock[phase] += time.perf_counter() - start

    def autocast(self):
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def trainable(self):
        """{name: parameter} of all that the update changes."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def resolve_model(name):
    """'Qwen2.5-3B' → 'Qwen/Qwen2.5-3B'; 'tiny' → the shipped folder; paths and full names as they are."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    family = re.match("[A-Za-z]*", name)[0]
    if family in ORGANISATIONS and "/" not in name and not Path(name).exists():
        return f"{ORGANISATIONS[family]}/{name}"
    return name


def load_policy(name, quantize="auto", lora_rank=32, dtype="auto", device=None, adapter=None, rows=0,
                trained=True, frame="long"):
    """Load a base model for sampling and training. → Policy

    name: 'tiny' or 'tiny/longer' (shipped), a local folder, or a Hugging Face name (see `resolve_model`).
    quantize: '4bit' (nf4, bitsandbytes), 'none', or 'auto': 4-bit on a GPU, with LoRA. dtype: 'bf16', 'fp16',
    'fp32' or 'auto'. lora_rank: on all linear layers, alpha twice the rank; 0 trains every weight.
    adapter: a PEFT folder to start from instead of fresh LoRA weights. trained=False saves memory where
    only answers are wanted.
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
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
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
                    chat=bool(tokenizer.chat_template) and frame == "long", rows=rows, frame=frame, half=half,
                    shares_prompts=name not in SHIPPED and attends_to_all(model.config))
    if trained and name not in SHIPPED:
        _check_logits(policy)
    return policy


@torch.no_grad()
def _check_logits(policy):
    """Raises UsageError if the model does more to its logits than `response_logprobs` knows of."""
    ids = [*range(8)]
    with policy.autocast():
        ours_N = response_logprobs(policy, [Rollout("solve", "", ids[:1], ids[1:])])[0]
        logits_NV = policy.causal(torch.tensor([ids], device=policy.device)).logits[0, :-1].float()
    own_N = torch.log_softmax(logits_NV, -1).diagonal(1)
    rounding = 0.02 * float(logits_NV.abs().max())  # a few times that of bf16
    if (gap := float((ours_N - own_N).abs().max())) > 0.01 + rounding:
        raise UsageError(f"logprobs of this model are {gap:.2g} nats off: it changes logits in a way that "
                         "response_logprobs in azr.py does not know; add it there")


def forecast(policy, cfg, memory=None):
    """Keep micro-batches to what memory holds. → a line that says so, or what to expect of a card

    memory: bytes of the card; None: this machine's. On a CPU, CPU_TOKENS and a third of the free memory bound
    them, since the system kills there and nothing raises. Bytes are a fit to scripts/memory.py; 2.2e9 are for
    CUDA, gradients and AdamW. Seconds are estimates for a 24 GB card: at most 4,100 tokens decoded one after
    the other, of 0.5 ms a layer and 4.5 bytes a weight at 1 TB/s; an update of 650 tokens a rollout, at 60
    TFLOP/s.
    """
    config = policy.causal.config.get_text_config()
    layers, width, inner = config.num_hidden_layers, config.hidden_size, inner_width(config)
    # a token leaves the inputs of all layers, and all of the one layer that is done again
    a_token = policy.causal.dtype.itemsize * ((layers + 25) * width + 7 * inner)
    if memory is None and policy.device.type != "cuda":
        free, most = free_memory(policy.device), min(cfg.micro_tokens, CPU_TOKENS)
        if free < 8 * a_token * most:
            # glibc's heap keeps what checkpointing frees between what it holds: 2.5 times the memory. To give
            # it back costs a small model a third of its time.
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2 ** 17)
        policy.micro_tokens = max(1, min(most, free // (3 * a_token)))
        return f"{free / 2 ** 30:.1f} GB are free: micro-batches of at most {policy.micro_tokens:,} tokens"
    memory = memory or torch.cuda.get_device_properties(policy.device).total_memory
    held = policy.causal.get_memory_footprint() + 2.2e9
    policy.micro_tokens = max(1, min(cfg.micro_tokens, (memory - held) // a_token))
    token = 5e-4 + 4.5e-12 * 3 * width * (width + inner)
    seconds = layers * (min(4100, 3 * cfg.max_response) * token
                        + 0.7e-9 * cfg.batch * (2 + cfg.samples) * width * inner)
    return (f"expected, not measured: {(held + a_token * policy.micro_tokens) / 2 ** 30:.0f} GB, "
            f"{seconds:.0f} seconds a step, {seconds * cfg.steps / 3600:.0f} hours in all")


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


# --- propose -----------------------------------------------------------------------------------------

def propose(policy, executor, buffer, cfg):
    """The proposer's half of a step. → (rollouts, new tasks, estimates)

    For each type of cfg.types, cfg.batch proposals: sampled, validated, and the valid ones tried
    cfg.samples times by the solver, whose success rate gives the reward (eq. 4, 6). Valid new tasks
    go into the buffer. `estimates` are those tries, rollouts of the solver; they are on-policy, so
    --train-on-estimates can train on them (the paper does not).
    """
    rollouts = draft(policy, executor, buffer, cfg.types, cfg)
    for rollout in rollouts:
        # a valid one earns nothing until its tries are counted
        rollout.reward = composite_reward(0.0 if rollout.task else None, rollout.well_formed)
        if rollout.task and KINDS[rollout.type].own_program:
            rollout.traits["unique_ast"] = not buffer.is_repeat(rollout.task)
        if cfg.dedup and rollout.traits.get("unique_ast") is False:
            # Not in the paper: a program seen before earns nothing and is not stored. Without this
            # the proposer finds that repeating one learnable program pays best.
            rollout.verdict, rollout.task = Verdict.REPEAT, None
        elif rollout.task:
            rollout.traits |= _traits(rollout, buffer)
            buffer.add(rollout.task)
    accepted = [rollout for rollout in rollouts if rollout.task]
    tasks = [rollout.task for rollout in accepted]
    estimates = solve(policy, executor, tasks, cfg, copies=cfg.samples)
    zero = -0.5 if cfg.zero_learnability == "official" else 0.0
    for rollout, start in zip(accepted, range(0, len(estimates), cfg.samples or 1)):
        tries = estimates[start:start + cfg.samples]
        rollout.solve_rate = sum(r.verdict is Verdict.CORRECT for r in tries) / cfg.samples
        rollout.reward = composite_reward(learnability(rollout.solve_rate, zero), True)
    return rollouts, tasks, estimates


def _traits(rollout, buffer):
    """What the paper measures of accepted tasks; `buffer` does not hold the task yet."""
    task, traits = rollout.task, {"answers": 1.0 - buffer.answer_share(rollout.task)}
    if KINDS[task.type].own_program:
        traits |= {"complexity": complexity(task.program), "trivial": task.output == task.input}
        if rollout.references:
            distances = [edit_distance(task.program, program) for program in rollout.references]
            traits["edit_distance"] = sum(distances) / len(distances)
    return traits


def draft(policy, executor, buffer, types, cfg):
    """Sample cfg.batch proposals for each type and validate them all in one go. → [Rollout]

    A valid one has its complete Task (with the outputs that the sandbox saw) in `.task`; for the
    others `.reason` says why not. Used by `propose` and, before the first step, for seeding.
    """
    requests = [_request(policy, buffer, kind, cfg) for kind in types for _ in range(cfg.batch)]
    return spread(requests, lambda mine: _drafts(policy, executor, mine, cfg))


def _drafts(policy, executor, requests, cfg):
    """The requests' responses, validated. → [Rollout]"""
    rollouts = sample(policy, requests, cfg.max_response)
    drafts = [parse_proposal(r.type, r.response, r.program, cfg.inputs) for r in rollouts]
    jobs = [KINDS[task.type].runs(task) if task else [] for task in drafts]
    with policy.timed("execute"):
        runs = iter(executor.validate([job for some in jobs for job in some]))
    for rollout, task, some in zip(rollouts, drafts, jobs):
        if task:
            _complete(policy, rollout, task, [next(runs) for _ in some], cfg.max_prompt)
    return rollouts


def _request(policy, buffer, kind, cfg):
    """What a proposer is asked, within cfg.max_prompt tokens. → Rollout without a response"""
    references, program = [], ""
    if KINDS[kind].own_program:
        references = buffer.references(cfg.references)
    else:
        program = buffer.program()
        if policy.frame == "examples":  # the long question shows none
            references = buffer.references(cfg.references, kind)
    while len(ids := policy.encode(
            propose_prompt(kind, references, program, cfg.inputs, policy.frame))) > cfg.max_prompt:
        if references:  # long references leave, never half of one
            references.pop()
        elif program not in ("", ZERO_TRIPLET.program):
            program = ZERO_TRIPLET.program
        else:
            raise UsageError(f"--max-prompt is {cfg.max_prompt}, but asking for a new {kind} task takes "
                             f"{len(ids)} tokens")
    shown = (task.program for task in references)
    if policy.frame == "examples":  # in which the identity is not shown
        shown = (text for text in shown if text != ZERO_TRIPLET.program)
    return Rollout("propose", kind, ids, program=program, references=[*shown])


def _complete(policy, rollout, draft, runs, max_prompt):
    """Make a well-formed proposal a task by what its runs gave, or say in its reason why it is none."""
    task = KINDS[rollout.type].complete(draft, runs)
    rollout.verdict = Verdict.INVALID
    if task is None:
        rollout.verdict, reason = blame(runs, Verdict.INVALID)
        # nothing failed, but the inputs are all the same, say
        rollout.reason = reason or f"its runs make no {rollout.type} task"
    elif problem := within_limits(task):
        rollout.reason = f"too long: {problem}"
    elif len(policy.encode(solve_prompt(task, policy.frame))) > max_prompt:
        rollout.reason = f"too long: the solver's prompt would be over {max_prompt} tokens"
    else:
        rollout.task, rollout.verdict = task, Verdict.VALID


# --- solve -------------------------------------------------------------------------------------------

def solve(policy, executor, tasks, cfg, copies=1, greedy=False):
    """Let the solver answer each task `copies` times; judge and reward (eq. 6). → [Rollout]

    In the order of `tasks`, the copies of a task next to each other.
    """
    requests = [Rollout("solve", task.type, policy.encode(solve_prompt(task, policy.frame)), task=task)
                for task in tasks]
    return spread(requests, lambda mine: _answers(policy, executor, mine, cfg, copies, greedy))


def _answers(policy, executor, requests, cfg, copies, greedy):
    """The requests' responses, `copies` each, judged. → [Rollout]"""
    rollouts = sample(policy, requests, cfg.max_response, copies, greedy)
    with policy.timed("execute"):
        answers = [parse_answer(rollout.type, rollout.response) for rollout in rollouts]
        verdicts = judge([rollout.task for rollout in rollouts], answers, executor)
    for rollout, (verdict, reason) in zip(rollouts, verdicts):
        if verdict is not Verdict.MALFORMED:
            rollout.verdict, rollout.reason = verdict, reason
        rollout.reward = composite_reward(1.0 if verdict is Verdict.CORRECT else None, rollout.well_formed)
    return rollouts


def sample(policy, requests, max_tokens, copies=1, greedy=False, temperature=1.0):
    """`copies` of each request, side by side, with responses that still count as malformed. → [Rollout]"""
    prompts = [request.prompt_ids for request in requests]
    with policy.timed("generate"), policy.autocast():
        responses = generate(policy, prompts, max_tokens, copies, greedy, temperature)
    policy.clock["tokens"] += sum(map(len, responses))
    rollouts = [replace(request) for request in requests for _ in range(copies)]
    for rollout, ids in zip(rollouts, responses):
        rollout.prompt, rollout.response = policy.decode(rollout.prompt_ids), policy.text(ids)
        ended = ids[-1] in policy.end_ids or "</answer>" in rollout.response
        rollout.response_ids, rollout.verdict = ids, Verdict.MALFORMED if ended else Verdict.TRUNCATED
    return rollouts


def heldout_accuracy(policy, executor, tasks, cfg):
    """Accuracy on held-out tasks, one greedy answer each. → {type: (accuracy, standard error)}"""
    rollouts = solve(policy, executor, tasks, cfg, greedy=True)
    hits = {kind: [r.verdict is Verdict.CORRECT for r in rollouts if r.type == kind] for kind in KINDS}
    return {kind: mean_error(values) for kind, values in hits.items() if values}


# --- TRR++ -------------------------------------------------------------------------------------------

def trr_update(policy, optimizer, rollouts, cfg):
    """One policy-gradient step over all rollouts of a step, whose `.advantage` is set. → metrics

    The loss is the PPO clip loss averaged over all response tokens of the batch (paper eq. 9 with
    the official code's token mean), minus cfg.entropy_coef times the mean entropy; no KL term. The
    batch is split into micro-batches of at most cfg.micro_tokens tokens (padding counted), and each
    is divided by the whole batch's token count, so the split changes neither loss nor gradient.
    Out of GPU memory: the micro-batch halves and the step is done again; no sample is dropped.

    Returns loss, entropy (nats a token), grad_norm (before clipping to cfg.max_grad_norm) and sampler_gap
    (nats, see there); all None without rollouts.
    """
    if not rollouts:  # --no-train-proposer, and no task to solve yet
        return dict.fromkeys(("loss", "entropy", "grad_norm", "sampler_gap"))
    budget = min(cfg.micro_tokens, policy.micro_tokens)
    gap = sampler_gap(policy, rollouts, budget)
    policy.causal.train()
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            with policy.autocast():
                loss, entropy = _accumulate_gradients(policy, rollouts, budget, cfg)
            break
        except torch.OutOfMemoryError:
            longest = max(rollout.tokens for rollout in rollouts)
            if budget <= longest:  # already one row at a time
                raise
            policy.micro_tokens = budget = max(longest, budget // 2)
            warnings.warn(f"out of GPU memory in the update: micro-batches of {budget} tokens from now on")
        torch.cuda.empty_cache()
    figures = [loss, entropy] if gap is None else [loss, entropy, gap]
    loss, entropy, *gap = sum_gradients([*policy.trainable().values()], figures)
    norm = float(torch.nn.utils.clip_grad_norm_(policy.trainable().values(), cfg.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    else:  # fp16 can overflow; one step lost is better than all weights
        warnings.warn("the gradient is not finite: this update is skipped")
        norm = None
    optimizer.zero_grad(set_to_none=True)
    policy.causal.eval()
    return {"loss": loss, "entropy": entropy, "grad_norm": norm, "sampler_gap": gap[0] if gap else None}


def _accumulate_gradients(policy, rollouts, budget, cfg):
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    # in fp16 the gradient of a mean over many tokens underflows: that of the sum is taken, and divided
    scale = total if torch.float16 in (policy.half, policy.causal.dtype) else 1
    loss_sum = entropy_sum = 0.0
    mine = share(rollouts, (lambda rollout: tuple(rollout.prompt_ids)) if policy.shares_prompts else id)
    for batch in micro_batches(mine, budget, policy.shares_prompts):
        logps_N, entropies_N = response_logprobs(policy, batch)
        advantages_N = torch.tensor([rollout.advantage for row in batch for rollout in row
                                     for _ in rollout.response_ids], device=policy.device)
        # One update a step: the policy that is trained is the one that sampled, so the old logprobs
        # are these very numbers. (The sampler's own come from other kernels and would differ.)
        losses_N = clipped_loss(logps_N, logps_N.detach(), advantages_N, cfg.clip)
        loss = (losses_N - cfg.entropy_coef * entropies_N).sum() / total
        (loss * scale).backward()
        loss_sum += loss.item()
        entropy_sum += entropies_N.sum().item()
    for parameter in policy.trainable().values():
        if parameter.grad is not None:
            parameter.grad /= scale
    return loss_sum, entropy_sum / total


def sampler_gap(policy, rollouts, budget=4096, rows=8, tokens=16):
    """Mean absolute difference of logprobs, in nats, between sampling and training; None for short responses.

    They run different kernels, while the update takes the ratio of their probabilities as 1. Measured on the
    first `tokens` tokens of at most `rows` responses; of several ranks each gives its part of the mean.
    """
    some = [rollout for rollout in rollouts if len(rollout.response_ids) >= tokens]
    some = some[::max(1, math.ceil(len(some) / rows))]
    if not some:
        return None
    some = [replace(rollout, response_ids=rollout.response_ids[:tokens]) for rollout in some]
    batches = micro_batches(share(some), budget)
    if not batches:
        return 0.0
    policy.causal.eval()
    with policy.autocast(), torch.no_grad():
        trained_N = torch.cat([response_logprobs(policy, batch)[0] for batch in batches])
        decoded_BN = decoded_logprobs(policy, [row[0] for batch in batches for row in batch], tokens)
        return (trained_N - decoded_BN.flatten()).abs().sum().item() / (len(some) * tokens)


def clipped_loss(logps_N, old_logps_N, advantages_N, clip):
    """PPO's clipped surrogate a token, as a loss: −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A), ρ = e^(new − old).

    >>> clipped_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    ratio_N = torch.exp(logps_N - old_logps_N)
    return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N)


def micro_batches(rollouts, budget, shared=False):
    """Split into batches of rows, whose number · longest row is at most `budget` tokens, longest rows first.

    A row is a list of rollouts, one unless responses are `shared`: then as many of one prompt as the budget
    allows, see `_hidden_states`. Sorting by length keeps padding small; a row over the budget gets a batch of
    its own.

    >>> a, b, c = (Rollout("solve", "deduction", [1, 2, 3], [4] * n) for n in (1, 2, 3))
    >>> micro_batches([a, b, c], budget=10) == [[[c]], [[b], [a]]]
    True
    >>> micro_batches([a, b, c], budget=10, shared=True) == [[[a, b, c]]]
    True
    """
    rows, open_rows, batches = [], {}, []
    for rollout in rollouts:
        prompt = tuple(rollout.prompt_ids)
        row = open_rows.get(prompt, [])
        # beside long responses the columns that the mask hides cost more than a short prompt
        long = len(prompt) >= len(rollout.response_ids)
        if row and shared and long and _tokens(row) + len(rollout.response_ids) <= budget:
            row.append(rollout)
        else:
            rows.append([rollout])
            if long:
                open_rows[prompt] = rows[-1]
    for row in sorted(rows, key=_tokens, reverse=True):
        if batches and (len(batches[-1]) + 1) * _tokens(batches[-1][0]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _tokens(row):
    return len(row[0].prompt_ids) + sum(len(rollout.response_ids) for rollout in row)


def response_logprobs(policy, rows, chunk=None):
    """Logprob and entropy of every response token, given all before it. → logps_N, entropies_N

    rows: rollouts, or lists of rollouts with one prompt (see `micro_batches`). N runs over the response
    tokens of all rollouts, in order. Temperature 1, in nats, fp32, both with gradients. Logits never exist
    for more than `chunk` tokens (None: as many as LOGITS allows), forward or backward: the output head runs
    on the hidden states chunk by chunk.
    """
    rows = [row if isinstance(row, list) else [row] for row in rows]
    config = policy.causal.config.get_text_config()
    scale = 1 / getattr(config, "logits_scaling", 1)  # Granite
    if "cohere" in config.model_type:
        scale = config.logit_scale or 1
    hidden_ND = _hidden_states(policy, rows) * scale
    targets_N = torch.tensor([i for row in rows for r in row for i in r.response_ids], device=policy.device)
    head = policy.causal.get_output_embeddings()
    chunk = chunk or min(1024, max(1, LOGITS // len(head.weight)))
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if not head.weight.requires_grad:
        return _FrozenHead.apply(hidden_ND, targets_N, head, softcap, chunk)
    parts = [checkpoint(_head_logprobs, head, hidden, targets, softcap, use_reentrant=False)
             for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk))]
    return tuple(map(torch.cat, zip(*parts)))


def _hidden_states(policy, rows):
    """The last layer's output where the response tokens are predicted. → hidden_ND

    In a row stand a prompt and all responses to it, one behind the other. Where there are several, a mask
    hides them from each other, and the positions of each go on from the prompt's end.
    """
    ids, positions, owners, sources = [], [], [], []
    for number, row in enumerate(rows):
        width = len(row[0].prompt_ids)
        ids.append([*row[0].prompt_ids])
        positions.append([*range(width)])
        owners.append([0] * width)  # of a token: 0 is the prompt
        for owner, rollout in enumerate(row, 1):
            start, length = len(ids[-1]), len(rollout.response_ids)
            # the prompt's last token predicts the first of a response, position t − 1 predicts token t
            sources += [(number, t) for t in (width - 1, *range(start, start + length - 1))]
            ids[-1] += rollout.response_ids
            positions[-1] += range(width, width + length)
            owners[-1] += [owner] * length
    ids_BT, positions_BT, owners_BT = (
        pad_sequence([torch.tensor(row, device=policy.device) for row in lists], batch_first=True,
                     padding_value=padding)
        for lists, padding in ((ids, policy.pad_id), (positions, 0), (owners, -1)))
    how = {}  # a causal model never looks to the right: padding needs no mask, and kernels without are faster
    if any(len(row) > 1 for row in rows):
        visible_BTT = ((owners_BT == 0)[:, None] | (owners_BT[:, None] == owners_BT[:, :, None])).tril()
        how = {"attention_mask": visible_BTT[:, None], "position_ids": positions_BT}
    hidden_BTD = policy.causal.base_model(input_ids=ids_BT, use_cache=False, **how).last_hidden_state
    rows_N, columns_N = torch.tensor(sources, device=policy.device).T
    return hidden_BTD[rows_N, columns_N]


def _logits(head, hidden_ND, softcap):
    logits_NV = head(hidden_ND).float()
    return softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV


def _head_logprobs(head, hidden_ND, targets_N, softcap):
    logps_NV = torch.log_softmax(_logits(head, hidden_ND, softcap), -1)
    return logps_NV.gather(-1, targets_N[:, None])[:, 0], -(logps_NV.exp() * logps_NV).sum(-1)


class _FrozenHead(torch.autograd.Function):
    """`_head_logprobs` chunk by chunk, for a head that is not trained: LoRA's case, and the fast one.

    Each token's logprob depends on its own hidden state alone, so its gradient is one vector of
    width D times the number that arrives from above. The vectors are computed while the chunk's
    logits are there anyway: nothing is computed twice, and what is kept is N × D, not N × V.

        ∂ logp / ∂ logits    = onehot(target) − p
        ∂ entropy / ∂ logits = −p · (log p + entropy)
    """

    @staticmethod
    def forward(context, hidden_ND, targets_N, head, softcap, chunk):
        parts = []
        for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk)):
            logits_CV = _logits(head, hidden_CD, softcap)
            slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap else 1.0  # of the cap itself
            logps_CV = torch.log_softmax(logits_CV, -1)
            del logits_CV
            p_CV, target_C1 = logps_CV.exp(), targets_C[:, None]
            logps_C = logps_CV.gather(-1, target_C1)[:, 0]
            entropies_C = -(p_CV * logps_CV).sum(-1)
            logps_CV.add_(entropies_C[:, None]).mul_(p_CV).neg_().mul_(slope_CV)
            by_entropy_CD = logps_CV.to(head.weight.dtype) @ head.weight
            p_CV.neg_().scatter_add_(-1, target_C1, torch.ones_like(p_CV[:, :1])).mul_(slope_CV)
            by_logp_CD = p_CV.to(head.weight.dtype) @ head.weight
            parts.append((logps_C, entropies_C, by_logp_CD, by_entropy_CD))
        logps_N, entropies_N, by_logp_ND, by_entropy_ND = map(torch.cat, zip(*parts))
        context.save_for_backward(by_logp_ND, by_entropy_ND)
        return logps_N, entropies_N

    @staticmethod
    def backward(context, logps_grad_N, entropies_grad_N):
        by_logp_ND, by_entropy_ND = context.saved_tensors
        grad_ND = logps_grad_N[:, None] * by_logp_ND + entropies_grad_N[:, None] * by_entropy_ND
        return grad_ND.to(by_logp_ND.dtype), None, None, None, None
