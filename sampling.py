"""Sampling that keeps every row busy. Each row gets what transformers' plain `generate` would give:

    ids_BP, mask_BP = left_pad([prompt for prompt in prompts for _ in range(copies)])
    ids_BT = model.generate(ids_BP, attention_mask=mask_BP, max_new_tokens=max_tokens, do_sample=True,
                            top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0, eos_token_id=end_ids,
                            pad_token_id=pad_id, stop_strings=["</answer>"], tokenizer=tokenizer)
    responses = [cut_after_end(ids) for ids in ids_BT[:, ids_BP.shape[1]:].tolist()]
    # the same tokens if greedy, otherwise the same distribution

Four things make it faster: a prompt is read once for all its copies (`_prefill`), finished rows make room for
waiting prompts (`Sampler.stream`), the cache is copied neither at every token (`RoomyLayer`) nor for every
query head (`grouped_sdpa`), and a GPU decodes by replaying a CUDA graph (`_Replay`).

Axes: B rows, P prompt tokens, T prompt and response tokens, N tokens of a segment, V vocabulary.
"""

import contextlib
import functools
import math
import os
import warnings
from bisect import bisect_left
from dataclasses import dataclass, field

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # caches have many sizes

import psutil
import torch
from torch.nn import functional
from transformers import (AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor,
                          LogitsProcessorList)
from transformers.cache_utils import (DynamicLayer, DynamicSlidingWindowLayer,
                                      LinearAttentionAndFullAttentionLayer,
                                      LinearAttentionAndSlidingWindowAttentionLayer, LinearAttentionLayer)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks import UsageError


def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA attention, without its copies of the cache. → ([row, token, head, feature], None)

    query: [row, head, token, feature]. key, value: [row, key head, column, feature]. When one token is
    decoded, heads that share a key head take the place of tokens. The sums are the same, whereas with a mask
    transformers first repeats the cache for each of those heads (8 for Qwen2.5-3B), at every token. On a CPU
    the sums are written out, because torch's kernel is made for many tokens and takes twice as long for one.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1 or any(options.get(name) for name in ("dropout", "position_bias", "cache")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    if query.is_cpu:
        scores = grouped @ key.transpose(2, 3) * (width ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            lowest = torch.finfo(scores.dtype).min  # not -inf, because a row may be all padding
            scores.masked_fill_(~attention_mask, lowest)
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        mixed = functional.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register("grouped_sdpa", grouped_sdpa)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)

SEGMENT = 8         # least tokens before rows may join or leave
GRAPH_SEGMENT = 64  # the same if each segment captures its own CUDA graph
BLOCK = 128   # columns by which a cache grows. There are few sizes, so that memory is reused
ROWS = 512    # most rows sampled at once
torch.backends.cuda.enable_cudnn_sdp(False)  # the default on Hopper, which makes a new plan for every length


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with spare columns. A new column is written in place, whereas DynamicLayer
    copies all earlier columns at every token. Keys and values are [row, head, column, feature]."""

    room = None  # two tensors, whose first columns are self.keys and self.values
    at = None    # the next column as a tensor, because a CUDA graph must not record the number itself

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
        """Make room for this many columns in total, if there is less."""
        if self.room is None or columns > self.room[0].shape[-2]:
            size = (columns // BLOCK + 1) * BLOCK
            room = [x.new_zeros(*x.shape[:2], size, x.shape[-1]) for x in (self.keys, self.values)]
            start = self.get_seq_length()
            room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
            self.room = room
            self.show(start)  # frees the old room, one layer at a time

    def show(self, columns):
        """Count this many columns of the room as written."""
        self.keys, self.values = (x[:, :, :columns] for x in self.room)

    def put(self, change, *others):
        """Replace keys and values by change(keys, …) and change(values, …) of this and other layers."""
        self.keys = change(self.keys, *(layer.keys for layer in others))
        self.values = change(self.values, *(layer.values for layer in others))
        self.room = None

    def reorder_cache(self, rows):
        self.put(lambda x: x[rows])


class RoomyMixedLayer(RoomyLayer, LinearAttentionAndFullAttentionLayer):
    """A RoomyLayer that holds the states of a recurrent block as well, as Falcon-H1's layers do."""

    def reorder_cache(self, rows):
        super().reorder_cache(rows)
        LinearAttentionLayer.reorder_cache(self, rows)


def _empty_cache(config):
    """A cache for any model. Its attention layers have room, except sliding windows and the like."""
    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = RoomyLayer()
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            cache.layers[place] = RoomyMixedLayer(layer.number_of_states)
    return cache


def _can_grow(cache):
    """Whether rows may join. Attention masks their padding, and states of recurrent and convolutional layers
    have no columns to pad. Not with sliding windows, because their layers forget where the padding is."""
    return all(type(layer) in (RoomyLayer, RoomyMixedLayer, LinearAttentionLayer) for layer in cache.layers)


def _append_rows(layer, other):
    """Append another layer's rows: keys and values with the same number of columns, and states."""
    if isinstance(layer, RoomyLayer):
        layer.put(lambda *pair: torch.cat(pair), other)
    if isinstance(layer, LinearAttentionLayer):
        for ours, theirs in ((layer.conv_states, other.conv_states),
                             (layer.recurrent_states, other.recurrent_states)):
            for place, state in ours.items():
                if state is not None:
                    ours[place] = torch.cat([state, theirs[place]])


def has_dense_attention(config):
    """Whether all attention of a model is full or in windows, so that `grouped_sdpa` may replace SDPA.

    Models with sparse attention, such as DeepSeek V3.2's, select their tokens only if the implementation
    has the name "sdpa" or "eager", and are silently dense under any other.
    """
    dense = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer,
             LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
    return all(type(layer) in dense for layer in DynamicCache(config=config).layers)


def attends_to_all(config):
    """Whether in every layer a token attends to all earlier ones, or to those that a given mask selects."""
    layers = DynamicCache(config=config).layers
    return config.get_text_config()._attn_implementation == "grouped_sdpa" and bool(layers) and all(
        type(layer) is DynamicLayer for layer in layers)


@dataclass
class _Batch:
    """Rows that are being sampled: left-padded ids, their mask, and a cache of all but the last column."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    cache: DynamicCache
    completions: list  # row → Completion, whose tokens are the last columns of ids_BT

    def can_grow(self):
        """Whether rows may join. They may not once a model has replaced the cache with its own. For example,
        Phi-3 does so in mid-response, when it switches to other rotary embeddings."""
        return _can_grow(self.cache) and self.cache.get_seq_length() == self.ids_BT.shape[1] - 1

    def change_columns(self, change):
        """Replace keys and values by change(keys) and change(values) in every layer that has columns."""
        for layer in self.cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.put(change)

    def pad_left(self, columns):
        """Shift all rows to the right by this many masked columns."""
        self.ids_BT, self.mask_BT = (functional.pad(x, (columns, 0)) for x in (self.ids_BT, self.mask_BT))
        self.change_columns(lambda x: functional.pad(x, (0, 0, columns, 0)))

    def keep(self, rows):
        """Drop all other rows, and the columns that only they needed."""
        index = torch.tensor(rows, device=self.ids_BT.device)
        self.ids_BT, self.mask_BT = self.ids_BT[index], self.mask_BT[index]
        self.cache.reorder_cache(index)
        self.completions = [self.completions[row] for row in rows]
        idle = int(self.mask_BT.any(0).int().argmax())
        if idle and self.can_grow():
            self.ids_BT, self.mask_BT = self.ids_BT[:, idle:], self.mask_BT[:, idle:]
            self.change_columns(lambda x: x[:, :, idle:])


def _join(batch, other):
    """One batch with the rows of both. The first may be None."""
    if batch is None:
        return other
    gap = batch.ids_BT.shape[1] - other.ids_BT.shape[1]
    (other if gap > 0 else batch).pad_left(abs(gap))
    for ours, theirs in zip(batch.cache.layers, other.cache.layers):
        _append_rows(ours, theirs)
    ids_BT, mask_BT = torch.cat([batch.ids_BT, other.ids_BT]), torch.cat([batch.mask_BT, other.mask_BT])
    return _Batch(ids_BT, mask_BT, batch.cache, batch.completions + other.completions)


class _Replay:
    """Context in which `causal.forward` decodes this many tokens of a batch by replaying a CUDA graph.

    The first token runs as usual. The second is captured, and the others replay it, so that Python launches
    one graph per token instead of thousands of kernels, which take longer to launch than to run. Values that
    change from token to token are in tensors, so each token reads the whole room of the cache, under a mask.
    The graph is valid only for this batch and this room, so the next segment captures its own.
    """

    def __init__(self, causal, batch, tokens):
        self.causal, self.cache = causal, batch.cache
        self.begin = batch.ids_BT.shape[1] - 1  # columns of the cache before the first token
        for layer in self.cache.layers:
            layer.reserve(self.begin + tokens)
        unwritten = self.cache.layers[0].room[0].shape[2] - batch.mask_BT.shape[1]
        self.ids_B1 = torch.empty_like(batch.ids_BT[:, -1:])
        self.column = batch.ids_BT.new_empty(1)
        self.mask_B11T = functional.pad(batch.mask_BT, (0, unwritten)).bool()[:, None, None]
        self.graph = self.output = None

    def __enter__(self):
        self.had_own = "forward" in vars(self.causal)
        self.plain = self.causal.forward
        # wraps, because transformers reads the signature, and partial, because a method takes no attributes
        self.causal.forward = functools.wraps(self.plain)(functools.partial(self.forward))

    def __exit__(self, *error):
        del self.causal.forward  # assigning it would make a reference cycle that keeps the model in memory
        if self.had_own:
            self.causal.forward = self.plain

    def forward(self, input_ids, past_key_values, **options):
        column = past_key_values.get_seq_length()
        if column == self.begin:
            return self.plain(input_ids=input_ids, past_key_values=past_key_values, **options)
        self.ids_B1.copy_(input_ids)
        self.column.fill_(column)
        if self.graph is None:
            self.graph = capture(self.decode)
        self.graph()
        for layer in self.cache.layers:
            layer.show(column + 1)
        return self.output

    def decode(self):
        """The operations of one token, which read and write the same tensors each time."""
        self.mask_B11T.index_fill_(-1, self.column, True)
        for layer in self.cache.layers:
            layer.at = self.column
        positions_B1 = self.mask_B11T[:, 0].sum(-1) - 1
        self.output = self.plain(input_ids=self.ids_B1, attention_mask=self.mask_B11T,
                                 past_key_values=self.cache, position_ids=positions_B1)
        for layer in self.cache.layers:
            layer.at = None


def uses_graphs(policy):
    """Whether decoding can be captured: on a GPU, if no operation has to read a result back."""
    config = policy.causal.config
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return (policy.device.type == "cuda" and policy.causal._can_compile_fullgraph and attends_to_all(config)
            and rope.get("rope_type") not in ("dynamic", "longrope"))  # these read the longest position


def capture(operations):
    """Capture the GPU work of `operations`. → a function that repeats this work without its Python code"""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operations()
    return graph.replay


class _LogprobRecorder(LogitsProcessor):
    """Records the logprob of each token that `generate` samples. It sees the logits of a step before they are
    divided by the temperature, and the token that was chosen from them one step later."""

    def __init__(self):
        self.logps, self.logits_BV = [], None

    def __call__(self, ids_BT, logits_BV):
        self.settle(ids_BT)
        self.logits_BV = logits_BV
        return logits_BV

    def settle(self, ids_BT):
        """Record the logprob of the last chosen token."""
        if self.logits_BV is not None:
            chosen_B1 = self.logits_BV.gather(1, ids_BT[:, -1:])
            self.logps.append(chosen_B1 - self.logits_BV.logsumexp(-1, keepdim=True))


@dataclass(eq=False)
class Completion:
    """A request for one response, with the tokens sampled so far. A Rollout can take its place."""

    prompt_ids: list
    response_ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)  # of each response token, in nats, at temperature 1


class AnySampler:
    """The interface of a sampler. To sample elsewhere, for example on a server, write two methods.

    mean_tokens: mean length of the responses sampled last, which is part of a checkpoint.
    """

    mean_tokens = math.inf

    def generate(self, prompts, max_tokens, copies=1, temperature=1.0):
        """`copies` responses to each prompt. → [(ids, logps)], prompt by prompt (see `Sampler.generate`)"""
        raise NotImplementedError

    def refresh(self, policy):
        """Load the policy's weights after an update."""

    def stream(self, waiting, max_tokens, temperature=1.0):
        """Sample all of `waiting`, to which the caller may append. Yields lists of finished completions.

        This default is for samplers that take no requests while they run. It samples everything that waits,
        until nothing does.
        """
        while waiting:
            ended, waiting[:] = [*waiting], []
            prompts = [completion.prompt_ids for completion in ended]
            responses = self.generate(prompts, max_tokens, temperature=temperature)
            for completion, (ids, logps) in zip(ended, responses, strict=True):
                completion.response_ids, completion.logps = ids, logps
            yield ended


class Sampler(AnySampler):
    """Samples responses from a policy, from the whole distribution (no top-k, no top-p).

    rows: most responses sampled at once (0: as many as memory allows).
    """

    def __init__(self, policy, rows=0):
        self.policy, self.rows = policy, rows
        self.layer_bytes = None  # of a row in the cache (see _layer_bytes), measured when first needed

    def generate(self, prompts, max_tokens, copies=1, temperature=1.0):
        """`copies` responses to each prompt. → [(ids, logps)], prompt by prompt

        prompts: [[id]]. ids: at most max_tokens long and ended by an end token, by the token that completes
        `</answer>`, or by the limit. logps: the logprob of each of them in nats, always at temperature 1.
        temperature 0 takes the likeliest token. Training samples at temperature 1, where the sampling
        distribution is the one whose logprobs are trained.

        >>> sampler.generate([[5, 6], [7]], 3, copies=2)      # doctest: +SKIP
        [([9, 1], [-0.1, -0.7]), ([8, 8, 8], [-0.2, -0.1, -0.4]), ([9, 1], [-0.1, -0.7]), ([1], [-2.3])]
        """
        completions = []
        for prompt in prompts:
            completions += [Completion(prompt) for _ in range(copies)]
        for _ in self.stream([*completions], max_tokens, temperature):
            pass
        return [(c.response_ids, c.logps) for c in completions]

    @torch.no_grad()
    def stream(self, waiting, max_tokens, temperature=1.0):
        """Sample all of `waiting`. Yields, segment by segment, the completions that have ended in it.

        waiting: [Completion], emptied from the front. The caller may append to it between two segments.

        A prompt is read once for all its copies. Then transformers' own `generate` runs in short segments. In
        between, finished rows leave and waiting ones take their places, so that all rows that memory allows
        are always busy, and none waits for the longest response. Their number is estimated from the lengths
        seen so far. If rows grow too long for it, all wait, and are read again, with their tokens so far, in
        smaller number. The same happens when GPU memory runs out, with half the rows.
        """
        policy, sampled = self.policy, []
        policy.causal.eval()
        waiting.sort(key=lambda c: -len(c.prompt_ids))  # longest first, so that later ones fit in
        free, batch, graphs = free_memory(policy.device), None, uses_graphs(policy)
        least = GRAPH_SEGMENT if graphs else SEGMENT
        while waiting or batch:
            busy = batch.completions if batch else []
            widest = max(len(c.prompt_ids) + len(c.response_ids) for c in [*busy, *waiting])
            if len(busy) > self._rows_that_fit(free, widest + least):
                waiting[:0], batch = busy, None  # read again, fewer at once
                continue
            rows = self._rows_that_fit(free, widest + least + min(max_tokens, self.mean_tokens))
            has_room = not busy or batch.can_grow() and len(busy) <= rows * 3 // 4
            joining = waiting[:rows - len(busy)] if has_room else []
            try:
                with policy.autocast():
                    if joining:
                        batch = _join(batch, _prefill(policy, joining))
                    tokens = min(len(c.response_ids) for c in batch.completions) // 4
                    room = max_tokens - max(len(c.response_ids) for c in batch.completions)
                    tokens = min(max(tokens, least), room)
                    added_BN, logps_BN = self._decode_segment(batch, tokens, temperature, graphs)
            except torch.OutOfMemoryError:
                self.rows = min(rows, len(busy) + len(waiting)) // 2
                if not self.rows:
                    raise
                warnings.warn(f"out of GPU memory in sampling: at most {self.rows} rows from now on")
                waiting[:0], batch = busy, None
                continue
            del waiting[:len(joining)]
            batch, ended = _harvest(policy, batch, added_BN, logps_BN, max_tokens)
            sampled += [len(completion.response_ids) for completion in ended]
            yield ended
        if sampled:
            self.mean_tokens = sum(sampled) / len(sampled)

    def _decode_segment(self, batch, tokens, temperature, graphs):
        """Sample this many more tokens of every row in the batch. → their ids_BN, their logps_BN"""
        policy = self.policy
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0,
                       "repetition_penalty": 1.0}
        else:
            options = {"do_sample": False}
        width, recorder = batch.ids_BT.shape[1], _LogprobRecorder()
        with _Replay(policy.causal, batch, tokens) if graphs else contextlib.nullcontext():
            batch.ids_BT = policy.causal.generate(
                batch.ids_BT, attention_mask=batch.mask_BT, past_key_values=batch.cache,
                eos_token_id=sorted(policy.end_ids), pad_token_id=policy.pad_id, max_new_tokens=tokens,
                logits_processor=LogitsProcessorList([recorder]), **options)
        recorder.settle(batch.ids_BT)
        added = batch.ids_BT.shape[1] - width  # fewer than requested if every row has ended
        batch.mask_BT = functional.pad(batch.mask_BT, (0, added), value=1)
        return batch.ids_BT[:, width:], torch.cat(recorder.logps, 1)

    def _rows_that_fit(self, free, columns):
        """The number of rows of this many columns that fit into 60% of the free memory, at most ROWS."""
        if self.rows:
            return self.rows
        self.layer_bytes = self.layer_bytes or _layer_bytes(self.policy)
        cache = 0
        for fixed, per_column, most in self.layer_bytes:
            cache += fixed + per_column * min(columns + BLOCK, most)
        # when a layer's room grows, it exists twice for a moment, and the logits of a step exist a few times
        # in fp32
        per_row = cache * 1.1 + 16 * self.policy.causal.config.get_text_config().vocab_size
        return max(1, min(ROWS, int(0.6 * free / per_row)))


def _harvest(policy, batch, added_BN, logps_BN, max_tokens):
    """Append a segment's tokens to the completions of a batch. → (batch of the unfinished or None, ended)"""
    ended, alive = [], []
    for row, completion in enumerate(batch.completions):
        before = len(completion.response_ids)
        completion.response_ids += added_BN[row].tolist()
        completion.logps += logps_BN[row].tolist()
        end = _end_of(policy, completion.response_ids, before)
        if end is not None:
            del completion.response_ids[end:], completion.logps[end:]
        if end is None and len(completion.response_ids) < max_tokens:
            alive.append(row)
        else:
            ended.append(completion)
    if not alive:
        batch = None
    elif ended:
        batch.keep(alive)
    return batch, ended


def _prefill(policy, completions):
    """Read the prompts of these completions, and their tokens so far, into a batch with a row for each.

    Equal texts are read once. If one pass cannot hold all tokens, each half is read separately.
    """
    texts = {}  # text → its place
    for completion in completions:
        texts.setdefault(_text_of(completion), len(texts))
    # transformers takes a pass of one column for a decoding step, in which recurrent layers use no mask, so
    # the cache is filled from at least two
    width = max(3, *map(len, texts))
    cache = _empty_cache(policy.causal.config)
    if _can_grow(cache) and len(texts) > 1 and len(texts) * width > _tokens_in_a_pass(policy):
        middle = len(completions) // 2
        return _join(_prefill(policy, completions[:middle]), _prefill(policy, completions[middle:]))
    gaps = [width - len(ids) for ids in texts]
    ids_BT = [[policy.pad_id] * gap + [*ids] for gap, ids in zip(gaps, texts)]
    mask_BT = [[0] * gap + [1] * (width - gap) for gap in gaps]
    ids_BT, mask_BT = (torch.tensor(x, device=policy.device) for x in (ids_BT, mask_BT))
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    # all but the last token, which generate reads itself
    policy.causal(input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1],
                  position_ids=positions_BT[:, :-1], past_key_values=cache, logits_to_keep=1)
    beside = [name for name, value in vars(cache).items() if isinstance(value, torch.Tensor)]
    if beside:
        raise UsageError(f"{type(policy.causal).__name__} cannot be sampled: it keeps {beside[0]} beside the "
                         "layers of its cache, where rows cannot be selected")
    rows = torch.tensor([texts[_text_of(completion)] for completion in completions], device=policy.device)
    cache.reorder_cache(rows)
    return _Batch(ids_BT[rows], mask_BT[rows], cache, list(completions))


def _text_of(completion):
    return *completion.prompt_ids, *completion.response_ids


def _end_of(policy, ids, checked):
    """The number of tokens of `ids` that belong to the response, or None if it has not ended.

    The first `checked` tokens are known not to end it, although `</answer>` may start among them.
    """
    start = max(0, checked - len("</answer>"))
    ends = (place + 1 for place in range(checked, len(ids)) if ids[place] in policy.end_ids)
    stop = next(ends, None)
    if "</answer>" not in policy.decode(ids[start:stop]):
        return stop
    ends = range(start + 1, stop or len(ids))  # the first that includes the closing tag
    return start + 1 + bisect_left(ends, True, key=lambda end: "</answer>" in policy.decode(ids[start:end]))


def _layer_bytes(policy):
    """Memory of one row in each layer of the cache. → [(bytes of states, bytes per column, most columns)]

    Measured with two short prompts, because heads and their widths differ by layer in some models, and
    because the states of recurrent and convolutional layers have the same size for any length. Only sliding
    windows limit the columns.
    """
    short, long = _cache_of(policy, 2), _cache_of(policy, 4)
    layers = []
    for layer, longer in zip(short.layers, long.layers):
        per_column = (_held_bytes(longer) - _held_bytes(layer)) / 2
        most = layer.get_max_length()
        layers.append((_held_bytes(layer) - 2 * per_column, per_column, math.inf if most < 0 else most))
    return layers


def _cache_of(policy, columns):
    """transformers' own cache after a prompt of this many tokens."""
    cache = DynamicCache(config=policy.causal.config)
    ids_BT = torch.full((1, columns), policy.pad_id, device=policy.device)
    with policy.autocast():
        policy.causal(input_ids=ids_BT, past_key_values=cache, logits_to_keep=1)
    return cache


def _held_bytes(layer):
    """Bytes of all tensors that a layer of a cache holds, one by one or in dictionaries."""
    held = 0
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor):
                held += tensor.nbytes
    return held


def free_memory(device):
    """Bytes available for new tensors on a device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _tokens_in_a_pass(policy):
    """Prompt tokens to read at once, in 3 GiB. In simulation, one takes 195 kB at 3B and 329 kB at 7B.

    Recurrent layers whose kernels are not installed compute in fp32, and one token takes about twice as much.
    """
    config = policy.causal.config
    width = inner_width(config.get_text_config())
    a_token = 9 * width * policy.causal.dtype.itemsize
    if any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=config).layers):
        a_token = 2 * 9 * width * torch.float32.itemsize
    return 3 * 2 ** 30 // a_token


def inner_width(config):
    """The inner width of the widest MLP, or four times the outer one if a config has another name for it."""
    widest = 0
    for layer in config.per_layer_config:  # some configs raise if asked for the whole model
        width = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
        widest = max(widest, max(width) if isinstance(width, (list, tuple)) else width)
    return widest
