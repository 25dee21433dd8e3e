"""Several processes, one policy: torchrun --nproc-per-node 4 train.py

Each process, a *rank*, holds the complete policy, the same buffers, and the same random state for choosing
tasks. Each samples and judges its own share (`spread`) and computes its part of the gradient
(`sum_gradients`). Only rank 0 writes files. With a single process, every function here does nothing. All
communication uses gloo, also in the tests.
"""

import contextlib
import hashlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

PATIENCE = timedelta(minutes=30)  # ranks wait this long for the slowest one, and then all end


class RankError(OSError):
    """A rank is lost, or its weights differ from the others'."""


@contextlib.contextmanager
def joined():
    """Context in which the processes started by torchrun are the ranks of one run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        if ranks() > 1:
            dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print on standard error, above the progress bar. Only rank 0 prints."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def workers():
    """Sandbox workers of this rank, because ranks share the cores. None (all cores) for one process."""
    return max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])) if ranks() > 1 else None


def seed_sampling(rng):
    """From here on each rank draws its own random numbers. A single process's random state is left alone."""
    if ranks() > 1:
        torch.manual_seed(rng.getrandbits(60) + rank())


def share(rollouts, group=id):
    """The rollouts of this rank. Those of the same group(rollout) stay together.

    The groups are dealt out by their number of tokens, longest first, in alternating order of the ranks.
    """
    groups = {}
    for rollout in rollouts:
        groups.setdefault(group(rollout), []).append(rollout)
    turns = [*range(ranks()), *reversed(range(ranks()))]
    mine = []
    order = sorted(groups.values(), key=lambda members: -sum(rollout.tokens for rollout in members))
    for turn, members in enumerate(order):
        if turns[turn % len(turns)] == rank():
            mine += members
    return mine


def spread(requests, work):
    """work(requests), divided among the ranks. → its results on every rank, in the order of the requests

    work must return the same number of results for each request, next to each other.
    """
    if ranks() == 1:
        return work(requests)
    mine = share(requests)
    results = work(mine)
    each = len(results) // max(1, len(mine))
    place = {id(request): place for place, request in enumerate(requests)}
    own = {}
    for turn, request in enumerate(mine):
        own[place[id(request)]] = results[turn * each:(turn + 1) * each]
    found, ordered = {}, []
    for parts in gather(own):
        found |= parts
    for place in range(len(requests)):
        ordered += found[place]
    return ordered


def sum_gradients(parameters, figures):
    """Sum the ranks' gradients, in place, and their figures, in one reduction. → [sum of each figure]"""
    if ranks() == 1:
        return figures
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters] + [torch.tensor(figures)]
    sums = torch.cat([part.flatten().float().cpu() for part in parts])
    _together(dist.all_reduce, sums)
    *grads, figures = sums.split([part.numel() for part in parts])
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.view_as(parameter).to(parameter)
    return figures.tolist()


def gather(value):
    """The value of each rank, in order, on every rank."""
    values = [value] * ranks()
    if ranks() > 1:
        _together(dist.all_gather_object, values, value)
    return values


def of_first(value):
    """The value of rank 0, on every rank."""
    return gather(value)[0]


def check_same(tensors):
    """Raises RankError unless the tensors of all ranks are equal bit for bit, because they are one policy."""
    digest = hashlib.sha256()
    for tensor in tensors if ranks() > 1 else ():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digests = gather(digest.digest())
    strangers = [rank for rank in range(ranks()) if digests[rank] != digests[0]]
    if strangers:
        raise RankError(f"the weights of ranks {strangers} are not those of rank 0")


def _together(collective, *values):
    """A collective operation. Raises RankError, which on rank 0 names the missing ranks."""
    try:
        dist.monitored_barrier(timeout=PATIENCE, wait_all_ranks=True)
        collective(*values)
    except RuntimeError as error:  # the one class that gloo raises
        reason = str(error).splitlines()[0] if rank() == 0 else "rank 0 is gone, or says which"
        raise RankError(f"another rank is lost: {reason}") from error
