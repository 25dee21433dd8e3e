"""Several processes, one policy: torchrun --nproc-per-node 4 train.py

Each process, a *rank*, holds the whole policy on its own card, the same buffers, and the same random numbers
for everything that is chosen. So all ranks come to the same step, and only three things differ:

    spread          each rank samples and judges its share of the prompts; all get all rollouts
    sum_gradients   each rank computes its share of the gradient; all take the same step
    is_first        rank 0 alone writes

One process alone passes through here without effect. Everything travels by gloo, on cards too, so that what
is tested on a CPU is what runs: an adapter's gradients are megabytes a step, and a rollout is kilobytes.
"""

import contextlib
import hashlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=30)  # how long ranks wait for the slowest; one that hangs ends all after this


class RankError(OSError):
    """A rank is lost, or is no longer what the others are."""


@contextlib.contextmanager
def joined():
    """A context in which the processes that torchrun has started are the ranks of one run."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    return rank() == 0


def on_this_machine():
    """(this rank's number among the ranks of its machine, how many they are)"""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share(rollouts):
    """Those that are this rank's: dealt by tokens, longest first, back and forth over the ranks."""
    turns = [*range(ranks()), *reversed(range(ranks()))]
    order = sorted(rollouts, key=lambda rollout: -rollout.tokens)
    return [rollout for turn, rollout in enumerate(order) if turns[turn % len(turns)] == rank()]


def spread(requests, work):
    """work(requests), each rank on its share. → all results in the requests' order, the same on every rank

    work gives the same number of results for each request, next to each other.
    """
    if ranks() == 1:
        return work(requests)
    places = {id(request): place for place, request in enumerate(requests)}
    mine = share(requests)
    results = work(mine)
    each = len(results) // max(1, len(mine))
    own = {places[id(request)]: results[turn * each:(turn + 1) * each] for turn, request in enumerate(mine)}
    found = {place: part for parts in gather(own) for place, part in parts.items()}
    return [result for place in range(len(requests)) for result in found[place]]


def sum_gradients(parameters, figures):
    """Sum the ranks' gradients, in place, and their figures, in one reduction. → [sum of each figure]"""
    if ranks() == 1:
        return figures
    parameters = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten().cpu() for grad in grads] + [torch.tensor(figures, dtype=grads[0].dtype)])
    _together(lambda: dist.all_reduce(flat))
    *sums, figures = flat.split([grad.numel() for grad in grads] + [len(figures)])
    for parameter, total in zip(parameters, sums):
        parameter.grad = total.view_as(parameter).to(parameter.device)
    return figures.tolist()


def gather(value):
    """What each rank has, in their order. → [value], the same on every rank"""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    _together(lambda: dist.all_gather_object(values, value))
    return values


def of_first(value):
    """What rank 0 has, for every rank."""
    box = [value]
    if ranks() > 1:
        _together(lambda: dist.broadcast_object_list(box))
    return box[0]


def check_same(tensors):
    """Raises RankError if the ranks' tensors are not equal to the bit, as those of one policy must be."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digests = gather(digest.digest())
    strangers = [place for place in range(ranks()) if digests[place] != digests[0]]
    if strangers:
        raise RankError(f"the weights of rank {', '.join(map(str, strangers))} are not those of rank 0")


def _together(collective):
    """Do what all ranks do at once. Raises RankError, which on rank 0 names those that did not come."""
    try:
        dist.monitored_barrier(timeout=PATIENCE, wait_all_ranks=True)
        collective()
    except RuntimeError as error:  # the only class that gloo raises
        who = "; ".join(str(error).splitlines()[:1]) if is_first() else "rank 0 is gone, or says which"
        raise RankError(f"rank {rank()} has lost another: {who}") from error
