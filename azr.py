"""One policy, two roles: load it, let it propose, let it solve, and update it with TRR++.

    load_policy   base model (4-bit on a GPU) + LoRA
    generate      sampled token ids, the prompt's cache shared by all samples of a prompt
    propose       Algorithm 1, first half of a step: new tasks, validated, with their learnability
    solve         Algorithm 1, second half: answers, judged
    trr_update    Algorithm 1, last line: one clipped policy-gradient step over all rollouts

Tensors carry their axes as a suffix: B rows of a (micro-)batch, P prompt tokens, T prompt and
response tokens, N response tokens of all rows laid end to end, D hidden width, V vocabulary.
`logps_N` is one logprob for each trained token.

Token ids are stored when they are sampled and never made again from text: what is trained is exactly
what was sampled.
"""

import contextlib
import logging
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

# peft imports bitsandbytes, which on a CPU says at every start that a faster kernel is not installed;
# the other is transformers warning of its own property
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer,
                          BitsAndBytesConfig, DynamicCache, GenerationConfig)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from executor import literal, parse_literal
from rewards import composite_reward, intrinsic_reward, is_correct, learnability
from tasks import (CHAT_FRAME, FRAME, THINK, Task, UsageError, complexity, edit_distance, parse_answer,
                   parse_proposal, propose_prompt, shortened, solve_prompt, within_limits)

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each of its retries

TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny/longer": TINY / "longer"}
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "Meta-Llama": "meta-llama", "gemma": "google"}


@dataclass
class Rollout:
    """One prompt, one sampled response, and what became of it."""

    role: str                       # propose | solve
    type: str                       # deduction | abduction | induction
    prompt_ids: list
    response_ids: list              # ends with the end token or the token that closes </answer>
    response: str                   # the same as text
    prompt: str = ""
    truncated: bool = False         # ran into the response limit
    well_formed: bool = False
    verdict: str = ""               # correct, wrong, malformed, truncated, valid, repeat, padded, or why invalid
    task: Task | None = None      # what was solved, or what a valid proposal became
    solve_rate: float | None = None  # of a new task: share of the n estimates that were correct
    reward: float = 0.0             # eq. 6
    advantage: float = 0.0          # eq. 8
    estimate: bool = False          # one of the n rollouts that estimate learnability
    references: list = field(default_factory=list)  # programs that a proposer was shown
    fresh: bool | None = None       # of a valid program: whether its syntax tree was not seen before
    traits: dict = field(default_factory=dict)      # of a new task: edit_distance, complexity, answers
    bare: list = field(default_factory=list)  # of a new induction task: tries without its message (--message-gain)


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
        return self.tokenizer.decode(ids, skip_special_tokens=False,
                                     clean_up_tokenization_spaces=False)

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

    def trainable(self):
        """{name: parameter} of all that the update changes."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def resolve_model(name):
    """'Qwen2.5-3B' → 'Qwen/Qwen2.5-3B'; 'tiny' → the shipped folder; paths and full names as they are."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    if "/" in name or Path(name).exists():
        return name
    for prefix, organisation in ORGANISATIONS.items():
        if name.startswith(prefix):
            return f"{organisation}/{name}"
    return name


def load_policy(name, quantize="auto", lora_rank=32, dtype="auto", device=None, adapter=None,
                gradient_checkpointing=None, rows=0):
    """Load a base model for sampling and training. → Policy

    name: 'tiny' or 'tiny/longer' (shipped), a local folder, or a Hugging Face name (see `resolve_model`).
    quantize: '4bit' (nf4, bitsandbytes), 'none', or 'auto': 4-bit on a GPU. dtype: 'bf16', 'fp16',
    'fp32' or 'auto'. lora_rank: on all linear layers, alpha twice the rank; 0 trains every weight.
    adapter: a PEFT folder to start from instead of fresh LoRA weights.
    Raises UsageError if the model cannot be had or the choices do not fit together.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {device} is no device that torch knows; give cuda, cuda:1 or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA GPU here; leave --device out to use the CPU")
    on_gpu = device.type == "cuda"
    quantize = ("4bit" if on_gpu and lora_rank else "none") if quantize == "auto" else quantize
    if quantize == "4bit" and not lora_rank and not adapter:
        raise UsageError("4-bit weights cannot be trained; use --lora-rank 32 or --quantize none")
    if dtype == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
        dtype = ("bf16" if bf16 else "fp16") if on_gpu else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    source = resolve_model(name)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype) if quantize == "4bit" else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, quantization_config=quantization, device_map={"": device})
    except (OSError, ValueError, KeyError) as error:  # all that transformers raises for a bad name
        reason = next((line for line in str(error).splitlines() if line.strip()), "unknown reason")
        raise UsageError(
            f"cannot load the model {name!r} ({source}): {reason.strip()} Check the name and the "
            "network, or download it elsewhere and give the folder: --model PATH") from error
    model.eval()
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation("grouped_sdpa")
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    ends.discard(None)
    if not ends:
        raise UsageError(f"the model {name!r} has no end token; set eos_token in its tokenizer_config.json")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    # A model's own generation_config merges into every generate call (Qwen2.5: temperature 0.7,
    # top_p 0.8, top_k 20, repetition penalty 1.05), and rollouts would not be from the trained policy.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    peft_model = _add_lora(model, lora_rank, adapter)
    if on_gpu if gradient_checkpointing is None else gradient_checkpointing:
        # active in train mode only; prepare_model_for_kbit_training would also upcast to fp32
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(peft_model, model, tokenizer, frozenset(ends), pad,
                  chat=bool(tokenizer.chat_template), rows=rows)


def _add_lora(model, rank, adapter):
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"cannot load the adapter {adapter}: {str(error).splitlines()[0]}") from error
    if not rank:
        return model
    # "all-linear" leaves the output head out, so tied embeddings stay tied
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0,
                                            target_modules="all-linear", task_type="CAUSAL_LM"))


def base_weights(policy):
    """A context in which the policy is the model it started from: LoRA switched off."""
    return policy.model.disable_adapter() if policy.model is not policy.causal else contextlib.nullcontext()


# --- sampling ----------------------------------------------------------------------------------------

def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA attention, without its copies of the cache. → ([row, token, head, feature], None)

    query: [row, head, token, feature]; key, value: [row, key head, column, feature]. When one token is decoded, heads
    that share a key head stand in for tokens: the same sums, but where there is a mask transformers first repeats
    the cache for each of those heads (8 for Qwen2.5-3B), at every token. On a CPU the sums are written out, since
    torch's kernel, made for many tokens, takes twice as long for one.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1 or any(options.get(name) for name in ("dropout", "position_bias", "cache")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    if query.is_cpu:
        scores = grouped @ key.transpose(2, 3) * (width ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)  # not -inf: a row may be all padding
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_sdpa", grouped_sdpa)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)

SEGMENT = 16  # tokens between two looks at the batch, at least


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room behind them: a new column is written in place, where DynamicLayer
    copies all that came before it, at every token. Keys and values are [row, head, column, feature]."""

    room = None  # tensors that self.keys and self.values are the first columns of

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            room = [x.new_empty(*x.shape[:2], end + SEGMENT, x.shape[-1]) for x in (keys, values)]
            if start:
                room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
            self.room = room
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = keys, values
        self.keys, self.values = (x[:, :, :end] for x in self.room)
        return self.keys, self.values

    def put(self, change, *others):
        """Replace keys and values by change(keys, …) and change(values, …) of this and other layers."""
        self.keys = change(self.keys, *(layer.keys for layer in others))
        self.values = change(self.values, *(layer.values for layer in others))
        self.room = None

    def batch_select_indices(self, indices):
        self.put(lambda x: x[indices])


@dataclass
class _Batch:
    """Rows that are being sampled: left-padded ids, their mask, and a cache of all but the last column."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    cache: DynamicCache
    owners: list   # row → index of its response
    lengths: list  # row → response tokens so far, the last columns of ids_BT

    def can_grow(self):
        """Whether rows may join: not with sliding windows, whose layers forget the padding's place."""
        return all(type(layer) is RoomyLayer for layer in self.cache.layers)

    def pad_left(self, columns):
        """Shift all rows right by so many masked columns."""
        self.ids_BT, self.mask_BT = (torch.nn.functional.pad(x, (columns, 0)) for x in (self.ids_BT, self.mask_BT))
        for layer in self.cache.layers:
            layer.put(lambda x: torch.nn.functional.pad(x, (0, 0, columns, 0)))

    def keep(self, rows):
        """Drop all other rows, and the columns that only they needed."""
        index = torch.tensor(rows, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
        self.cache.batch_select_indices(index)
        self.owners, self.lengths = [self.owners[r] for r in rows], [self.lengths[r] for r in rows]
        idle = int(self.mask_BT.any(0).int().argmax())
        if idle and self.can_grow():
            self.ids_BT, self.mask_BT = self.ids_BT[:, idle:], self.mask_BT[:, idle:]
            for layer in self.cache.layers:
                layer.put(lambda x: x[:, :, idle:])

    def join(self, other):
        """Take in the rows of another batch."""
        gap = self.ids_BT.shape[1] - other.ids_BT.shape[1]
        (other if gap > 0 else self).pad_left(abs(gap))
        self.ids_BT, self.mask_BT = (torch.cat(pair) for pair in (
            (self.ids_BT, other.ids_BT), (self.mask_BT, other.mask_BT)))
        for ours, theirs in zip(self.cache.layers, other.cache.layers):
            ours.put(lambda *pair: torch.cat(pair), theirs)
        self.owners += other.owners
        self.lengths += other.lengths


@torch.no_grad()
def generate(policy, prompts, max_tokens, copies=1, greedy=False, temperature=1.0):
    """Sample `copies` responses to each prompt from the whole distribution (no top-k, no top-p).

    prompts: [[id]]; → [[id]], len(prompts) · copies of them, prompt by prompt; each at most
    max_tokens long and ended by an end token, by the token that completes `</answer>`, or by the
    limit. greedy=True takes the likeliest token instead. Training samples at temperature 1, where
    the sampling distribution is the one whose logprobs are trained.

    >>> generate(policy, [[5, 6], [7]], 3, copies=2)      # doctest: +SKIP
    [[9, 1], [8, 8, 8], [9, 9, 1], [1]]

    A prompt is read once for all its copies. Then transformers' own `generate` goes on in short
    segments; in between finished rows leave and waiting prompts take their places, so that the
    rows that memory allows are always busy and nobody waits for the longest response.
    """
    policy.causal.eval()
    # every sampling field explicit: none is left for a model's own configuration to fill in
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_p": 1.0,
                                               "top_k": 0, "repetition_penalty": 1.0}
    responses = [None] * (len(prompts) * copies)
    waiting = [i * copies + copy for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
               for copy in range(copies)]  # longest prompts first, so that later ones fit in beside them
    rows = policy.rows or _rows_that_fit(policy, max(map(len, prompts), default=0) + max_tokens)
    batch = None
    while waiting or batch:
        if waiting and (batch is None or batch.can_grow() and len(batch.owners) <= rows * 3 // 4):
            places = rows - len(batch.owners) if batch else rows
            fresh = _prefill(policy, prompts, copies, waiting[:places])
            waiting = waiting[places:]
            batch.join(fresh) if batch else (batch := fresh)
        segment = max(SEGMENT, min(batch.lengths) // 4)
        segment = min(segment, max_tokens - max(batch.lengths))
        width = batch.ids_BT.shape[1]
        batch.ids_BT = policy.causal.generate(
            batch.ids_BT, attention_mask=batch.mask_BT, past_key_values=batch.cache, max_new_tokens=segment,
            eos_token_id=sorted(policy.end_ids), pad_token_id=policy.pad_id, **how)
        added = batch.ids_BT.shape[1] - width
        batch.mask_BT = torch.nn.functional.pad(batch.mask_BT, (0, added), value=1)
        alive = []
        for row, ids in enumerate(batch.ids_BT.tolist()):
            length = batch.lengths[row] = batch.lengths[row] + added
            end = _end_of(policy, ids[-length:], length - added)
            if end is None and length < max_tokens:
                alive.append(row)
            else:
                responses[batch.owners[row]] = ids[-length:][:end]
        if not alive:
            batch = None
        elif len(alive) < len(batch.owners):
            batch.keep(alive)
    return responses


def _prefill(policy, prompts, copies, owners):
    """Read the prompts of these responses, each prompt once, into a batch with a row a response."""
    counts = Counter(owner // copies for owner in owners)  # in order: copies of a prompt are neighbours
    width = max(2, max(len(prompts[i]) for i in counts))  # at least one column for the cache
    ids_BT = torch.full((len(counts), width), policy.pad_id)
    mask_BT = torch.zeros((len(counts), width), dtype=torch.long)
    for row, i in enumerate(counts):
        ids_BT[row, width - len(prompts[i]):] = torch.tensor(prompts[i])
        mask_BT[row, width - len(prompts[i]):] = 1
    ids_BT, mask_BT = ids_BT.to(policy.device), mask_BT.to(policy.device)
    cache = DynamicCache(config=policy.causal.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    policy.causal(input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1],  # generate reads the last one itself
                  position_ids=positions_BT[:, :-1], past_key_values=cache, logits_to_keep=1)
    rows = torch.tensor([row for row, i in enumerate(counts) for _ in range(counts[i])], device=policy.device)
    cache.batch_select_indices(rows)
    return _Batch(ids_BT[rows], mask_BT[rows], cache, list(owners), [0] * len(owners))


def _end_of(policy, ids, checked):
    """How many tokens of `ids` belong to the response, or None while it goes on.

    The first `checked` tokens are known not to end it; `</answer>` may start among them.
    """
    start = max(0, checked - len("</answer>"))
    stop = next((i + 1 for i in range(checked, len(ids)) if ids[i] in policy.end_ids), None)
    if "</answer>" not in policy.decode(ids[start:stop]):
        return stop
    low, high = start + 1, stop or len(ids)  # the shortest prefix that holds the closing tag
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if "</answer>" in policy.decode(ids[start:middle]) else (middle + 1, high)
    return low


def _rows_that_fit(policy, tokens):
    """Rows of `tokens` tokens whose keys and values fill at most 60% of the free memory."""
    if policy.device.type != "cuda":
        return 512
    config = policy.causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * policy.causal.dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    # a layer whose room is used up is there twice for a moment, and logits of a step are held in
    # fp32 a few times over
    per_row = per_token * tokens * 1.1 + 16 * config.vocab_size
    return max(1, min(512, int(0.6 * free / per_row)))


def _sample(policy, role, requests, max_tokens, copies=1, greedy=False):
    """[(type, prompt_ids)] → [Rollout] without verdicts, `copies` a request."""
    with policy.timed("generate"):
        responses = generate(policy, [ids for _, ids in requests], max_tokens, copies, greedy)
    policy.clock["tokens"] += sum(map(len, responses))
    rollouts = []
    for index, ids in enumerate(responses):
        type, prompt_ids = requests[index // copies]
        text = policy.text(ids)
        ended = ids[-1] in policy.end_ids or "</answer>" in text
        rollouts.append(Rollout(role, type, prompt_ids, ids, text, policy.decode(prompt_ids), truncated=not ended))
    return rollouts


# --- propose -----------------------------------------------------------------------------------------

def propose(policy, executor, buffer, cfg):
    """The proposer's half of a step. → (rollouts, new tasks, estimates)

    For each type of cfg.types, cfg.batch proposals: sampled, validated, and the valid ones tried
    cfg.samples times by the solver, whose success rate gives the reward (eq. 4, 6). Valid new tasks
    go into the buffer. `estimates` are those tries, rollouts of the solver; they are on-policy, so
    --train-on-estimates can train on them (the paper does not).
    """
    rollouts = draft(policy, executor, buffer, cfg.types, cfg)
    with policy.timed("execute"):
        padded = _padded(rollouts, executor) if cfg.unpadded else ()
    accepted = []
    for index, rollout in enumerate(rollouts):
        if rollout.task and rollout.type != "induction":
            rollout.fresh = not buffer.is_repeat(rollout.task.program)
        if rollout.task is None:
            rollout.reward = composite_reward(None, rollout.well_formed)
        elif cfg.dedup and rollout.fresh is False:
            # Not in the paper: a program seen before earns nothing and is not stored. Without this
            # the proposer finds that repeating one learnable program pays best.
            rollout.verdict, rollout.task = "repeat", None
            rollout.reward = composite_reward(0.0, True)
        elif index in padded:
            # Not in the paper either: a statement that could go without a trace makes a program longer, not harder
            rollout.verdict, rollout.task = "padded", None
            rollout.reward = composite_reward(0.0, True)
        else:
            rollout.traits = _traits(rollout.task, rollout.references, buffer)
            buffer.add(rollout.task)
            accepted.append(rollout)
    estimates = []
    if cfg.samples:
        estimates = solve(policy, executor, [r.task for r in accepted], cfg, copies=cfg.samples)
    helpful = _helpful_messages(policy, executor, accepted, estimates, cfg) if cfg.message_gain and estimates else None
    for index, rollout in enumerate(accepted):
        if estimates:
            tries = estimates[index * cfg.samples:(index + 1) * cfg.samples]
            rollout.solve_rate = sum(r.verdict == "correct" for r in tries) / cfg.samples
            reward = learnability(rollout.solve_rate, cfg.zero)
            if helpful is not None and rollout.type == "induction" and index not in helpful:
                reward = min(0.0, reward)
            rollout.reward = composite_reward(reward + intrinsic_reward(rollout.traits, cfg.intrinsic), True)
    for rollout in estimates:
        rollout.estimate = True
    return rollouts, [rollout.task for rollout in accepted], estimates


def _padded(rollouts, executor):
    """Indices of the new programs that return the same for their input when one of their statements is left out."""
    jobs, expected, owners = [], [], []
    for index, rollout in enumerate(rollouts):
        if rollout.task and rollout.type != "induction":
            for program in shortened(rollout.task.program):
                jobs.append((program, rollout.task.input))
                expected.append(rollout.task.output)
                owners.append(index)
    runs = executor.run(jobs)
    return {owner for owner, run, output in zip(owners, runs, expected) if run.ok and run.output == output}


def _helpful_messages(policy, executor, accepted, estimates, cfg):
    """Indices of the induction tasks that are solved more often with their message than without (--message-gain).

    Not in the paper, where nothing asks that a message is true: a false one makes a task harder, and so pays.
    """
    indices = [index for index, rollout in enumerate(accepted) if rollout.type == "induction"]
    bare = [replace(accepted[index].task, message="") for index in indices]
    tries = solve(policy, executor, bare, cfg, copies=cfg.samples)
    for place, index in enumerate(indices):
        accepted[index].bare = tries[place * cfg.samples:(place + 1) * cfg.samples]
    return {index for index in indices
            if sum(r.verdict == "correct" for r in estimates[index * cfg.samples:(index + 1) * cfg.samples])
            > sum(r.verdict == "correct" for r in accepted[index].bare)}


def _traits(task, references, buffer):
    """What the paper measures of accepted tasks; `buffer` does not hold the task yet."""
    found = {"answers": 1.0 - buffer.answer_share(task)}
    if task.type != "induction":  # whose program is not its own
        found["complexity"] = complexity(task.program)
        distances = [edit_distance(task.program, other) for other in references]
        if distances:
            found["edit_distance"] = sum(distances) / len(distances)
    return found


def draft(policy, executor, buffer, types, cfg):
    """Sample cfg.batch proposals for each type and validate them all in one go. → [Rollout]

    A valid one has its complete Task (with the outputs that the sandbox saw) in `.task`; for the
    others `.verdict` says why not. Used by `propose` and, before the first step, for seeding.
    """
    requests, contexts = [], []
    for type in types:
        for _ in range(cfg.batch):
            references = buffer.references(cfg.references) if type != "induction" else []
            program = buffer.program() if type == "induction" else ""
            ids = policy.encode(propose_prompt(type, references, program, cfg.inputs))
            while len(ids) > cfg.max_prompt and references:  # long references leave, never half of one
                references.pop()
                ids = policy.encode(propose_prompt(type, references, program, cfg.inputs))
            requests.append((type, ids))
            contexts.append((program, references))
    rollouts = _sample(policy, "propose", requests, cfg.max_response)
    jobs, drafts = [], []
    for rollout, (program, references) in zip(rollouts, contexts):
        rollout.references = [task.program for task in references]
        task = parse_proposal(rollout.type, rollout.response, program, cfg.inputs)
        rollout.well_formed = task is not None
        drafts.append(task)
        if task:
            jobs += [(task.program, text) for text in task.inputs or (task.input,)]
    with policy.timed("execute"):
        runs = iter(executor.validate(jobs))
    for rollout, task in zip(rollouts, drafts):
        if task is None:
            rollout.verdict = "truncated" if rollout.truncated else "malformed"
            continue
        results = [next(runs) for _ in task.inputs or (task.input,)]
        rollout.task, rollout.verdict = _complete(policy, task, results, cfg.max_prompt)
    return rollouts


def _complete(policy, task, results, max_prompt):
    """(the task with its outputs, 'valid'), or (None, why not)."""
    good = [(text, run.output) for text, run in zip(task.inputs or (task.input,), results) if run.ok]
    if task.type == "induction":  # a hidden input must not be a shown one in other words, as 0x1 is 1
        different = {}
        for text, output in good:
            different.setdefault(_value_of(text), (text, output))
        good = list(different.values())
    if len(good) < (2 if task.type == "induction" else 1):  # of two pairs one can stay hidden
        reasons = (f"{run.status}: {run.error}" for run in results if not run.ok)
        return None, next(reasons, "too few: its inputs are all the same")
    if task.type == "induction":  # inputs that do not run are left out
        inputs, outputs = zip(*good)
        task = replace(task, inputs=inputs, outputs=outputs)
    else:
        task = replace(task, output=good[0][1])
    problem = within_limits(task)  # before all that walks over the program's tree
    if not problem and len(policy.encode(solve_prompt(task))) > max_prompt:
        problem = f"the solver's prompt would be over {max_prompt} tokens"
    return (None, f"too long: {problem}") if problem else (task, "valid")


def _value_of(text):
    """An input's values in one spelling, where it is made of literals; else its text."""
    try:
        return literal(parse_literal(f"({text.rstrip(', ')},)"))
    except ValueError:
        return text


# --- solve -------------------------------------------------------------------------------------------

def solve(policy, executor, tasks, cfg, copies=1, greedy=False):
    """Let the solver answer each task `copies` times; judge and reward (eq. 6). → [Rollout]

    In the order of `tasks`, the copies of a task next to each other.
    """
    requests = [(task.type, policy.encode(solve_prompt(task))) for task in tasks]
    rollouts = _sample(policy, "solve", requests, cfg.max_response, copies, greedy)
    owners = [task for task in tasks for _ in range(copies)]
    answers = [parse_answer(rollout.type, rollout.response) for rollout in rollouts]
    with policy.timed("execute"):
        verdicts = is_correct(owners, answers, executor)
    for rollout, task, answer, correct in zip(rollouts, owners, answers, verdicts):
        rollout.task, rollout.well_formed = task, answer is not None
        rollout.verdict = "correct" if correct else "wrong" if rollout.well_formed else (
            "truncated" if rollout.truncated else "malformed")
        rollout.reward = composite_reward(1.0 if correct else None, rollout.well_formed)
    return rollouts


# --- TRR++ -------------------------------------------------------------------------------------------

def trr_update(policy, optimizer, rollouts, cfg):
    """One policy-gradient step over all rollouts of a step, whose `.advantage` is set. → metrics

    The loss is the PPO clip loss averaged over all response tokens of the batch (paper eq. 9 with
    the official code's token mean), minus cfg.entropy_coef times the mean entropy; no KL term. The
    batch is split into micro-batches of at most cfg.micro_tokens tokens (padding counted), and each
    is divided by the whole batch's token count, so the split changes neither loss nor gradient.
    Out of GPU memory: the micro-batch halves and the step is done again; no sample is dropped.

    Returns loss, entropy (nats a token), grad_norm (before clipping to cfg.max_grad_norm); all None without rollouts.
    """
    if not rollouts:  # --rejection-sampling, and nothing was right
        return {"loss": None, "entropy": None, "grad_norm": None}
    policy.causal.train()
    budget = cfg.micro_tokens
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            loss, entropy = _accumulate_gradients(policy, rollouts, budget, cfg)
            break
        except torch.OutOfMemoryError:
            longest = max(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
            if budget <= longest:  # already one row at a time
                raise
            cfg.micro_tokens = budget = max(longest, budget // 2)
            warnings.warn(f"out of GPU memory in the update: micro-batches of {budget} tokens from now on")
        torch.cuda.empty_cache()
    parameters = list(policy.trainable().values())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    if torch.isfinite(grad_norm):
        optimizer.step()
    else:  # fp16 can overflow; one step lost is better than all weights
        warnings.warn("the gradient is not finite: this update is skipped")
    optimizer.zero_grad(set_to_none=True)
    policy.causal.eval()
    return {"loss": loss, "entropy": entropy, "grad_norm": float(grad_norm) if torch.isfinite(grad_norm) else None}


def _accumulate_gradients(policy, rollouts, budget, cfg):
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    loss_sum = entropy_sum = 0.0
    for batch in micro_batches(rollouts, budget):
        logps_N, entropies_N = response_logprobs(policy, batch, cfg.logit_chunk)
        advantages_N = torch.tensor([r.advantage for r in batch for _ in r.response_ids],
                                    dtype=logps_N.dtype, device=logps_N.device)
        # One update a step: the policy that is trained is the one that sampled, so the old logprobs
        # are these very numbers. (The sampler's own come from other kernels and would differ.)
        losses_N = clipped_loss(logps_N, logps_N.detach(), advantages_N, cfg.clip)
        loss = (losses_N - cfg.entropy_coef * entropies_N).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
        entropy_sum += float(entropies_N.detach().sum())
    return loss_sum, entropy_sum / total


def clipped_loss(logps_N, old_logps_N, advantages_N, clip):
    """PPO's clipped surrogate a token, as a loss: −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A), ρ = e^(new − old).

    >>> clipped_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    ratio_N = torch.exp(logps_N - old_logps_N)
    return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N)


def micro_batches(rollouts, budget):
    """Split into lists whose rows · longest row is at most `budget` tokens, longest rows first.

    Sorting by length keeps padding small; a row over the budget gets a batch of its own.
    """
    batches, width = [], 0
    for rollout in sorted(rollouts, key=lambda r: -len(r.prompt_ids) - len(r.response_ids)):
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
            width = length  # the longest of its batch
    return batches


def response_logprobs(policy, rollouts, chunk=256):
    """Logprob and entropy of every response token, given all before it. → logps_N, entropies_N

    N runs over the response tokens of all rollouts, in order. Temperature 1, in nats, fp32, both
    with gradients. Logits never exist for more than `chunk` tokens, forward or backward: the output
    head runs on the hidden states chunk by chunk.
    """
    width = max(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    ids_BT = torch.full((len(rollouts), width), policy.pad_id)
    trained_BT = torch.zeros((len(rollouts), width), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.response_ids)
        ids_BT[row, :end] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        trained_BT[row, start:end] = True
    ids_BT, trained_BT = ids_BT.to(policy.device), trained_BT.to(policy.device)
    # no padding mask: padding is on the right, where a causal model never looks, and kernels without a mask are faster
    hidden_BTD = policy.causal.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD[:, :-1][trained_BT[:, 1:]]  # position t−1 predicts token t
    targets_N = ids_BT[:, 1:][trained_BT[:, 1:]]
    head = policy.causal.get_output_embeddings()
    softcap = getattr(policy.causal.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    if not head.weight.requires_grad:
        return _FrozenHead.apply(hidden_ND, targets_N, head, softcap, chunk)
    parts = [checkpoint(_head_logprobs, head, hidden, targets, softcap, use_reentrant=False)
             for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk))]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropies for _, entropies in parts])


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
        logps, entropies = [], []
        by_logp_ND, by_entropy_ND = torch.empty_like(hidden_ND), torch.empty_like(hidden_ND)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logits_NV = _logits(head, hidden_ND[rows], softcap)
            slope_NV = 1 - (logits_NV / softcap) ** 2 if softcap else 1.0  # of the cap itself
            logps_NV = torch.log_softmax(logits_NV, -1)
            del logits_NV
            p_NV, at_target = logps_NV.exp(), targets_N[rows, None]
            logps.append(logps_NV.gather(-1, at_target)[:, 0])
            entropies.append(-(p_NV * logps_NV).sum(-1))
            logps_NV.add_(entropies[-1][:, None]).mul_(p_NV).neg_().mul_(slope_NV)
            by_entropy_ND[rows] = logps_NV.to(head.weight.dtype) @ head.weight
            p_NV.neg_().scatter_add_(-1, at_target, torch.ones_like(p_NV[:, :1])).mul_(slope_NV)
            by_logp_ND[rows] = p_NV.to(head.weight.dtype) @ head.weight
        context.save_for_backward(by_logp_ND, by_entropy_ND)
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(context, logps_grad_N, entropies_grad_N):
        by_logp_ND, by_entropy_ND = context.saved_tensors
        grad_ND = logps_grad_N[:, None] * by_logp_ND + entropies_grad_N[:, None] * by_entropy_ND
        return grad_ND.to(by_logp_ND.dtype), None, None, None, None
