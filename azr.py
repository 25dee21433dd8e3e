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
import json
import logging
import math
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# peft imports bitsandbytes, which on a CPU says at every start that a faster kernel is not installed;
# the other is transformers warning of its own property
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from executor import parse_literal, same
from rewards import Verdict, composite_reward, judge, learnability
from sampling import generate
from tasks import (CHAT_FRAME, FRAME, KINDS, THINK, ZERO_TRIPLET, Task, UsageError, complexity, edit_distance,
                   parse_answer, parse_proposal, propose_prompt, solve_prompt, within_limits)

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each of its retries

TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny/longer": TINY / "longer"}
HELDOUT = TINY / "heldout.jsonl"
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "Meta-Llama": "meta-llama", "gemma": "google"}
# All that transformers, peft and safetensors raise for a wrong name or a damaged file
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
LOGITS = 39_000_000  # at once in the update: 160 MB; 256 tokens of Qwen2.5's vocabulary


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
    verdict: Verdict | None = None
    reason: str = ""                # of a verdict that needs one, such as "unsafe: imports os"
    task: Task | None = None        # what was solved, or what a valid proposal became
    solve_rate: float | None = None  # of a new task: share of the n estimates that were correct
    reward: float = 0.0             # eq. 6
    advantage: float = 0.0          # eq. 8
    references: list = field(default_factory=list)  # programs that a proposer was shown
    fresh: bool | None = None       # of a valid program: whether its syntax tree was not seen before
    traits: dict = field(default_factory=dict)      # of a new task: edit_distance, complexity, answers


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
    frame: str = "long"      # the long question, or "examples" before a short one: see tasks.propose_prompt
    rows: int = 0            # rows generated at once; 0: from free memory
    micro_tokens: float = math.inf  # tokens of a micro-batch that fit, once the update has run out of memory
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
                gradient_checkpointing=None, rows=0, frame="long"):
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
        raise UsageError(f"--device {device} is no device of torch; give cuda, cuda:1 or cpu") from error
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA GPU here; leave --device out to use the CPU")
    quantize = ("4bit" if on_gpu and lora_rank else "none") if quantize == "auto" else quantize
    if quantize == "4bit" and not lora_rank and not adapter:
        raise UsageError("4-bit weights cannot be trained; use --lora-rank 32 or --quantize none")
    if dtype == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported()
        dtype = ("bf16" if bf16 else "fp16") if on_gpu else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tokenizer, model = _load_weights(name, dtype, quantize == "4bit", device)
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
                  chat=bool(tokenizer.chat_template) and frame == "long", rows=rows, frame=frame)


def _load_weights(name, dtype, in_4bit, device):
    source = resolve_model(name)
    options = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    if in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, found = AutoModelForCausalLM.from_pretrained(source, **options)
        if found["missing_keys"]:  # transformers would make random ones
            raise ValueError(f"its files lack {len(found['missing_keys'])} of its weights.")
    except LOADING_ERRORS as error:
        raise UsageError(
            f"cannot load the model {name!r} ({source}): {_first_line(error)} Check the name and the "
            "network, or download it elsewhere and give the folder: --model PATH") from error
    if in_4bit and device.type == "cpu" and any(
            getattr(module, "bias", None) is not None and type(module).__name__ == "Linear4bit"
            for module in model.modules()):
        raise UsageError(f"--quantize 4bit: on a CPU layers with biases, as those of {name!r}, cannot be "
                         "trained in 4 bits; use --quantize none")
    return tokenizer, model


def _first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _add_lora(model, rank, adapter):
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        except LOADING_ERRORS as error:
            raise UsageError(f"cannot load the adapter {adapter}: {_first_line(error)}") from error
    if not rank:
        return model
    # "all-linear" leaves the output head out, so tied embeddings stay tied
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0,
                                            target_modules="all-linear", task_type="CAUSAL_LM"))


def base_weights(policy):
    """A context in which the policy is the model it started from: LoRA switched off."""
    return policy.model.disable_adapter() if policy.model is not policy.causal else contextlib.nullcontext()


# --- propose -----------------------------------------------------------------------------------------

def propose(policy, executor, buffer, cfg):
    """The proposer's half of a step. → (rollouts, new tasks, estimates)

    For each type of cfg.types, cfg.batch proposals: sampled, validated, and the valid ones tried
    cfg.samples times by the solver, whose success rate gives the reward (eq. 4, 6). Valid new tasks
    go into the buffer. `estimates` are those tries, rollouts of the solver; they are on-policy, so
    --train-on-estimates can train on them (the paper does not).
    """
    rollouts = draft(policy, executor, buffer, cfg.types, cfg)
    accepted = []
    for rollout in rollouts:
        if rollout.task is None:
            rollout.reward = composite_reward(None, rollout.well_formed)
            continue
        if KINDS[rollout.type].own_program:
            rollout.fresh = not buffer.is_repeat(rollout.task)
        if cfg.dedup and rollout.fresh is False:
            # Not in the paper: a program seen before earns nothing and is not stored. Without this
            # the proposer finds that repeating one learnable program pays best.
            rollout.verdict, rollout.task = Verdict.REPEAT, None
            rollout.reward = composite_reward(0.0, True)
        else:
            rollout.traits = _traits(rollout, buffer)
            buffer.add(rollout.task)
            accepted.append(rollout)
    tasks, zero = [rollout.task for rollout in accepted], -0.5 if cfg.zero_learnability == "official" else 0.0
    estimates = solve(policy, executor, tasks, cfg, copies=cfg.samples) if cfg.samples else []
    for index, rollout in enumerate(accepted if cfg.samples else ()):
        tries = estimates[index * cfg.samples:(index + 1) * cfg.samples]
        rollout.solve_rate = sum(r.verdict is Verdict.CORRECT for r in tries) / cfg.samples
        rollout.reward = composite_reward(learnability(rollout.solve_rate, zero), True)
    return rollouts, tasks, estimates


def _traits(rollout, buffer):
    """What the paper measures of accepted tasks; `buffer` does not hold the task yet."""
    task, references = rollout.task, rollout.references
    found = {"answers": 1.0 - buffer.answer_share(task)}
    if KINDS[task.type].own_program:
        found |= {"complexity": complexity(task.program), "trivial": task.output == task.input}
        if references:
            distances = [edit_distance(task.program, other) for other in references]
            found["edit_distance"] = sum(distances) / len(distances)
    return found


def draft(policy, executor, buffer, types, cfg):
    """Sample cfg.batch proposals for each type and validate them all in one go. → [Rollout]

    A valid one has its complete Task (with the outputs that the sandbox saw) in `.task`; for the
    others `.reason` says why not. Used by `propose` and, before the first step, for seeding.
    """
    asked = [(kind, *_question(policy, buffer, kind, cfg)) for kind in types for _ in range(cfg.batch)]
    rollouts = _sample(policy, "propose", [(kind, ids) for kind, ids, _, _ in asked], cfg.max_response)
    drafts = []
    for rollout, (kind, _, references, program) in zip(rollouts, asked):
        rollout.references = [task.program for task in references]
        task = parse_proposal(kind, rollout.response, program, cfg.inputs)
        rollout.well_formed = task is not None
        drafts.append((task, KINDS[kind].runs(task) if task else []))
    with policy.timed("execute"):
        runs = iter(executor.validate([job for _, jobs in drafts for job in jobs]))
    for rollout, (task, jobs) in zip(rollouts, drafts):
        if task is None:
            rollout.verdict = Verdict.TRUNCATED if rollout.truncated else Verdict.MALFORMED
        else:
            _complete(policy, rollout, task, [next(runs) for _ in jobs], cfg.max_prompt)
    return rollouts


def _question(policy, buffer, kind, cfg):
    """What a proposer is asked. → (prompt ids, references, program to build on), within cfg.max_prompt ids"""
    own_program = KINDS[kind].own_program
    if own_program:
        references = buffer.references(cfg.references)
    else:  # only as examples
        references = buffer.references(cfg.references, kind) if policy.frame == "examples" else []
    program = "" if own_program else buffer.program()
    while True:
        ids = policy.encode(propose_prompt(kind, references, program, cfg.inputs, policy.frame))
        if len(ids) <= cfg.max_prompt:
            return ids, references, program
        if references:  # long references leave, never half of one
            references.pop()
        elif program not in ("", ZERO_TRIPLET.program):
            program = ZERO_TRIPLET.program
        else:
            raise UsageError(f"--max-prompt is {cfg.max_prompt}, but asking for a new {kind} task takes "
                             f"{len(ids)} tokens")


def _complete(policy, rollout, draft, runs, max_prompt):
    """Set the verdict of a well-formed proposal, and its task, or the reason why it is none."""
    task = KINDS[draft.type].complete(draft, runs)
    if task is None:
        rollout.reason = next((f"{run.status}: {run.error}" for run in runs if not run.ok),
                              f"its runs make no {draft.type} task")  # inputs that are all the same, say
    elif problem := within_limits(task):
        rollout.reason = f"too long: {problem}"
    elif len(policy.encode(solve_prompt(task, policy.frame))) > max_prompt:
        rollout.reason = f"too long: the solver's prompt would be over {max_prompt} tokens"
    if not rollout.reason:
        rollout.task, rollout.verdict = task, Verdict.VALID
    else:
        unsafe = task is None and any(run.status == "unsafe" for run in runs)
        rollout.verdict = Verdict.UNSAFE if unsafe else Verdict.INVALID


# --- solve -------------------------------------------------------------------------------------------

def solve(policy, executor, tasks, cfg, copies=1, greedy=False):
    """Let the solver answer each task `copies` times; judge and reward (eq. 6). → [Rollout]

    In the order of `tasks`, the copies of a task next to each other.
    """
    requests = [(task.type, policy.encode(solve_prompt(task, policy.frame))) for task in tasks]
    rollouts = _sample(policy, "solve", requests, cfg.max_response, copies, greedy)
    owners = [task for task in tasks for _ in range(copies)]
    answers = [parse_answer(rollout.type, rollout.response) for rollout in rollouts]
    with policy.timed("execute"):
        verdicts = judge(owners, answers, executor)
    for rollout, task, (verdict, reason) in zip(rollouts, owners, verdicts):
        rollout.task, rollout.reason, rollout.well_formed = task, reason, verdict is not Verdict.MALFORMED
        cut = rollout.truncated and not rollout.well_formed
        rollout.verdict = Verdict.TRUNCATED if cut else verdict
        rollout.reward = composite_reward(1.0 if verdict is Verdict.CORRECT else None, rollout.well_formed)
    return rollouts


def _sample(policy, role, requests, max_tokens, copies=1, greedy=False):
    """[(type, prompt_ids)] → [Rollout] without verdicts, `copies` a request."""
    with policy.timed("generate"):
        responses = generate(policy, [ids for _, ids in requests], max_tokens, copies, greedy)
    policy.clock["tokens"] += sum(map(len, responses))
    rollouts = []
    for index, ids in enumerate(responses):
        kind, prompt_ids = requests[index // copies]
        text = policy.text(ids)
        ended = ids[-1] in policy.end_ids or "</answer>" in text
        prompt = policy.decode(prompt_ids)
        rollouts.append(Rollout(role, kind, prompt_ids, ids, text, prompt, truncated=not ended))
    return rollouts


# --- held-out tasks ------------------------------------------------------------------------------------

def load_heldout(path=HELDOUT, limit=None, executor=None):
    """{split: [Task]} from a file of JSON lines with `split` and the fields of a Task.

    limit: at most so many tasks of each type and split, the first ones. executor: run each task's program
    and compare with its outputs. Raises UsageError with the line's number.
    """
    splits, count, number = defaultdict(list), Counter(), 0
    try:
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            split, task = _heldout_task(json.loads(line), executor)
            count[split, task.type] += 1
            if limit is None or count[split, task.type] <= limit:
                splits[split].append(task)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        where = f"line {number}: " if number else ""
        raise UsageError(f"cannot read the held-out tasks {path} (JSON lines with split, type and the "
                         f"fields of a task): {where}{what}") from error
    return dict(splits)


def _heldout_task(row, executor):
    """A row of a held-out file → (split, Task). Raises ValueError, KeyError or TypeError."""
    if row["type"] not in KINDS:
        raise ValueError(f"unknown type {row['type']!r}")
    kind = KINDS[row["type"]]
    task = Task.from_dict({name: row[name] for name in Task.__match_args__ if name in row})
    pairs = task.inputs + task.outputs
    texts = [row["split"], task.program, task.input, task.output, task.message, *pairs]
    if not isinstance(pairs, tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a field is not text")
    jobs, outputs = kind.runs(task), [parse_literal(text) for text in task.outputs or (task.output,)]
    if len(jobs) != len(outputs) or not kind.judge(task, ""):
        raise ValueError("it has too few pairs of inputs and outputs")
    for job, run, output in zip(jobs, executor.run(jobs) if executor else (), outputs):
        if not run.ok or not same(parse_literal(run.output), output):
            raise ValueError(f"f({job[1]}) gives {run.output or run.error}, and the task says {output!r}")
    return row["split"], task


def heldout_accuracy(policy, executor, tasks, cfg):
    """Accuracy on held-out tasks, one greedy answer each. → {type: (accuracy, standard error, tasks)}"""
    correct = defaultdict(list)
    for rollout in solve(policy, executor, tasks, cfg, greedy=True):
        correct[rollout.type].append(rollout.verdict is Verdict.CORRECT)
    return {kind: _accuracy(correct[kind]) for kind in KINDS if kind in correct}


def _accuracy(hits):
    mean = sum(hits) / len(hits)
    return mean, math.sqrt(sum((hit - mean) ** 2 for hit in hits)) / len(hits), len(hits)


# --- TRR++ -------------------------------------------------------------------------------------------

def trr_update(policy, optimizer, rollouts, cfg):
    """One policy-gradient step over all rollouts of a step, whose `.advantage` is set. → metrics

    The loss is the PPO clip loss averaged over all response tokens of the batch (paper eq. 9 with
    the official code's token mean), minus cfg.entropy_coef times the mean entropy; no KL term. The
    batch is split into micro-batches of at most cfg.micro_tokens tokens (padding counted), and each
    is divided by the whole batch's token count, so the split changes neither loss nor gradient.
    Out of GPU memory: the micro-batch halves and the step is done again; no sample is dropped.

    Returns loss, entropy (nats a token), grad_norm (before clipping to cfg.max_grad_norm); all None without
    rollouts.
    """
    if not rollouts:  # --no-train-proposer, and no task to solve yet
        return {"loss": None, "entropy": None, "grad_norm": None}
    policy.causal.train()
    budget = min(cfg.micro_tokens, policy.micro_tokens)
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            loss, entropy = _accumulate_gradients(policy, rollouts, budget, cfg)
            break
        except torch.OutOfMemoryError:
            longest = max(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
            if budget <= longest:  # already one row at a time
                raise
            policy.micro_tokens = budget = max(longest, budget // 2)
            warnings.warn(f"out of GPU memory in the update: micro-batches of {budget} tokens from now on")
        torch.cuda.empty_cache()
    parameters = list(policy.trainable().values())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    finite = bool(torch.isfinite(grad_norm))
    if finite:
        optimizer.step()
    else:  # fp16 can overflow; one step lost is better than all weights
        warnings.warn("the gradient is not finite: this update is skipped")
    optimizer.zero_grad(set_to_none=True)
    policy.causal.eval()
    return {"loss": loss, "entropy": entropy, "grad_norm": float(grad_norm) if finite else None}


def _accumulate_gradients(policy, rollouts, budget, cfg):
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    loss_sum = entropy_sum = 0.0
    for batch in micro_batches(rollouts, budget):
        logps_N, entropies_N = response_logprobs(policy, batch)
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


def response_logprobs(policy, rollouts, chunk=None):
    """Logprob and entropy of every response token, given all before it. → logps_N, entropies_N

    N runs over the response tokens of all rollouts, in order. Temperature 1, in nats, fp32, both
    with gradients. Logits never exist for more than `chunk` tokens (None: as many as LOGITS allows),
    forward or backward: the output head runs on the hidden states chunk by chunk.
    """
    width = max(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    ids_BT = torch.full((len(rollouts), width), policy.pad_id)
    trained_BT = torch.zeros((len(rollouts), width), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt_ids), len(rollout.prompt_ids) + len(rollout.response_ids)
        ids_BT[row, :end] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        trained_BT[row, start:end] = True
    ids_BT, trained_BT = ids_BT.to(policy.device), trained_BT.to(policy.device)
    # no padding mask: a causal model never looks to the right, and kernels without a mask are faster
    hidden_BTD = policy.causal.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD[:, :-1][trained_BT[:, 1:]]  # position t−1 predicts token t
    targets_N = ids_BT[:, 1:][trained_BT[:, 1:]]
    head = policy.causal.get_output_embeddings()
    chunk = chunk or min(1024, max(1, LOGITS // len(head.weight)))
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
