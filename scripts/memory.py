"""What a card needs, by simulation: peak memory of prompt pass, sampling and update at real model shapes.

    python scripts/memory.py                     # all sizes: about twenty minutes of one core
    python scripts/memory.py --shapes 3B         # one size

azr's own code runs on meta tensors, which have shapes and no data, and every storage that it makes is counted
until it is freed. Token ids are real, so that masks and lengths are; sampled tokens are all the same. What the
CUDA kernels take for themselves is added by hand (`_inside`). The CUDA context and fragmentation are not
simulated: CONTEXT is kept free for them. tests/test_scripts.py holds the method against real runs on a CPU.

The update has two micro-batches of rows of --length tokens, and AdamW has its moments; sampling is at its last
column, with the cache grown. Both are linear in their tokens, and what fits is read off the lines.
"""

import argparse
import contextlib
import sys
import weakref
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from shapes import SHAPES, make_policy
from tables import markdown
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from azr import trr_update
from model import Policy
from rewards import Rollout
from sampling import Sampler
from train import CARD, preset

CONTEXT = 1.0  # GB that a card loses to the CUDA context, libraries and fragmentation: an assumption
GB = 2 ** 30
aten = torch.ops.aten


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages made inside it and alive, and keeps the most of each phase."""

    def __init__(self):
        super().__init__()
        self.live, self.known, self.peaks, self.phase = 0, set(), {}, "start"

    def begin(self, phase):
        self.phase, self.peaks[phase] = phase, self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _sums_gradients(function, args):
            return args[0]
        if any(x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            result = _without_data(function, args, kwargs)
        else:
            result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live + _inside(function, args))
        return result

    def _count(self, storage):
        if storage._cdata not in self.known:
            size = -(-storage.nbytes() // 512) * 512  # CUDA's allocator gives blocks of 512 bytes
            self.known.add(storage._cdata)
            self.live += size
            weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key, size):
        self.known.remove(key)
        self.live -= size


def _sums_gradients(function, args):
    """Whether autograd adds a second gradient to a tensor's first. It does so in place, but not under a dispatch
    mode, where it would make a third tensor."""
    is_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if not is_backward or function is not aten.add.Tensor or not isinstance(args[1], torch.Tensor):
        return False
    return args[0].is_meta and args[0].shape == args[1].shape


def _without_data(function, args, kwargs):
    """An operation of which some tensor is meta. Those that must have a value get one."""
    if function is aten._local_scalar_dense.default:
        return 1.0 if args[0].is_floating_point() else 1
    if function in (aten.multinomial.default, aten.argmax.default):
        shape = function(*args, **kwargs).shape
        return torch.full(shape, args[0].shape[-1] // 2)  # the sampled token: one that ends nothing
    if function is aten._to_copy.default:  # to the CPU, where the ids are: it stays without data
        kwargs = kwargs | {"device": None}
    if function is aten.index.Tensor:  # how many are chosen is known of a real mask
        chosen = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool
            chosen += index.nonzero(as_tuple=True) if is_mask else [index]
        args = args[0], chosen
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    return function(*args, **kwargs)


def _inside(function, args):
    """Bytes that the CUDA kernel of an operation takes for itself while it runs."""
    if function is torch.ops.bitsandbytes.gemm_4bit.default:  # the weights unpacked, for many rows
        return args[2][0] * args[2][1] * args[0].element_size()
    if function is aten.multinomial.default:  # a random number for each probability
        return args[0].nbytes
    if function is aten._scaled_dot_product_flash_attention_backward.default:
        query, key = args[1:3]  # the query's gradient in fp32; the key's and value's for each query head
        return 4 * query.numel() + 2 * query.nbytes * (query.shape[1] != key.shape[1])
    return 0


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """scaled_dot_product_attention as CUDA does it: flash, or with a mask the memory-efficient kernel."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    columns = attn_mask.shape[-1]
    bias = functional.pad(attn_mask, (0, -columns % 16))[..., :columns]  # its kernel wants rows of 16
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias.expand(*query.shape[:3], columns), query.requires_grad, scale=scale)[0]


def as_list(tensor):
    """Tensor.tolist, also of a tensor without data: zeros stand for the logprobs of sampled tokens."""
    data = torch.zeros(tensor.shape) if tensor.is_meta else tensor
    return torch._C.TensorBase.tolist(data)


class OnMeta(Policy):
    """A Policy whose weights are meta and whose token ids are real."""

    device = torch.device("cpu")


@contextlib.contextmanager
def simulated(shape, weights, dtype=torch.bfloat16):
    """Yields a policy on meta tensors, an optimizer with its moments, and the Peak that counts."""
    with (mock.patch.object(functional, "scaled_dot_product_attention", attention),
          mock.patch.object(torch.Tensor, "tolist", as_list), Peak() as peak):
        policy = OnMeta(**vars(make_policy(shape, weights, "meta", dtype)))
        parameters = list(policy.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        yield policy, optimizer, peak


def update_peak(policy, optimizer, peak, micro_tokens, length):
    """Bytes at most of an update of two micro-batches, in rows of `length` tokens, two fifths of it response."""
    response = length * 2 // 5
    word = [policy.pad_id - 1]  # no end token
    rollout = Rollout("solve", "deduction", word * (length - response), word * response, advantage=1.0)
    rollouts = [rollout] * (2 * max(1, micro_tokens // length))
    peak.begin("update")
    trr_update(policy, optimizer, rollouts, preset(CARD), micro_tokens)
    return peak.peaks["update"]


def sampling_peaks(policy, peak, rows, prompt, tokens=2):
    """Bytes at most of (the prompt pass, decoding after it) for so many different prompts of that length."""
    def phase(module, args, kwargs):
        name = "decoding" if kwargs["input_ids"].shape[1] == 1 else "prompt pass"
        if name != peak.phase:
            peak.begin(name)

    peak.begin("prompt pass")
    hook = policy.causal.register_forward_pre_hook(phase, with_kwargs=True)
    Sampler(policy, rows).generate([[7] * prompt for _ in range(rows)], tokens)
    hook.remove()
    return peak.peaks["prompt pass"], peak.peaks["decoding"]


def most(low, high, room):
    """The x at which the line through two points (x, bytes) reaches `room`."""
    (x, below), (x2, above) = low, high
    return max(0, int(x + (room - below) * (x2 - x) / (above - below)))


def measure(shape, weights, options):
    """Two tables' rows: [one with the peaks], [one a card with what fits it]."""
    with simulated(shape, weights) as (policy, optimizer, peak):
        model, moments = peak.live, sum(2 * p.nbytes for p in policy.trainable().values())
        updates = [(tokens, update_peak(policy, optimizer, peak, tokens, options.length))
                   for tokens in options.micro_tokens]
        prompts, _ = sampling_peaks(policy, peak, options.prompts, options.prompt)
        decoding = [(rows * 1024, sampling_peaks(policy, peak, rows, 1024)[1]) for rows in (8, 32)]
    per_token = (decoding[1][1] - decoding[0][1]) / (decoding[1][0] - decoding[0][0])
    peaks = [shape, weights, f"{(model - moments) / GB:.1f}", *(f"{size / GB:.1f}" for _, size in updates),
             f"{prompts / GB:.1f}", f"{per_token / 1024:.0f}"]
    fits = []
    for card in options.cards:
        room = (card - CONTEXT) * GB
        micro_tokens, cached = most(updates[0], updates[-1], room), most(*decoding, room)
        fits.append([shape, weights, card, micro_tokens // 1024 * 1024, cached // 1000, cached // options.longest])
    return [peaks], fits


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B", "3B", "7B", "14B"])
    add("--weights", nargs="+", choices=("4bit", "bf16"), default=["4bit", "bf16"])
    add("--cards", nargs="+", type=int, default=[12, 16, 24], help="their memory in GB")
    add("--micro-tokens", nargs="+", type=int, default=[8192, 16384], help="of the update's peaks")
    add("--length", type=int, default=1024, help="tokens of a row in the update")
    add("--prompts", type=int, default=48, help="prompts of the prompt pass")
    add("--prompt", type=int, default=1430, help="tokens of each")
    add("--longest", type=int, default=preset(CARD).max_prompt + 2048,
        help="tokens of the longest row")
    options = parser.parse_args(arguments)
    peaks = [["GB at most", "weights", "model", *(f"update, {n} tokens" for n in options.micro_tokens),
              f"{options.prompts} prompts of {options.prompt}", "KB a cached token"]]
    fits = [["what fits", "weights", "card, GB", "micro_tokens", "rows of 1000", f"rows of {options.longest}"]]
    for shape in options.shapes:
        for weights in options.weights:
            for table, rows in zip((peaks, fits), measure(shape, weights, options)):
                table += rows
                print(*rows, sep="\n", file=sys.stderr, flush=True)
    print(f"{markdown(peaks)}\n\n{markdown(fits)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
