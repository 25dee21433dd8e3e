"""Several processes, one policy: torchrun --nproc-per-node 4 train.py

Each process, a *rank*, holds the whole policy, the same buffers, and the same random numbers for all that is
chosen. They differ in what each samples and judges (`spread`), in its part of the gradient (`sum_gradients`),
and in that rank 0 alone writes. With a single process, every function here does nothing. All communication
uses gloo, also in the tests.
"""

import contextlib
import hashlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

PATIENCE = timedelta(minutes=30)  # how long ranks wait for the slowest; one that hangs ends all after this


class RankError(OSError):
    """A rank is lost, or is no longer what the others are."""


@contextlib.contextmanager
def joined():
    """In this context the processes that torchrun has started are the ranks of one run."""
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
    """Rank 0 says it on standard error, above the progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def workers():
    """Sandbox workers of this rank, which shares the cores with others; None, for all cores, if alone."""
    return max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])) if ranks() > 1 else None


def seed_sampling(rng):
    """From here on each rank draws its own random numbers. A single process's random state is left alone."""
    if ranks() > 1:
        torch.manual_seed(rng.getrandbits(60) + rank())


def share(rollouts, group=id):
    """This rank's: groups of the same group(rollout), dealt by tokens, longest first, back and forth."""
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
    """work(requests), which gives as many results for each, next to each other. → the same on every rank"""
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
    """What each rank has, in their order, on every rank."""
    values = [value] * ranks()
    if ranks() > 1:
        _together(dist.all_gather_object, values, value)
    return values


def of_first(value):
    """What rank 0 has, on every rank."""
    return gather(value)[0]


def check_same(tensors):
    """Raises RankError if the ranks' tensors are not equal to the bit, as those of one policy must be."""
    digest = hashlib.sha256()
    for tensor in tensors if ranks() > 1 else ():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digests = gather(digest.digest())
    strangers = [rank for rank in range(ranks()) if digests[rank] != digests[0]]
    if strangers:
        raise RankError(f"the weights of ranks {strangers} are not those of rank 0")


def _together(collective, *values):
    """What all ranks do at once. Raises RankError, which on rank 0 names those that did not come."""
    try:
        dist.monitored_barrier(timeout=PATIENCE, wait_all_ranks=True)
        collective(*values)
    except RuntimeError as error:  # the one class that gloo raises
        reason = str(error).splitlines()[0] if rank() == 0 else "rank 0 is gone, or says which"
        raise RankError(f"another rank is lost: {reason}") from error
