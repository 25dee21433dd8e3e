"""One policy, two roles: it proposes tasks, solves them, and is updated with TRR++.

    Actor         samples and judges. Its `self_play` is Algorithm 1 up to the rewards
    accept        drops duplicates and puts the rest into the buffer
    trr_update    one clipped policy-gradient step over all rollouts of a step
    policy_loss   equation 9, the place to change the loss
    heldout_accuracy   accuracy of greedy answers to tasks that are never trained on

Left out, compared with other trainers, because the paper does:

1. No KL term and no reference model.
2. One update a step, so that the trained policy is the one that sampled, and the ratio of PPO is 1.
3. No value network: advantages compare responses of one role and type (six groups).
4. The loss is the mean over all response tokens of the step, not over responses.

Tensors carry their axes as a suffix: N response tokens of all rows laid end to end, R responses. Token ids
are stored when they are sampled and never recomputed from text, so that the trained tokens are exactly the
sampled ones.
"""

import contextlib
import ctypes
import json
import math
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from model import TINY, response_logprobs
from parallel import ranks, share, spread, sum_gradients
from rewards import Rollout, Verdict, blame, equal, judge, mean_error
from sampling import free_memory, inner_width
from tasks import (KINDS, ZERO_TRIPLET, Task, UsageError, edit_distance, parse_answer, parse_proposal,
                   propose_prompt, solve_prompt, within_limits)

M_MMAP_THRESHOLD = -3  # from malloc.h
CPU_TOKENS = 2048  # most in a micro-batch: more is no faster, because its few unequal rows are padded


# --- self-play --------------------------------------------------------------------------------------

class Actor:
    """Samples responses with the policy while the sandbox runs the programs of earlier ones.

    sampler: a `sampling.Sampler`, or another class with its methods. clock: seconds by phase. "generate" is
    the time in the sampler, "execute" the wait for the sandbox.
    """

    def __init__(self, policy, sampler, executor, cfg):
        self.policy, self.sampler, self.executor, self.cfg = policy, sampler, executor, cfg
        self.sandbox = ThreadPoolExecutor(1)  # one thread, because an Executor does not support several
        self.clock = Counter()

    def self_play(self, buffer):
        """A step of Algorithm 1 up to the rewards, in one stream. → proposals, tries, solutions

        PROPOSE: for each type, ask for B new tasks, given K tasks from the buffer. Valid new ones join the
        buffer and are tried n times. SOLVE: for each type, answer B tasks, this step's new ones first.

        No rollout waits for the longest response. A proposal is run as soon as it has ended, and the tries
        and the solution of its task are sampled alongside the remaining proposals. A proposal that brings no
        new task is replaced by a task from the buffer, so that there are always B solutions of each type.
        """
        cfg = self.cfg
        proposals = self.proposal_requests(buffer, cfg.types)
        batches = {kind: [] for kind in cfg.types}  # tasks to solve, in the end cfg.batch of each type
        tries, solutions, vacant = [], [], []
        waiting = [*proposals]
        for settled in self.play(waiting):
            written = [rollout for rollout in settled if rollout.role == "propose"]
            new = accept(written, buffer, cfg)
            for task in new:
                batches[task.type].append(task)
            vacant += [proposal.type for proposal in written if proposal.task is None]
            drawn, still_vacant = [], []
            for kind in vacant:
                batch = batches[kind]
                replacement = buffer.fill(kind, batch, len(batch) + 1)[len(batch):]
                batch += replacement
                drawn += replacement
                if not replacement:  # the buffer has no task of this type yet
                    still_vacant.append(kind)
            vacant = still_vacant
            new_tries = self.solver_requests(new, cfg.samples)
            new_solutions = self.solver_requests(new + drawn)
            tries += new_tries
            solutions += new_solutions
            waiting += new_tries + new_solutions
        return proposals, tries, solutions

    def propose(self, buffer, types):
        """cfg.batch proposals for each type, settled. → [Rollout]"""
        return self.settle(self.proposal_requests(buffer, types))

    def solve(self, tasks, temperature=1.0):
        """An answer to each task, settled. → [Rollout], in the order of `tasks`. temperature 0 is greedy."""
        return self.settle(self.solver_requests(tasks), temperature)

    def settle(self, requests, temperature=1.0):
        """Sample and judge all requests, in place. → requests"""
        for _ in self.play([*requests], temperature):
            pass
        return requests

    def play(self, waiting, temperature=1.0):
        """Sample and judge the rollouts in `waiting`, in place. Yields them in parts, as they are settled.

        The caller may append to `waiting` between two parts. With several ranks, a part is everything that
        waits, and each rank takes its share of it.
        """
        if ranks() == 1:
            yield from self._play_alone(waiting, temperature)
            return
        while waiting:
            part, waiting[:] = [*waiting], []
            results = spread(part, lambda mine: self._settle_alone(mine, temperature))
            for rollout, result in zip(part, results):
                vars(rollout).update(vars(result))
            yield part

    def _settle_alone(self, requests, temperature):
        for _ in self._play_alone([*requests], temperature):
            pass
        return requests

    def _play_alone(self, waiting, temperature):
        """`play` of one rank. Rollouts that ended in a segment are run while the next one is sampled, and are
        settled at its end. Therefore the order of random numbers depends on tokens, not on the clock."""
        running = None
        while waiting or running:
            stream = self.sampler.stream(waiting, self.cfg.max_response, temperature)
            ended = []
            while ended is not None:
                with self.timed("generate"):
                    ended = next(stream, None)
                if running:
                    with self.timed("execute"):
                        settled = running.settled()
                    running = None
                    yield settled
                if ended:
                    running = _Trial(self, ended)
                    yield running.malformed  # they need no run

    @contextlib.contextmanager
    def timed(self, phase):
        """Adds the seconds spent inside to clock[phase]."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.clock[phase] += time.perf_counter() - start

    def proposal_requests(self, buffer, types):
        """cfg.batch rollouts of the proposer for each type, without responses."""
        requests = []
        for kind in types:
            requests += [self.proposal_request(buffer, kind) for _ in range(self.cfg.batch)]
        return requests

    def proposal_request(self, buffer, kind):
        """The proposer's prompt, within cfg.max_prompt tokens. → Rollout without a response"""
        cfg, references, program = self.cfg, [], ""
        if KINDS[kind].own_program:
            references = buffer.references(cfg.references)
        else:
            program = buffer.program()
            if cfg.frame != "long":  # the long question shows no references with a given program
                references = buffer.references(cfg.references, kind)
        while True:
            question = propose_prompt(kind, references, program, cfg.inputs, cfg.frame)
            prompt_ids = self.policy.encode(question)
            if len(prompt_ids) <= cfg.max_prompt:
                break
            if references:  # references are dropped, never cut
                references.pop()
            elif program and program != ZERO_TRIPLET.program:
                program = ZERO_TRIPLET.program
            else:
                raise UsageError(f"--max-prompt is {cfg.max_prompt}, but asking for a new {kind} task takes "
                                 f"{len(prompt_ids)} tokens")
        shown = [task.program for task in references]
        if cfg.frame != "long":  # which is the only one to show the identity
            shown = [text for text in shown if text != ZERO_TRIPLET.program]
        return Rollout("propose", kind, prompt_ids, program=program, references=shown)

    def solver_requests(self, tasks, copies=1):
        """`copies` rollouts of the solver for each task, next to each other, without responses."""
        requests = []
        for task in tasks:
            prompt_ids = self.policy.encode(solve_prompt(task, self.cfg.frame))
            requests += [Rollout("solve", task.type, prompt_ids, task=task) for _ in range(copies)]
        return requests


class _Trial:
    """Sampled rollouts while the sandbox runs their programs. Texts are parsed and tokenized here, and only
    the runs happen in the other thread, because a tokenizer does not support several threads."""

    def __init__(self, actor, rollouts):
        self.policy, self.cfg = actor.policy, actor.cfg
        self.malformed, self.drafts, self.answers = [], [], []
        for rollout in rollouts:
            rollout.response = self.policy.text(rollout.response_ids)
            if rollout.role == "propose":
                parsed = parse_proposal(rollout.type, rollout.response, rollout.program, self.cfg.inputs)
                group = self.drafts
            else:
                parsed = parse_answer(rollout.type, rollout.response)
                group = self.answers
            if parsed is None:
                self.set_verdict(rollout, Verdict.MALFORMED, "")
                self.malformed.append(rollout)
            else:
                group.append((rollout, parsed))
        jobs = []
        for _, draft in self.drafts:
            jobs += KINDS[draft.type].runs(draft)
        self.runs = actor.sandbox.submit(actor.executor.validate, jobs)
        tasks = [rollout.task for rollout, _ in self.answers]
        answers = [answer for _, answer in self.answers]
        self.verdicts = actor.sandbox.submit(judge, tasks, answers, actor.executor)

    def settled(self):
        """The well-formed rollouts, with verdicts and reasons, and with the task of each valid proposal."""
        runs = iter(self.runs.result())
        for proposal, draft in self.drafts:
            own_runs = [next(runs) for _ in KINDS[draft.type].runs(draft)]
            proposal.task, verdict, reason = self.completed(draft, own_runs)
            self.set_verdict(proposal, verdict, reason)
        for (solution, _), (verdict, reason) in zip(self.answers, self.verdicts.result()):
            self.set_verdict(solution, verdict, reason)
        return [rollout for rollout, _ in self.drafts + self.answers]

    def completed(self, draft, runs):
        """Turn a well-formed proposal and its runs into a task. → (Task or None, Verdict, reason)"""
        task = KINDS[draft.type].complete(draft, runs)
        if task is None:
            verdict, reason = blame(runs, Verdict.INVALID)
            # there is no reason if no run failed, for example because all inputs are the same
            return None, verdict, reason or f"its runs make no {draft.type} task"
        problem = within_limits(task)
        if not problem and len(self.policy.encode(solve_prompt(task, self.cfg.frame))) > self.cfg.max_prompt:
            problem = f"the solver's prompt would be over {self.cfg.max_prompt} tokens"
        if problem:
            return None, Verdict.INVALID, f"too long: {problem}"
        return task, Verdict.VALID, ""

    def set_verdict(self, rollout, verdict, reason):
        has_ended = rollout.response_ids[-1] in self.policy.end_ids or "</answer>" in rollout.response
        if verdict is Verdict.MALFORMED and not has_ended:
            verdict = Verdict.TRUNCATED
        rollout.verdict, rollout.reason = verdict, reason


def accept(proposals, buffer, cfg, types=None, limit=math.inf):
    """Put valid proposals into the buffer, and mark duplicates. → [Task], the new ones

    types: the types whose buffers a task joins (None: its own, but seeds are shared). limit: most new tasks.

    Deduplication is not in the paper (--no-dedup): a duplicate program gets no reward and is not stored.
    Otherwise the proposer learns to repeat one learnable program, because that pays best.
    """
    new = []
    for proposal in proposals:
        if proposal.task is None or len(new) == limit:
            continue
        is_repeat = buffer.is_repeat(proposal.task)
        if KINDS[proposal.type].own_program:
            proposal.traits["unique_ast"] = not is_repeat
        if is_repeat and cfg.dedup:
            proposal.repeat, proposal.task = True, None
            continue
        proposal.traits |= traits_of(proposal, buffer)
        for kind in types or [proposal.type]:
            buffer.add(replace(proposal.task, type=kind))
        new.append(proposal.task)
    return new


def traits_of(proposal, buffer):
    """The paper's measures of a new task, before `buffer` holds it."""
    task, traits = proposal.task, {"answers": 1.0 - buffer.answer_share(proposal.task)}
    if KINDS[task.type].own_program:
        traits["trivial"] = task.output == task.input
        if proposal.references:
            distances = [edit_distance(task.program, program) for program in proposal.references]
            traits["edit_distance"] = sum(distances) / len(distances)
    return traits


# --- TRR++ ------------------------------------------------------------------------------------------

def trr_update(policy, optimizer, rollouts, cfg, micro_tokens=None):
    """One policy-gradient step over all rollouts of a step, whose `.advantage` is set. → metrics

    The loss is `policy_loss` minus cfg.entropy_coef times the mean entropy. The batch is split into
    micro-batches of at most `micro_tokens` tokens (with padding, by default cfg.micro_tokens), and each is
    divided by the token count of the full batch, so that the split changes neither loss nor gradient. If GPU
    memory runs out, the micro-batch is halved and the step is repeated. No sample is dropped.

    Returns loss, entropy (nats a token), grad_norm (before clipping to cfg.max_grad_norm), sampler_gap, and
    micro_tokens, halved if memory ran out. sampler_gap is the mean absolute difference, in nats over all
    response tokens, between these logprobs and those of the sampler (None if rollouts come without logps).
    It should be mere rounding, because the sampler runs other kernels, whereas the loss takes the ratio of
    the probabilities to be 1. It also reveals a sampler that missed an update. signal is the share of
    rollouts whose advantage is not 0 (None without rollouts).

    Without any signal there is no update, and the other figures are None. AdamW divides by the size of the
    gradient, so the entropy bonus alone would move the weights as far as rewards do.
    """
    micro_tokens = micro_tokens or cfg.micro_tokens
    metrics = dict.fromkeys(("loss", "entropy", "grad_norm", "sampler_gap", "signal"))
    if rollouts:
        metrics["signal"] = sum(rollout.advantage != 0 for rollout in rollouts) / len(rollouts)
    if not metrics["signal"]:
        return metrics | {"micro_tokens": micro_tokens}
    longest = max(rollout.tokens for rollout in rollouts)
    policy.causal.train()
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            with policy.autocast():
                figures = _accumulate_gradients(policy, rollouts, micro_tokens, cfg)
            break
        except torch.OutOfMemoryError:
            if micro_tokens <= longest:  # already one row at a time
                raise
            micro_tokens = max(longest, micro_tokens // 2)
            warnings.warn("out of GPU memory in the update: "
                          f"micro-batches of {micro_tokens} tokens from now on")
        torch.cuda.empty_cache()
    weights = [*policy.trainable().values()]
    metrics["loss"], metrics["entropy"], gap = sum_gradients(weights, figures)
    metrics["sampler_gap"] = None if math.isnan(gap) else gap
    norm = float(torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
        metrics["grad_norm"] = norm
    else:  # fp16 can overflow, and NaN would destroy all weights
        warnings.warn("the gradient is not finite: this update is skipped")
    optimizer.zero_grad(set_to_none=True)
    policy.causal.eval()
    return metrics | {"micro_tokens": micro_tokens}


def _accumulate_gradients(policy, rollouts, budget, cfg):
    """Compute the gradients of this rank's share of the batch. → its part of [loss, entropy, gap]"""
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    # in fp16 the gradient of a mean over many tokens underflows, so take that of the sum and divide it
    scale = total if torch.float16 in (policy.half, policy.causal.dtype) else 1
    is_comparable = all(rollout.logps for rollout in rollouts)
    loss_sum, entropy_sum, gap_sum = 0.0, 0.0, 0.0 if is_comparable else math.nan
    mine = share(rollouts, (lambda rollout: tuple(rollout.prompt_ids)) if policy.shares_prompts else id)
    for batch in micro_batches(mine, budget, policy.shares_prompts):
        new_N, entropies_N = response_logprobs(policy, batch)
        responses = []  # in the order of the axis N
        for row in batch:
            responses += row
        advantages_R = torch.tensor([rollout.advantage for rollout in responses], device=policy.device)
        lengths_R = torch.tensor([len(rollout.response_ids) for rollout in responses], device=policy.device)
        # With one update a step, the trained policy is the one that sampled, so the old logprobs are these
        # very numbers and the ratio is 1. The sampler's own, `rollout.logps`, come from other kernels and
        # would differ by rounding. Use them as the old ones if you take several updates a step.
        old_N = new_N.detach()
        loss = policy_loss(new_N, old_N, advantages_R, lengths_R, total, cfg)
        loss = loss - cfg.entropy_coef * entropies_N.sum() / total
        (loss * scale).backward()
        loss_sum += loss.item()
        entropy_sum += entropies_N.sum().item()
        if is_comparable:
            gap_sum += (old_N - _sampled_logps(responses).to(old_N)).abs().sum().item()
    for parameter in policy.trainable().values():
        if parameter.grad is not None:
            parameter.grad /= scale
    return [loss_sum, entropy_sum / total, gap_sum / total]


def _sampled_logps(rollouts):
    logps = []
    for rollout in rollouts:
        logps += rollout.logps
    return torch.tensor(logps)


def policy_loss(new_N, old_N, advantages_R, lengths_R, total, cfg):
    """Equation 9: PPO's clipped surrogate −min(ρ·A, clip(ρ, 1−ε, 1+ε)·A), ρ = e^(new − old). → scalar

    new_N, old_N: logprobs in nats of the response tokens of R responses, laid end to end, with the gradient
    in new_N. advantages_R, lengths_R: a response's advantage and its number of tokens. total: response tokens
    of the whole step, by which the sum is divided (a mean over tokens, as in the official code). The result
    is the share of one micro-batch, and the shares of a step are added up. cfg.clip is ε.

    >>> from types import SimpleNamespace
    >>> policy_loss(torch.tensor([0.5, 0.0]), torch.zeros(2), torch.tensor([1.0]), torch.tensor([2]), 2,
    ...             SimpleNamespace(clip=0.2))
    tensor(-1.1000)
    """
    ratio_N = torch.exp(new_N - old_N)
    advantages_N = torch.repeat_interleave(advantages_R, lengths_R)
    clipped_N = ratio_N.clamp(1 - cfg.clip, 1 + cfg.clip)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N).sum() / total


def micro_batches(rollouts, budget, shared=False):
    """Split into batches of at most `budget` tokens (number of rows · longest row), longest rows first.

    A row is a list of rollouts: only one or, if `shared`, as many with the same prompt as the budget allows
    (see `model.response_logprobs`). Sorting by length keeps padding small. A row over the budget gets a batch
    of its own.

    >>> a, b, c = (Rollout("solve", "deduction", [1, 2, 3], [4] * n) for n in (1, 2, 3))
    >>> micro_batches([a, b, c], budget=10) == [[[c]], [[b], [a]]]
    True
    >>> micro_batches([a, b, c], budget=10, shared=True) == [[[a, b, c]]]
    True
    """
    rows = _shared_rows(rollouts, budget) if shared else [[rollout] for rollout in rollouts]
    batches = []
    for row in sorted(rows, key=_row_tokens, reverse=True):
        if batches and (len(batches[-1]) + 1) * _row_tokens(batches[-1][0]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _shared_rows(rollouts, budget):
    """Rows of rollouts with the same prompt, of at most `budget` tokens unless a single one is longer."""
    rows, open_rows = [], {}
    for rollout in rollouts:
        prompt = tuple(rollout.prompt_ids)
        if len(prompt) < len(rollout.response_ids):
            # with long responses the masked columns cost more than reading a short prompt again
            rows.append([rollout])
            continue
        row = open_rows.get(prompt)
        if row is None or _row_tokens(row) + len(rollout.response_ids) > budget:
            row = open_rows[prompt] = []
            rows.append(row)
        row.append(rollout)
    return rows


def _row_tokens(row):
    return len(row[0].prompt_ids) + sum(len(rollout.response_ids) for rollout in row)


def fit_micro_tokens(policy, cfg, memory=None):
    """Tokens of a micro-batch that fit into memory, at most cfg.micro_tokens. → int

    memory: bytes of the GPU (None: of this machine's). The bytes are fitted to scripts/memory.py, and 2.2e9
    of them are for CUDA, gradients and AdamW. On a CPU, the limits are CPU_TOKENS and a third of the free
    memory, because there the OOM killer ends the process instead of torch raising an error.
    """
    config = policy.causal.config.get_text_config()
    # per token we keep every layer's input, plus all activations of the one layer that is being recomputed
    a_token = policy.causal.dtype.itemsize * ((config.num_hidden_layers + 25) * config.hidden_size
                                              + 7 * inner_width(config))
    if memory is None and policy.device.type == "cpu":
        free, most = free_memory(policy.device), min(cfg.micro_tokens, CPU_TOKENS)
        if free < 8 * a_token * most:
            # glibc does not return the blocks that checkpointing frees, so the process grows to 2.5 times its
            # size. A lower threshold returns them, but slows small models down by a third.
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2 ** 17)
        return max(1, min(most, free // (3 * a_token)))
    memory = memory or torch.cuda.get_device_properties(policy.device).total_memory
    held = policy.causal.get_memory_footprint() + 2.2e9
    return max(1, int(min(cfg.micro_tokens, (memory - held) // a_token)))


# --- held-out tasks ---------------------------------------------------------------------------------

def heldout_accuracy(actor, tasks):
    """Accuracy on held-out tasks, one greedy answer each. → {type: (accuracy, standard error)}"""
    hits = defaultdict(list)
    for rollout in actor.solve(tasks, temperature=0):
        hits[rollout.type].append(rollout.verdict is Verdict.CORRECT)
    return {kind: mean_error(hits[kind]) for kind in KINDS if hits[kind]}


def load_heldout(source, limit=None, executor=None):
    """{split: [Task]} of the held-out tasks of the tiny model ("tiny"), of CRUXEval from the Hugging Face hub
    ("cruxeval"), or of a file of JSON lines with `split` and the fields of a Task, or the fields of CRUXEval.

    limit: only the first N tasks of each type and split. executor: runs each program of a file, to compare
    its outputs with the task's. Raises UsageError with the line's number.
    """
    splits, where = defaultdict(list), ""
    shipped = source in ("tiny", "cruxeval")
    try:
        for number, row in enumerate(_heldout_rows(source), 1):
            where = f"line {number}: "
            row = json.loads(row) if isinstance(row, bytes) else row
            for part in _parts(row):
                task = _heldout_task(part, None if shipped else executor)
                tasks = splits[part["split"]]
                if limit is None or [other.type for other in tasks].count(task.type) < limit:
                    tasks.append(task)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"cannot read the held-out tasks {source} (JSON lines with split, type and the "
                         f"fields of a task): {where}{problem}") from error
    return dict(splits)


def _heldout_rows(source):
    """The lines of a file, or the rows of CRUXEval."""
    if source == "cruxeval":
        with reaching_the_hub() as datasets:
            return datasets.load_dataset("cruxeval-org/cruxeval", split="test",
                                         revision="e536997e8381421cb107d285b4ae542aa12c6c31")
    path = TINY / "heldout.jsonl" if source == "tiny" else source
    with open(path, "rb") as file:
        return file.read().splitlines()


@contextlib.contextmanager
def reaching_the_hub():
    """Yields the library `datasets` (slow to import). Its errors and those of the network become OSError."""
    import datasets
    from huggingface_hub.utils import httpx
    try:
        yield datasets
    except (datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise OSError(f"the Hugging Face hub: {error}") from error


def _parts(row):
    """The tasks of a row: one of each triplet type for a row of CRUXEval, otherwise the row itself."""
    if "code" not in row:
        return [row]
    return [{"split": "cruxeval", "type": kind, "program": row["code"], **row}
            for kind in KINDS if KINDS[kind].is_triplet]


def _heldout_task(row, executor):
    """A row of a held-out file → Task. Raises ValueError, KeyError or TypeError."""
    if row["type"] not in KINDS:
        raise ValueError(f"unknown type {row['type']!r}")
    kind = KINDS[row["type"]]
    needed = {"program", *(("inputs", "outputs") if "{pairs}" in kind.solve else ("input", "output"))}
    fields = {name: row[name] for name in Task.__match_args__ if name in row or name in needed}
    task = Task.from_dict(fields)
    if not isinstance(task.inputs, tuple) or not isinstance(task.outputs, tuple):
        raise ValueError("inputs or outputs is not a list")
    texts = [row["split"], task.program, task.input, task.output, task.message]
    for text in [*texts, *task.inputs, *task.outputs]:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not text")
    jobs, outputs = kind.runs(task), task.outputs or (task.output,)
    if len(jobs) != len(outputs) or not kind.judge(task, ""):
        raise ValueError("it has too few pairs of inputs and outputs")
    runs = executor.run(jobs) if executor else []
    for (_, text), run, output in zip(jobs, runs, outputs):
        if not run.ok or not equal(run.output, output):
            raise ValueError(f"f({text}) gives {run.output or run.error}, and the task says {output}")
    return task
