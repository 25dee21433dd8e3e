"""Sampling that keeps every row busy. It gives what plain `generate` of transformers gives, row by row:

    ids_BP, mask_BP = left_pad([prompt for prompt in prompts for _ in range(copies)])
    ids_BT = model.generate(ids_BP, attention_mask=mask_BP, max_new_tokens=max_tokens, do_sample=True,
                            top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0, eos_token_id=end_ids,
                            pad_token_id=pad_id, stop_strings=["</answer>"], tokenizer=tokenizer)
    responses = [cut_after_end(ids) for ids in ids_BT[:, ids_BP.shape[1]:].tolist()]
    # greedily to the token; sampled, from the same distribution

Four things make it faster: a prompt is read once for all its copies (`_prefill`), rows that finish make room
for prompts that wait (`generate`), the cache is neither copied at every token (`RoomyLayer`) nor once a query
head (`grouped_sdpa`), and a GPU decodes by replaying a CUDA graph (`_replayed`). Axes as in azr.py: B rows,
P prompt tokens, T prompt and response tokens.
"""

import contextlib
import functools
import os
import warnings
from bisect import bisect_left
from dataclasses import dataclass

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # caches have many sizes

import psutil
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA attention, without its copies of the cache. → ([row, token, head, feature], None)

    query: [row, head, token, feature]; key, value: [row, key head, column, feature]. When one token is
    decoded, heads that share a key head stand in for tokens: the same sums, but where there is a mask
    transformers first repeats the cache for each of those heads (8 for Qwen2.5-3B), at every token. On a CPU
    the sums are written out, since torch's kernel, made for many tokens, takes twice as long for one.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1 or any(options.get(name) for name in ("dropout", "position_bias", "cache")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    if query.is_cpu:
        scores = grouped @ key.transpose(2, 3) * (width ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            lowest = torch.finfo(scores.dtype).min  # not -inf: a row may be all padding
            scores.masked_fill_(~attention_mask, lowest)
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        mixed = functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_sdpa", grouped_sdpa)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)

SEGMENT = 16  # tokens between two looks at the batch, at least; 4 times as many where each captures a graph
BLOCK = 128   # columns by which a cache grows: few sizes, so that memory is used again
ROWS = 512    # sampled at once, at most
torch.backends.cuda.enable_cudnn_sdp(False)  # Hopper's first choice, which plans anew for every length


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room behind them: a new column is written in place, where DynamicLayer
    copies all that came before it, at every token. Keys and values are [row, head, column, feature]."""

    room = None  # tensors that self.keys and self.values are the first columns of
    at = None    # a tensor with the next column, where a graph of operations must not hold the number itself

    def update(self, keys, values, *args, **kwargs):
        if self.at is not None:
            for room, new in zip(self.room, (keys, values)):
                room.index_copy_(2, self.at, new)
            return self.room
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = (x[:, :, :0] for x in (keys, values))
        start, end = self.get_seq_length(), self.get_seq_length() + keys.shape[-2]
        self.reserve(end)
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = keys, values
        self.show(end)
        return self.keys, self.values

    def reserve(self, columns):
        """Make room for so many columns in all, if there is less."""
        if self.room is None or columns > self.room[0].shape[-2]:
            size = (columns // BLOCK + 1) * BLOCK
            room = [x.new_zeros(*x.shape[:2], size, x.shape[-1]) for x in (self.keys, self.values)]
            start = self.get_seq_length()
            room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
            self.room = room
            self.show(start)  # lets go of the old one, a layer at a time

    def show(self, columns):
        """Count so many columns of the room as written."""
        self.keys, self.values = (x[:, :, :columns] for x in self.room)

    def put(self, change, *others):
        """Replace keys and values by change(keys, …) and change(values, …) of this and other layers."""
        self.keys = change(self.keys, *(layer.keys for layer in others))
        self.values = change(self.values, *(layer.values for layer in others))
        self.room = None

    def batch_select_indices(self, indices):
        self.put(lambda x: x[indices])


def _can_grow(cache):
    """Whether rows may join: not with sliding windows, whose layers forget the padding's place."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def attends_to_all(config):
    """Whether each token of a model sees all before it, in every layer, and may be told by a mask which."""
    layers = DynamicCache(config=config).layers
    return config.get_text_config()._attn_implementation == "grouped_sdpa" and bool(layers) and all(
        type(layer) is DynamicLayer for layer in layers)


@dataclass
class _Batch:
    """Rows that are being sampled: left-padded ids, their mask, and a cache of all but the last column."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    cache: DynamicCache
    owners: list   # row → index of its response
    lengths: list  # row → response tokens so far, the last columns of ids_BT

    def pad_left(self, columns):
        """Shift all rows right by so many masked columns."""
        self.ids_BT, self.mask_BT = (functional.pad(x, (columns, 0)) for x in (self.ids_BT, self.mask_BT))
        for layer in self.cache.layers:
            layer.put(lambda x: functional.pad(x, (0, 0, columns, 0)))

    def keep(self, rows):
        """Drop all other rows, and the columns that only they needed."""
        index = torch.tensor(rows, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
        self.cache.batch_select_indices(index)
        self.owners, self.lengths = [self.owners[r] for r in rows], [self.lengths[r] for r in rows]
        idle = int(self.mask_BT.any(0).int().argmax())
        if idle and _can_grow(self.cache):
            self.ids_BT, self.mask_BT = self.ids_BT[:, idle:], self.mask_BT[:, idle:]
            for layer in self.cache.layers:
                layer.put(lambda x: x[:, :, idle:])


def _join(batch, other):
    """One batch with the rows of both; the first may be None."""
    if batch is None:
        return other
    gap = batch.ids_BT.shape[1] - other.ids_BT.shape[1]
    (other if gap > 0 else batch).pad_left(abs(gap))
    for ours, theirs in zip(batch.cache.layers, other.cache.layers):
        ours.put(lambda *pair: torch.cat(pair), theirs)
    ids_BT, mask_BT = torch.cat([batch.ids_BT, other.ids_BT]), torch.cat([batch.mask_BT, other.mask_BT])
    return _Batch(ids_BT, mask_BT, batch.cache, batch.owners + other.owners, batch.lengths + other.lengths)


@contextlib.contextmanager
def _replayed(causal, batch, tokens):
    """In it so many tokens are decoded by replaying a CUDA graph, where causal.forward is called.

    The first token runs as always. The second is captured, which the others replay: Python launches one graph
    a token instead of the thousands of kernels in it, which take longer to launch than to run. What changes
    from token to token stands in tensors, so each reads the whole room of the cache, under a mask. The graph
    holds only for this batch and this room: the next segment captures its own.
    """
    own, plain = "forward" in vars(causal), causal.forward
    layers, begin = batch.cache.layers, batch.ids_BT.shape[1] - 1
    for layer in layers:
        layer.reserve(begin + tokens)
    ids_B1, at = torch.empty_like(batch.ids_BT[:, -1:]), batch.ids_BT.new_empty(1)
    unwritten = layers[0].room[0].shape[2] - batch.mask_BT.shape[1]
    mask_B11T = functional.pad(batch.mask_BT, (0, unwritten)).bool()[:, None, None]
    replay = output = None

    def decode():
        nonlocal output
        mask_B11T.index_fill_(-1, at, True)
        for layer in layers:
            layer.at = at
        output = plain(input_ids=ids_B1, attention_mask=mask_B11T, past_key_values=batch.cache,
                       position_ids=mask_B11T[:, 0].sum(-1) - 1)
        for layer in layers:
            layer.at = None

    @functools.wraps(plain)  # transformers looks at the signature
    def forward(input_ids, past_key_values, **options):
        nonlocal replay
        end = past_key_values.get_seq_length()
        if end == begin:
            return plain(input_ids=input_ids, past_key_values=past_key_values, **options)
        ids_B1.copy_(input_ids)
        at.fill_(end)
        replay = replay or capture(decode)
        replay()
        for layer in layers:
            layer.show(end + 1)
        return output

    causal.forward = forward
    try:
        yield
    finally:
        del causal.forward  # not `= plain`, which would be a cycle that keeps the model in memory
        if own:
            causal.forward = plain


def uses_graphs(policy):
    """Whether decoding can be captured: on a GPU, where no operation waits to see what another gave."""
    config = policy.causal.config
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return (policy.device.type == "cuda" and policy.causal._can_compile_fullgraph and attends_to_all(config)
            and rope.get("rope_type") not in ("dynamic", "longrope"))  # these look at the longest position


def capture(operations):
    """What `operations` does on the GPU, as a function that does it again without running its Python."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operations()
    return graph.replay


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
    rows that memory allows are always busy and nobody waits for the longest response. How many
    that are follows from the lengths seen so far. Rows that then grow too long for it wait, and are
    read again with what they have said; the same after running out of GPU memory, with half the rows.
    """
    policy.causal.eval()
    # every sampling field explicit: none is left for a model's own configuration to fill in
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_p": 1.0,
                                               "top_k": 0, "repetition_penalty": 1.0}
    responses = [[]] * (len(prompts) * copies)  # as far as they are sampled
    waiting = [i * copies + copy for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
               for copy in range(copies)]  # longest prompts first, so that later ones fit in beside them
    free, batch, graphs = free_memory(policy.device), None, uses_graphs(policy)
    least = SEGMENT * 4 if graphs else SEGMENT
    while waiting or batch:
        busy = batch.owners if batch else []
        unfinished = busy + waiting
        width = max(len(prompts[i // copies]) + len(responses[i]) for i in unfinished)
        if len(busy) > _rows_that_fit(policy, free, width + least):
            waiting, batch = unfinished, None  # read again, fewer at once
            continue
        rows = _rows_that_fit(policy, free, width + least + min(max_tokens, policy.mean_tokens))
        try:
            if waiting and (not busy or _can_grow(batch.cache) and len(busy) <= rows * 3 // 4):
                joining = waiting[:rows - len(busy)]
                batch = _join(batch, _prefill(policy, prompts, copies, responses, joining))
                waiting = waiting[len(joining):]
            segment = max(least, min(batch.lengths) // 4)
            segment = min(segment, max_tokens - max(batch.lengths))
            width = batch.ids_BT.shape[1]
            with _replayed(policy.causal, batch, segment) if graphs else contextlib.nullcontext():
                batch.ids_BT = policy.causal.generate(
                    batch.ids_BT, attention_mask=batch.mask_BT, past_key_values=batch.cache,
                    eos_token_id=sorted(policy.end_ids), pad_token_id=policy.pad_id, max_new_tokens=segment,
                    **how)
        except torch.OutOfMemoryError:
            policy.rows = min(rows, len(unfinished)) // 2
            if not policy.rows:
                raise
            warnings.warn(f"out of GPU memory in sampling: at most {policy.rows} rows from now on")
            waiting, batch = unfinished, None
            continue
        added = batch.ids_BT.shape[1] - width
        batch.mask_BT = functional.pad(batch.mask_BT, (0, added), value=1)
        alive = []
        for row, ids in enumerate(batch.ids_BT.tolist()):
            length = batch.lengths[row] = batch.lengths[row] + added
            end = _end_of(policy, ids[-length:], length - added)
            responses[batch.owners[row]] = ids[-length:][:end]
            if end is None and length < max_tokens:
                alive.append(row)
        if not alive:
            batch = None
        elif len(alive) < len(batch.owners):
            batch.keep(alive)
    if responses:
        policy.mean_tokens = sum(map(len, responses)) / len(responses)
    return responses


def _prefill(policy, prompts, copies, responses, owners):
    """Read the prompts of these responses, and what they have said, into a batch with a row a response.

    Rows that begin alike are read once. Too many tokens for one pass are read half by half.
    """
    keys = [(*prompts[owner // copies], *responses[owner]) for owner in owners]
    texts = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    width = max(2, *map(len, texts))  # at least one column for the cache
    cache = DynamicCache(config=policy.causal.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if _can_grow(cache) and len(texts) > 1 and len(texts) * width > _tokens_in_a_pass(policy):
        halves = owners[:len(owners) // 2], owners[len(owners) // 2:]
        return _join(*(_prefill(policy, prompts, copies, responses, half) for half in halves))
    gaps = [width - len(ids) for ids in texts]
    ids_BT = [[policy.pad_id] * gap + [*ids] for gap, ids in zip(gaps, texts)]
    mask_BT = [[0] * gap + [1] * (width - gap) for gap in gaps]
    ids_BT, mask_BT = (torch.tensor(x, device=policy.device) for x in (ids_BT, mask_BT))
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    # all but the last token, which generate reads itself
    policy.causal(input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1],
                  position_ids=positions_BT[:, :-1], past_key_values=cache, logits_to_keep=1)
    rows = torch.tensor([texts[key] for key in keys], device=policy.device)
    cache.batch_select_indices(rows)
    return _Batch(ids_BT[rows], mask_BT[rows], cache, list(owners), [len(responses[i]) for i in owners])


def _end_of(policy, ids, checked):
    """How many tokens of `ids` belong to the response, or None while it goes on.

    The first `checked` tokens are known not to end it; `</answer>` may start among them.
    """
    start = max(0, checked - len("</answer>"))
    stop = next((i + 1 for i in range(checked, len(ids)) if ids[i] in policy.end_ids), None)
    if "</answer>" not in policy.decode(ids[start:stop]):
        return stop
    ends = range(start + 1, stop or len(ids))  # the first that takes in the closing tag
    return start + 1 + bisect_left(ends, True, key=lambda end: "</answer>" in policy.decode(ids[start:end]))


def free_memory(device):
    """Bytes that new tensors can take there."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _rows_that_fit(policy, free, columns):
    """Rows of so many columns whose keys and values fill at most 60% of the free memory; at most ROWS."""
    if policy.rows:
        return policy.rows
    config = policy.causal.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * policy.causal.dtype.itemsize
    # a layer whose room is used up is there twice for a moment, and logits of a step are held in
    # fp32 a few times over
    per_row = per_token * (columns + BLOCK) * 1.1 + 16 * config.vocab_size
    return max(1, min(ROWS, int(0.6 * free / per_row)))


def _tokens_in_a_pass(policy):
    """Tokens of prompts to read at once, in 3 GiB: simulated, one takes 195 kB at 3B and 329 kB at 7B."""
    width = inner_width(policy.causal.config.get_text_config())
    return 3 * 2 ** 30 // (9 * width * policy.causal.dtype.itemsize)


def inner_width(config):
    """The width inside an MLP; four times the outer one where a config has another name for it."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


@torch.no_grad()
def decoded_logprobs(policy, rollouts, tokens):
    """Logprobs of the first `tokens` tokens of each response, decoded one by one as in sampling. → [B, N]"""
    batch = _prefill(policy, [r.prompt_ids for r in rollouts], 1, [[]] * len(rollouts), range(len(rollouts)))
    ids_B1, mask_BT, logps = batch.ids_BT[:, -1:], batch.mask_BT, []
    targets_BN = torch.tensor([r.response_ids[:tokens] for r in rollouts], device=policy.device)
    with _replayed(policy.causal, batch, tokens) if uses_graphs(policy) else contextlib.nullcontext():
        for targets_B1 in targets_BN.split(1, 1):
            logits_BV = policy.causal(input_ids=ids_B1, attention_mask=mask_BT, past_key_values=batch.cache,
                                      position_ids=mask_BT.sum(1, keepdim=True) - 1).logits[:, 0]
            logps.append(torch.log_softmax(logits_BV.float(), -1).gather(1, targets_B1))
            ids_B1, mask_BT = targets_B1, functional.pad(mask_BT, (0, 1), value=1)
    return torch.cat(logps, 1)
