"""The sampler against a plain loop over one prompt, and against the probabilities that are trained."""

import math
from types import SimpleNamespace

import pytest
import torch

import sampling
from model import response_logprobs
from rewards import Rollout
from sampling import Sampler

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12] * 20, [5], [7, 8]]


def greedy(sampler, prompts, max_tokens, copies=1):
    """The likeliest responses, without their logprobs."""
    return [ids for ids, _ in sampler.generate(prompts, max_tokens, copies, temperature=0)]


def test_greedy_with_shared_prefill_and_segments_equals_a_plain_loop(policy):
    policy.end_ids = frozenset(range(0, 258, 16))  # so that lengths differ
    def plain(prompt):
        ids = list(prompt)
        while len(ids) - len(prompt) < 60:
            with torch.no_grad():
                ids.append(int(policy.causal(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in policy.end_ids:
                break
        return ids[len(prompt):]

    expected = [plain(prompt) for prompt in PROMPTS]
    for rows in (0, 2, 4, 7):  # all at once; rows that leave make room for others, copies are split
        sampler = Sampler(policy, rows)
        assert greedy(sampler, PROMPTS, 60) == expected
        assert greedy(sampler, PROMPTS, 60, copies=3) == [r for r in expected for _ in range(3)]
    assert len(set(map(len, expected))) > 1 and sampler.generate([], 60) == []
    assert greedy(sampler, [[5]], 60) == [plain([5])]


def test_equal_prompts_are_read_once(policy, monkeypatch):
    seen, plain = [], policy.causal.forward
    monkeypatch.setattr(policy.causal, "forward", lambda *args, **named: seen.append(named["input_ids"].shape) or plain(*args, **named))
    sampler = Sampler(policy)
    expected = greedy(sampler, [[1, 2, 3], [4, 5, 6]], 20)
    seen.clear()
    assert greedy(sampler, [[1, 2, 3], [4, 5, 6], [1, 2, 3]] * 5, 20) == [expected[i] for i in (0, 1, 0)] * 5
    assert seen[0] == (2, 2) and seen[1][0] == 15  # all but the last token of two prompts, then a row a response


@pytest.mark.parametrize("cpu", (True, False))
@pytest.mark.parametrize("key_heads", (1, 2, 4))
@pytest.mark.parametrize("masked", (False, True))
def test_grouped_heads_attend_as_repeated_ones(key_heads, masked, cpu, monkeypatch):
    """Against softmax(q·k)·v with every key head repeated, one query token and several columns, some of them padding."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", cpu)  # a GPU's way, on a CPU
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, columns, 5) for heads, columns in ((4, 1), (key_heads, 7), (key_heads, 7)))
    mask = torch.rand(3, 1, 1, 7) > 0.4 if masked else None
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, is_causal=True)
    found, _ = sampling.grouped_sdpa(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    key, value = (x.repeat_interleave(4 // key_heads, 1) for x in (key, value))
    scores = 0.3 * query @ key.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    assert torch.allclose(found, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-6)
    assert found.shape == (3, 1, 4, 5)


def test_decoding_uses_grouped_heads(policy, monkeypatch):
    def repeated(*_):
        raise AssertionError("the cache was copied for each head")
    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", repeated)
    sampler = Sampler(policy, rows=2)
    with pytest.raises(AssertionError, match="copied"):  # the prompts of different lengths are read together, with a mask
        sampler.generate(PROMPTS, 8)
    assert sampler.generate([[1, 2, 3], [4, 5, 6]], 40, copies=3)


def test_a_roomy_layer_holds_what_a_growing_one_holds():
    torch.manual_seed(0)
    roomy, plain = sampling.RoomyLayer(), sampling.DynamicLayer()
    def both(change):
        results = [change(layer) for layer in (roomy, plain)]
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length()
        return results
    for columns in (5, *[1] * (3 * sampling.SEGMENT)):
        new = torch.randn(4, 2, columns, 3), torch.randn(4, 2, columns, 3)
        ours, theirs = both(lambda layer: layer.update(*new))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        if roomy.get_seq_length() % 10 == 0:
            both(lambda layer: layer.reorder_cache(torch.tensor([3, 1, 1, 0])))
    held = roomy.keys
    both(lambda layer: layer.update(*new))
    assert held.data_ptr() == roomy.keys.data_ptr()  # written in place
    roomy.put(lambda *pair: torch.cat(pair), plain)
    assert roomy.keys.shape[0] == 8 and roomy.room is None


def greedy_of(policy, monkeypatch, **settings):
    """Greedy responses of differing lengths: undisturbed, and with these functions of sampling.py replaced."""
    policy.end_ids = frozenset(range(0, 258, 16))
    expected = greedy(Sampler(policy), PROMPTS, 60, copies=3)
    for name, value in settings.items():
        monkeypatch.setattr(sampling, name, value)
    return expected


def test_out_of_memory_halves_the_rows_and_loses_nothing(policy, monkeypatch):
    expected, real, rows = greedy_of(policy, monkeypatch), policy.causal.generate, []

    def scarce(ids, **how):
        rows.append(len(ids))
        if len(ids) > 4 or len(rows) == 6:  # also once in the midst of responses
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(ids, **how)

    monkeypatch.setattr(policy.causal, "generate", scarce)
    sampler = Sampler(policy)
    with pytest.warns(UserWarning, match="out of GPU memory in sampling: at most 1 rows"):
        assert greedy(sampler, PROMPTS, 60, copies=3) == expected
    assert rows[:3] == [15, 7, 3] and max(rows[6:]) == 1 == sampler.rows
    monkeypatch.setattr(policy.causal, "generate", lambda ids, **how: scarce([0] * 9, **how))
    with pytest.raises(torch.OutOfMemoryError):  # one row alone does not fit
        greedy(sampler, PROMPTS, 60)


def test_a_replayed_graph_decodes_what_the_model_does(policy, monkeypatch):
    """A GPU's way on a CPU: the graph is a function that repeats the same operations on the same tensors."""
    graphs, replays = [], []

    def capture(operations):
        graphs.append(operations)
        return lambda: (replays.append(1), operations())

    expected = greedy_of(policy, monkeypatch, uses_graphs=lambda policy: True, capture=capture)
    for rows in (0, 4, 7):
        sampler = Sampler(policy, rows)
        assert greedy(sampler, PROMPTS, 60, copies=3) == expected
    assert len(replays) > 10 * len(graphs) > 0 and "forward" not in vars(policy.causal)
    free = policy.causal.generate
    def interrupted(ids, **how):
        raise KeyboardInterrupt
    monkeypatch.setattr(policy.causal, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, 60)
    monkeypatch.setattr(policy.causal, "generate", free)
    assert "forward" not in vars(policy.causal) and greedy(sampler, PROMPTS, 60, copies=3) == expected


def test_prompts_are_read_in_parts_that_fit(policy, monkeypatch):
    expected, seen = greedy_of(policy, monkeypatch, _tokens_in_a_pass=lambda policy: 24), []
    policy.causal.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert greedy(Sampler(policy), PROMPTS, 60, copies=3) == expected
    passes = [rows * (columns + 1) for rows, columns in seen if columns > 1]
    assert len(passes) > 2 and max(passes) <= 24


def test_rows_follow_from_memory_and_from_the_lengths_seen(policy, monkeypatch):
    """Room for 900 columns of keys and values: never more than it holds, and more rows once lengths are known."""
    config = policy.causal.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 12 * 4
    monkeypatch.setattr(sampling, "BLOCK", 16)
    free = (900 * per_token * 1.1 + 16 * config.vocab_size * 10) / 0.6
    expected, real, held = greedy_of(policy, monkeypatch, free_memory=lambda device: free), policy.causal.generate, []

    def watched(ids, **how):
        out = real(ids, **how)
        held.append((len(ids), out.shape[1]))
        return out

    monkeypatch.setattr(policy.causal, "generate", watched)
    sampler = Sampler(policy)
    assert greedy(sampler, PROMPTS, 200, copies=3)[0][:60] == expected[0]
    first, sampler.mean_tokens = held[0][0], 20
    held.clear()
    assert greedy(sampler, PROMPTS, 60, copies=3) == expected
    assert first < held[0][0] < 15 and all(rows * columns <= 1000 for rows, columns in held)
    assert sampler.mean_tokens == sum(map(len, expected)) / 15


def test_rows_are_always_busy(policy, monkeypatch):
    """Half of the responses are short; waiting prompts must take the places of the finished."""
    policy.end_ids = frozenset(range(8))  # of 258 ids of nearly equal probability: mean length 32
    busy, real = [], policy.causal.generate
    monkeypatch.setattr(policy.causal, "generate", lambda ids, **how: busy.append(len(ids)) or real(ids, **how))
    torch.manual_seed(0)
    responses = Sampler(policy, rows=16).generate([[i, i] for i in range(100)], 256)
    assert len(responses) == 100 and all(ids for ids, _ in responses) and max(busy) == 16
    while_waiting = busy[:-8]
    assert sum(while_waiting) / len(while_waiting) > 0.75 * 16


@pytest.mark.parametrize("temperature", (1.0, 0.5))
def test_samples_come_from_the_distribution_that_is_trained(policy, temperature):
    """A chi-square test of 4000 first tokens against the model's own probabilities.

    The model's generation_config asks for temperature 0.2, top-k 3 and a repetition penalty; with
    any of them left in, the statistic is in the thousands.
    """
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    counts = torch.zeros(policy.causal.config.vocab_size)
    for ids, _ in Sampler(policy).generate([prompt], 1, copies=4000, temperature=temperature):
        counts[ids[0]] += 1
    with torch.no_grad():
        logits_V = policy.causal(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = torch.softmax(logits_V / temperature, -1) * 4000
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def test_sampled_continuations_agree_with_the_logprobs_of_training(policy):
    """E[−log p(sample)] is the entropy: over 600 samples of 12 tokens both estimates must agree."""
    torch.manual_seed(0)
    responses = Sampler(policy).generate([[9, 8, 7]], 12, copies=600)
    rows = [[Rollout("solve", "deduction", [9, 8, 7], ids)] for ids, _ in responses]
    logps_N, entropies_N = response_logprobs(policy, rows)
    surprise = (-logps_N - entropies_N).detach()
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / math.sqrt(len(surprise))


@pytest.mark.parametrize("temperature", (1.0, 0.5, 0))
@pytest.mark.parametrize("graphs", (False, True))
def test_the_samplers_logprobs_are_those_of_training(policy, graphs, temperature, monkeypatch):
    """At temperature 1, whatever the responses were sampled with, for every token of every length."""
    monkeypatch.setattr(sampling, "uses_graphs", lambda policy: graphs)
    monkeypatch.setattr(sampling, "capture", lambda operations: operations)
    policy.end_ids = frozenset(range(0, 258, 16))
    torch.manual_seed(0)
    responses = Sampler(policy, rows=4).generate(PROMPTS, 40, copies=2, temperature=temperature)
    rows, found = [], []
    for place, (ids, logps) in enumerate(responses):
        rows.append([Rollout("solve", "deduction", PROMPTS[place // 2], ids)])
        found += logps
    logps_N, _ = response_logprobs(policy, rows)
    assert len({len(ids) for ids, _ in responses}) > 2
    assert torch.allclose(torch.tensor(found), logps_N, atol=1e-5)


def test_response_ends_at_the_answer_or_the_end_token(policy, monkeypatch):
    end = policy.tokenizer.eos_token_id
    encode = lambda text: policy.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    closed = encode("a</answer>")
    assert sampling._end_of(policy, closed + encode("bcd"), 0) == len(closed)
    assert sampling._end_of(policy, closed + encode("bcd"), 5) == len(closed)   # the tag straddles segments
    assert sampling._end_of(policy, closed + [end], 0) == len(closed)
    assert sampling._end_of(policy, encode("ab") + [end, end, end], 0) == 3     # the end token is trained
    assert sampling._end_of(policy, encode("abc"), 0) is None
