"""The policy and the update against oracles that are slow and obvious, on a small random model."""

import itertools
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

import azr
from azr import Actor, heldout_accuracy, micro_batches, policy_loss, trr_update
from conftest import Scripted, naive_logprobs, rollouts_of
from model import load_policy, response_logprobs
from rewards import Rollout, set_rewards, task_relative_advantages
from sampling import Sampler, attends_to_all
from tasks import KINDS, ZERO_TRIPLET, Task, TaskBuffer, UsageError, edit_distance, propose_prompt

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12] * 20, [5], [7, 8]]


def config(**changes):
    return SimpleNamespace(**{
        "micro_tokens": 400, "clip": 0.2, "entropy_coef": 0.0, "max_grad_norm": 1e9, "types": ("deduction", "abduction", "induction"),
        "batch": 2, "samples": 4, "references": 2, "inputs": 4, "max_prompt": 9999, "max_response": 50, "dedup": True, "zero_learnability": "paper",
        "frame": "long"} | changes)


def generate(policy, prompts, max_tokens, copies=1, greedy=False):
    """The ids alone."""
    return [ids for ids, _ in Sampler(policy).generate(prompts, max_tokens, copies, 0 if greedy else 1.0)]


def logprobs(policy, rollouts, chunk=None):
    return response_logprobs(policy, [[rollout] for rollout in rollouts], chunk)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


def sgd(policy, lr=1.0):
    return torch.optim.SGD(policy.trainable().values(), lr=lr)


def test_trained_tokens_are_the_sampled_ones_when_text_would_not_round_trip(policy):
    """Half a character decodes to a replacement character; ids made from text would differ."""
    rollouts = rollouts_of(policy, [1.0] * 8)
    assert any(policy.tokenizer(policy.text(r.response_ids)).input_ids != r.response_ids for r in rollouts)
    logps_N, _ = logprobs(policy, rollouts)
    assert len(logps_N) == sum(len(r.response_ids) for r in rollouts)
    assert torch.allclose(logps_N, torch.cat([naive_logprobs(policy, r)[0] for r in rollouts]), atol=1e-5)


# --- logprobs and loss

@pytest.mark.parametrize("chunk", [1, 7, 10000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rank", [4, 0])  # 0: the head is trained as well, which takes another way
def test_chunked_logprobs_and_entropies_against_log_softmax(random_model, chunk, softcap, rank):
    policy = load_policy(random_model, lora_rank=rank, device="cpu")
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    policy.causal.config.final_logit_softcapping = softcap
    rollouts = rollouts_of(policy, [1.0] * 9)
    weights = torch.randn(sum(len(r.response_ids) for r in rollouts), generator=torch.Generator().manual_seed(0))
    found = []
    for chunked in (True, False):
        policy.causal.zero_grad()
        if chunked:
            logps_N, entropies_N = logprobs(policy, rollouts, chunk)
        else:
            pairs = [naive_logprobs(policy, r, softcap) for r in rollouts]
            logps_N, entropies_N = (torch.cat(parts) for parts in zip(*pairs))
        ((logps_N + 0.3 * entropies_N) * weights).sum().backward()
        found.append((logps_N.detach(), entropies_N.detach(), gradients(policy)))
    (a, b, grads), (c, d, oracle) = found
    assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, d, atol=1e-5)
    for name in oracle:
        assert torch.allclose(grads[name], oracle[name], atol=2e-4), name


def test_logits_are_never_there_for_more_than_a_chunk(policy, monkeypatch):
    seen = []
    head = policy.causal.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    rollouts = rollouts_of(policy, [1.0] * 9)
    seen.clear()
    logprobs(policy, rollouts, 16)[0].sum().backward()
    assert max(seen) == 16 and len(seen) > 4


def test_clip_cuts_on_the_correct_side():
    """Good responses gain nothing beyond 1 + ε, bad ones lose nothing beyond 1 − ε; the other way stays free."""
    for advantage, ratio, free in ((1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, 1.5, True),
                                   (1.0, 1.1, True), (-1.0, 0.9, True)):
        new = torch.tensor([math.log(ratio)], requires_grad=True)
        loss = policy_loss(new, torch.zeros(1), torch.tensor([advantage]), torch.tensor([1]), 1, config())
        loss.backward()
        assert (new.grad.item() != 0) == free, (advantage, ratio)
        assert loss.item() == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))


def test_first_update_has_ratio_one_and_the_gradient_of_reinforce(policy):
    """With old = new the loss is −mean A and its gradient that of −A · log p, token by token."""
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5, 2.0])
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    metrics = trr_update(policy, sgd(policy), rollouts, config())
    step = {n: before[n] - p.detach() for n, p in policy.trainable().items()}
    tokens = sum(len(r.response_ids) for r in rollouts)
    assert metrics["loss"] == pytest.approx(-sum(r.advantage * len(r.response_ids) for r in rollouts) / tokens, abs=1e-6)

    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(before[name])
    policy.causal.zero_grad()
    (-sum(r.advantage * naive_logprobs(policy, r)[0].sum() for r in rollouts) / tokens).backward()
    for name, grad in gradients(policy).items():
        assert torch.allclose(step[name], grad, atol=1e-5), name
    norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients(policy).values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_entropy_bonus_raises_entropy(policy):
    rollouts = rollouts_of(policy, [1e-30] * 4)
    first = trr_update(policy, sgd(policy, 0.05), rollouts, config(entropy_coef=1.0))
    second = trr_update(policy, sgd(policy, 0.05), rollouts, config(entropy_coef=1.0))
    assert second["entropy"] > first["entropy"]
    assert first["entropy"] == pytest.approx(-first["loss"], rel=1e-4)


def test_a_step_without_a_signal_changes_nothing(policy):
    """AdamW divides by the gradient's size, so an entropy bonus alone would move weights as far as rewards do."""
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1)
    metrics = trr_update(policy, optimizer, rollouts_of(policy, [0.0] * 4), config(entropy_coef=1.0))
    assert metrics == {"loss": None, "entropy": None, "grad_norm": None, "sampler_gap": None, "signal": 0, "micro_tokens": 400}
    assert all(torch.equal(before[name], p) for name, p in policy.trainable().items())
    assert trr_update(policy, optimizer, [], config())["signal"] is None
    assert trr_update(policy, optimizer, rollouts_of(policy, [0.0, 0.0, 1.0, 0.0]), config())["signal"] == 0.25
    assert not all(torch.equal(before[name], p) for name, p in policy.trainable().items())


def test_micro_batching_changes_neither_loss_nor_gradient(policy):
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5, 2.0, -0.3, 0.1, 0.0])
    results = []
    for budget in (1, 60, 10 ** 6):
        policy.causal.zero_grad()
        loss, entropy, _ = azr._accumulate_gradients(policy, rollouts, budget, config(entropy_coef=0.01))
        results.append((len(micro_batches(rollouts, budget)), loss, entropy, gradients(policy)))
    assert results[0][0] == 7 and results[2][0] == 1 and 1 < results[1][0] < 7
    for _, loss, entropy, grads in results[:2]:
        assert loss == pytest.approx(results[2][1], abs=1e-6) and entropy == pytest.approx(results[2][2], abs=1e-5)
        for name, grad in results[2][3].items():
            assert torch.allclose(grads[name], grad, atol=1e-6), name


@pytest.mark.parametrize("budget", [1, 70, 10 ** 6])
def test_a_prompt_read_once_for_all_its_responses_changes_neither_loss_nor_gradient(random_model, budget):
    policy = load_policy(random_model, lora_rank=4, device="cpu")
    assert policy.shares_prompts
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5, 2.0, -0.3, 0.1, 0.7])
    rollouts[0].prompt_ids, rollouts[3].prompt_ids = [*range(30)], [*range(40, 70)]
    for copy, of in ((1, 0), (4, 0), (5, 3), (6, 0)):
        rollouts[copy].prompt_ids = rollouts[of].prompt_ids
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    results, read = [], []
    policy.causal.get_input_embeddings().register_forward_hook(lambda module, ids, out: read.append(ids[0].numel()))
    for policy.shares_prompts in (False, True):
        policy.causal.zero_grad()
        loss, entropy, _ = azr._accumulate_gradients(policy, rollouts, budget, config(entropy_coef=0.01))
        results.append((loss, entropy, gradients(policy), sum(read)))
        read.clear()
    (loss, entropy, grads, alone), (shared_loss, shared_entropy, shared_grads, together) = results
    assert shared_loss == pytest.approx(loss, abs=1e-6) and shared_entropy == pytest.approx(entropy, abs=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(shared_grads[name], grad, atol=1e-5), name
    assert together == alone if budget == 1 else together < alone


def test_models_that_forget_or_that_take_no_mask_share_no_prompts(random_model):
    config_ = load_policy(random_model, device="cpu").causal.config
    assert attends_to_all(config_) and not load_policy("tiny").shares_prompts
    sliding = Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_hidden_layers=2)
    sliding._attn_implementation = "grouped_sdpa"
    assert not attends_to_all(sliding)
    config_._attn_implementation = "eager"
    assert not attends_to_all(config_)


@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_keep_every_rollout_and_the_budget(shared):
    rng = random.Random(0)
    rollouts = [Rollout("solve", "deduction", [0] * rng.randint(1, 50), [0] * rng.randint(1, 50), "") for _ in range(100)]
    batches = micro_batches(rollouts, 300, shared)
    assert sorted(id(r) for batch in batches for row in batch for r in row) == sorted(map(id, rollouts))
    assert any(len(row) > 1 for batch in batches for row in batch) == shared
    for batch in batches:
        sizes = [len(row[0].prompt_ids) + sum(len(r.response_ids) for r in row) for row in batch]
        assert len(batch) == 1 == len(batch[0]) or len(batch) * max(sizes) <= 300
        for row in batch:
            assert len({tuple(r.prompt_ids) for r in row}) == 1


def test_a_long_gradient_is_cut_to_its_norm(policy):
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    norm = trr_update(policy, sgd(policy), rollouts_of(policy, [1.0, -1.0]), config(max_grad_norm=0.01))["grad_norm"]
    step = math.sqrt(sum(((before[name] - p.detach()) ** 2).sum().item() for name, p in policy.trainable().items()))
    assert norm > 0.1 and step == pytest.approx(0.01, rel=1e-3)


def test_lora_alpha_is_twice_the_rank(policy):
    assert {m.scaling["default"] for m in policy.model.modules() if hasattr(m, "lora_A")} == {2.0}


@pytest.mark.parametrize("fails", ("first", "second"))
def test_out_of_memory_halves_the_micro_batch_and_drops_nothing(policy, monkeypatch, fails):
    """Also where the first micro-batch has left its gradients and the second does not fit."""
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5, 2.0])
    policy.causal.zero_grad()
    azr._accumulate_gradients(policy, rollouts, 10 ** 6, config())
    expected = gradients(policy)
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    real, sizes = azr.response_logprobs, []

    def scarce(policy, batch):
        sizes.append(len(batch))
        if len(batch) > 1 if fails == "first" else len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, batch)

    monkeypatch.setattr(azr, "response_logprobs", scarce)
    cfg = config(micro_tokens=10 ** 3 if fails == "first" else 2 * max(r.tokens for r in rollouts))
    with pytest.warns(UserWarning, match="out of GPU memory"):
        metrics = trr_update(policy, sgd(policy), rollouts, cfg)
    assert (sizes[0] == 4 and sizes[-4:] == [1, 1, 1, 1] if fails == "first" else sizes[0] == 2) and metrics["micro_tokens"] < cfg.micro_tokens
    for name, p in policy.trainable().items():
        assert torch.allclose(before[name] - p.detach(), expected[name], atol=1e-6), name


@pytest.mark.parametrize("lr", [1e-6, 2e-5])
def test_full_fine_tuning_in_bf16_moves_every_weight(random_model, lr):
    policy = load_policy(random_model, lora_rank=0, dtype="bf16", device="cpu")
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5])
    hidden = []
    policy.causal.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: hidden.append(output.dtype))
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    trr_update(policy, torch.optim.AdamW(policy.trainable().values(), lr=lr, weight_decay=0.0), rollouts, config())
    moved = sum(int((before[name] != p).sum()) for name, p in policy.trainable().items())
    assert moved > 0.99 * sum(p.numel() for p in policy.trainable().values())
    assert hidden[-1] == torch.bfloat16
    answers = load_policy(random_model, lora_rank=0, dtype="bf16", device="cpu", trained=False)
    assert answers.causal.dtype == torch.bfloat16 and answers.half is None


def test_fp16_gradients_do_not_underflow_over_many_tokens(random_model):
    """The mean over 40,000 tokens in fp16, against the same in fp32."""
    grads = []
    for dtype in ("fp32", "fp16"):
        torch.manual_seed(1)
        policy = load_policy(random_model, lora_rank=4, dtype=dtype, device="cpu")
        rng = random.Random(0)
        rollouts = [Rollout("solve", "deduction", [3, 1, 4], rng.choices(range(256), k=250), "", advantage=rng.gauss(0, 1))
                    for _ in range(160)]
        loss, _, _ = azr._accumulate_gradients(policy, rollouts, 4096, config())
        grads.append(torch.cat([grad.flatten() for name, grad in gradients(policy).items() if "lora_B" in name]))
    assert loss == pytest.approx(-sum(r.advantage for r in rollouts) / 160, abs=1e-4)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.02


def test_a_gradient_that_is_not_finite_skips_the_step(policy, monkeypatch):
    rollouts = rollouts_of(policy, [math.inf, 1.0])
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with pytest.warns(UserWarning, match="not finite"):
        assert trr_update(policy, sgd(policy), rollouts, config())["grad_norm"] is None
    assert all(torch.equal(before[name], p) for name, p in policy.trainable().items())


def test_the_sampler_gap_is_the_difference_of_all_logprobs(policy):
    rollouts = rollouts_of(policy, [1.0] * 20, max_tokens=40)
    assert 0 < trr_update(policy, sgd(policy, 0.0), rollouts, config())["sampler_gap"] < 1e-5
    rollouts[3].logps[0] += 0.5
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    assert trr_update(policy, sgd(policy, 0.0), rollouts, config())["sampler_gap"] == pytest.approx(0.5 / tokens, rel=1e-2)
    rollouts[0].logps = []
    assert trr_update(policy, sgd(policy, 0.0), rollouts, config())["sampler_gap"] is None


def test_the_sampler_gap_shows_a_sampler_whose_weights_are_a_step_old(policy):
    rollouts = rollouts_of(policy, [1.0, -1.0] * 5)
    first = trr_update(policy, torch.optim.AdamW(policy.trainable().values(), lr=1e-3), rollouts, config())
    stale = trr_update(policy, sgd(policy, 0.0), rollouts, config())
    assert stale["sampler_gap"] > 100 * first["sampler_gap"]


def test_on_a_cpu_micro_batches_follow_from_free_memory(random_model, monkeypatch):
    monkeypatch.setattr(azr, "free_memory", lambda device: 2 ** 23)
    policy = load_policy(random_model, lora_rank=4, device="cpu")
    assert 1 < azr.fit_micro_tokens(policy, config(micro_tokens=10 ** 6)) < 2000
    monkeypatch.setattr(azr.ctypes, "CDLL", lambda name: pytest.fail("memory is given back, which takes time"))
    assert azr.fit_micro_tokens(policy, config(micro_tokens=10)) == 10
    monkeypatch.setattr(azr, "free_memory", lambda device: 2 ** 40)
    assert azr.fit_micro_tokens(policy, config(micro_tokens=10 ** 6)) == azr.CPU_TOKENS
    sizes, real = [], azr.response_logprobs
    monkeypatch.setattr(azr, "response_logprobs", lambda policy, batch: sizes.append(
        len(batch) * max(r.tokens for row in batch for r in row)) or real(policy, batch))
    trr_update(policy, sgd(policy), rollouts_of(policy, [1.0] * 12), config(micro_tokens=10 ** 6), micro_tokens=100)
    assert len(sizes) > 1 and max(sizes) <= 100
    assert policy.causal.is_gradient_checkpointing
    assert not load_policy("tiny", device="cpu").causal.is_gradient_checkpointing


def test_a_fixed_pattern_is_learned_from_its_reward(random_model):
    """The whole path, sampled and updated: reward ids under 64, a quarter of all at first."""
    policy = load_policy(random_model, lora_rank=0, device="cpu")
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    torch.manual_seed(0)
    shares = []
    for _ in range(16):
        responses = generate(policy, [[3, 1]], 8, copies=64)
        rewards = [sum(i < 64 for i in ids) / len(ids) for ids in responses]
        shares.append(sum(rewards) / len(rewards))
        advantages = task_relative_advantages(rewards, ["g"] * len(rewards))
        trr_update(policy, optimizer, [Rollout("solve", "deduction", [3, 1], ids, "", advantage=a)
                                       for ids, a in zip(responses, advantages)], config(micro_tokens=10 ** 4, max_grad_norm=1.0))
    assert 0.15 < shares[0] < 0.35 and shares[-1] > 0.8


# --- propose and solve, with scripted responses and the real sandbox

def answer(text):
    return f" ...</think>\n<answer>\n{text}\n</answer>"


def play_once(policy, executor, proposals, solver, cfg=None, buffer=None):
    """A step with rewards. proposals: what the proposer says, one after the other; solver(copy) → the copy-th answer
    to a task: first its n tries, then its solution. → buffer, proposals, tries, solutions"""
    written, copies = iter(proposals), defaultdict(itertools.count)
    sampler = Scripted(policy, lambda prompt: next(written) if "Invent" in prompt else solver(next(copies[prompt])))
    buffer = buffer or TaskBuffer(100, random.Random(0))
    cfg = cfg or config(types=("deduction",), batch=len(proposals))
    rollouts = Actor(policy, sampler, executor, cfg).self_play(buffer)
    set_rewards(*rollouts, cfg)
    return buffer, *rollouts


def propose_once(*arguments, **options):
    """→ buffer, proposals, new tasks, tries"""
    buffer, proposals, tries, _ = play_once(*arguments, **options)
    return buffer, proposals, [proposal.task for proposal in proposals if proposal.task], tries


def block(program, text):
    return answer(f"```python\n{program}\n```\n```input\n{text}\n```")


ADD = "def f(x):\n    return x + 1"


@pytest.mark.parametrize("correct_copies, reward", [((), 0.0), ((0,), 0.75), ((0, 2, 3), 0.25), ((0, 1, 2, 3), 0.0)])
def test_proposer_reward_is_learnability(policy, executor, correct_copies, reward):
    buffer, rollouts, tasks, estimates = propose_once(
        policy, executor, [block(ADD, "2")],
        lambda copy: answer("```output\n3\n```" if copy in correct_copies else "```output\n4\n```"))
    (rollout,) = rollouts
    assert (rollout.verdict, rollout.reward, rollout.solve_rate) == ("valid", reward, len(correct_copies) / 4)
    assert tasks == [Task("deduction", ADD, "2", "3")] and tasks[0] in buffer.tasks["deduction"]
    assert len(estimates) == 4 and all(r.role == "solve" for r in estimates)
    assert [r.reward for r in estimates] == [1.0 if copy in correct_copies else -0.5 for copy in range(4)]


def test_official_zero_learnability(policy, executor):
    _, (rollout,), _, _ = propose_once(policy, executor, [block(ADD, "2")], lambda copy: answer("3"),
                                       config(types=("deduction",), batch=1, zero_learnability="official"))
    assert rollout.solve_rate == 1.0 and rollout.reward == -0.5


@pytest.mark.parametrize("response, reward, verdict", [
    ("no tags at all", -1.0, "truncated"), (answer("no blocks"), -1.0, "malformed"),
    (block("def f(x):\n    return y", "1"), -0.5, "error"), (block("def f(x)\n    return 1", "1"), -0.5, ""),
    (block("import os\ndef f(x):\n    return os.getcwd()", "1"), -0.5, "unsafe"),
    (block("import random\ndef f(x):\n    return random.random()", "1"), -0.5, ""),
    (block("def f(x):\n    return id([])", "1"), -0.5, "nondeterministic"),
    (block("def f(x):\n    return hash('a' + x)", "'b'"), -0.5, "nondeterministic"),
    (block("def f(x):\n    return lambda: x", "1"), -0.5, "unrepresentable"),
    (block("def f(x):\n    return 'a' * x", "401"), -0.5, "too long: the output has 403"),
    (block("def f(x):\n    while True: pass", "1"), -0.5, "timeout"),
    (block("def f(x):\n    return " + "-" * 1100 + "x", "1"), -0.5, "nested"),
    (block("def f(x):\n    return " + " + ".join("x" * 400), "1"), -0.5, "nested"),
])
def test_invalid_proposals_are_penalised_and_not_kept(policy, executor, response, reward, verdict):
    buffer, (rollout,), tasks, estimates = propose_once(policy, executor, [response], lambda copy: "no")
    assert rollout.reward == reward and (verdict in (rollout.verdict.value, "") or verdict in rollout.reason) and rollout.task is None
    assert tasks == estimates == [] and len(buffer.tasks["deduction"]) == 1


def test_repeated_programs_earn_nothing_unless_asked(policy, executor):
    twice = [block(ADD, "2"), block("def f(x):\n    # again\n    return (x + 1)", "5")]
    solver = lambda copy: answer("3" if copy else "4")  # noqa: E731
    buffer, rollouts, tasks, _ = propose_once(policy, executor, twice, solver)
    assert [(r.verdict, r.repeat) for r in rollouts] == [("valid", False), ("valid", True)]
    assert rollouts[1].reward == 0.0 and rollouts[1].task is None and len(tasks) == 1
    _, rollouts, tasks, _ = propose_once(policy, executor, twice, solver,
                                         config(types=("deduction",), batch=2, dedup=False))
    assert [r.verdict for r in rollouts] == ["valid", "valid"] and len(tasks) == 2
    assert [r.traits["unique_ast"] for r in rollouts] == [True, False]  # the log sees a repeat also where it is paid


def test_induction_proposals_keep_the_inputs_that_run(policy, executor):
    cfg = config(types=("induction",), batch=2, inputs=4)
    def inputs(*texts):
        return answer("".join(f"```input\n{t}\n```\n" for t in texts) + "```message\nsame\n```")
    good, bad = inputs("1", "1/0", "2", "3"), inputs("1", "x", "1/0")
    buffer, rollouts, (task,), _ = propose_once(policy, executor, [good, bad],
                                                lambda copy: answer("```python\ndef f(y):\n    return y\n```"), cfg)
    assert task == Task("induction", ZERO_TRIPLET.program, inputs=("1", "2", "3"), outputs=("1", "2", "3"), message="same")
    assert [r.reward for r in rollouts] == [0.0, -0.5] and rollouts[0].solve_rate == 1.0


def test_calls_whose_outputs_differ_are_not_one(executor):
    """Of *args the sandbox's text of a call does not tell the order."""
    program = "def f(*values): return values[0] - values[1]"
    task = Task("induction", program, inputs=("5, 3", "3, 5", "5, 0x3"))
    found = KINDS["induction"].complete(task, executor.run(KINDS["induction"].runs(task)))
    assert found.inputs == ("5, 3", "3, 5") and found.outputs == ("2", "-2")


def test_inputs_that_are_equal_in_other_words_are_one(policy, executor):
    cfg = config(types=("induction",), batch=2, inputs=7)
    def inputs(*texts):
        return answer("".join(f"```input\n{t}\n```\n" for t in texts) + "```message\nsame\n```")
    proposals = [inputs("16", "0x10", "16.0", "'a'", "1_6", "+16,", '"a"'), inputs("1", "0x1")]
    _, rollouts, (task,), _ = propose_once(policy, executor, proposals, lambda copy: answer("no"), cfg)
    assert task.inputs == ("16", "16.0", "'a'") and task.outputs == ("16", "16.0", "'a'")
    assert rollouts[1].verdict == "invalid" and rollouts[1].reason == "its runs make no induction task" and rollouts[1].reward == -0.5


def test_references_are_dropped_until_the_prompt_fits(policy, executor):
    buffer = TaskBuffer(100, random.Random(0))
    for n in range(10):
        buffer.add(Task("deduction", f"def f(x):\n    return x + {n}" + " " * 500 + "# ", "1", "1"))
    fits = len(policy.encode(propose_prompt("deduction"))) + 900
    _, (rollout,), _, _ = propose_once(policy, executor, [block(ADD, "2")], lambda copy: "no",
                                       config(types=("deduction",), batch=1, references=6, max_prompt=fits), buffer)
    assert len(rollout.references) == 1 and len(rollout.prompt_ids) <= fits


def test_a_given_program_that_does_not_fit_makes_way_for_the_identity(policy):
    buffer = TaskBuffer(100, random.Random(0))
    buffer.add(Task("deduction", "def f(x):\n    return x" + " " * 2000 + "# ", "1", "1"))
    short = len(policy.encode(propose_prompt("induction", (), ZERO_TRIPLET.program, 4)))
    for _ in range(20):
        assert Actor(policy, None, None, config(max_prompt=short)).proposal_request(buffer, "induction").program == ZERO_TRIPLET.program
    with pytest.raises(UsageError, match=f"--max-prompt is {short - 1}, but asking for a new induction task takes {short}"):
        for _ in range(20):
            Actor(policy, None, None, config(max_prompt=short - 1)).proposal_request(buffer, "induction")


def test_a_task_that_no_solver_could_be_shown_is_invalid(policy, executor):
    fits = len(policy.encode(propose_prompt("deduction")))
    _, (rollout,), _, _ = propose_once(policy, executor, [block(ADD + "  #" + "x" * 2900, "2")], lambda copy: "no",
                                       config(types=("deduction",), batch=1, references=0, max_prompt=fits))
    assert rollout.verdict == "invalid" and rollout.reason == f"too long: the solver's prompt would be over {fits} tokens"


def test_each_task_has_the_solve_rate_of_its_own_tries(policy, executor):
    two = [block(ADD, "2"), block("def f(x):\n    return x + 2", "5")]
    _, rollouts, _, _ = propose_once(policy, executor, two, lambda copy: answer("3" if copy else "7"))
    assert [(r.solve_rate, r.reward) for r in rollouts] == [(0.75, 0.25), (0.25, 0.75)]


def test_what_is_measured_of_new_tasks(policy, executor):
    buffer, other = TaskBuffer(100, random.Random(0)), "def f(a):\n    return a if a else 0"
    far = "def f(x):\n    s = []\n    for a in x:\n        if a > 2:\n            s.append(a)\n    return s"
    buffer.add(Task("abduction", far, "[1]", "[]"))  # the references are this and the identity
    says = [block(ADD, "2"), block(other, "3"), block("no", "1")]
    _, rollouts, _, _ = propose_once(policy, executor, says, lambda copy: answer("1"), None, buffer)
    distances = [pytest.approx(sum(edit_distance(text, given) for given in (far, ZERO_TRIPLET.program)) / 2) for text in (ADD, other)]
    assert [r.traits for r in rollouts] == [
        {"unique_ast": True, "answers": 1.0, "trivial": False, "edit_distance": distances[0]},
        {"unique_ast": True, "answers": 0.5, "trivial": True, "edit_distance": distances[1]}, {}]


def test_held_out_accuracy_is_greedy_and_of_each_type(policy, executor, monkeypatch):
    says, asked = iter([answer("3"), answer("4"), answer("4"), "cut off", answer("2")]), []
    sampler = Scripted(policy, lambda prompt: next(says))
    plain = sampler.generate
    sampler.generate = lambda prompts, max_tokens, copies=1, temperature=1.0: asked.append(temperature) or plain(prompts, max_tokens)
    tasks = [Task("deduction", ADD, "2", "3")] * 4 + [Task("abduction", ADD, "2", "3")]
    assert heldout_accuracy(Actor(policy, sampler, executor, config()), tasks) == {
        "deduction": (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 4))), "abduction": (1.0, 0.0)}
    assert asked == [0]


@pytest.mark.parametrize("frame", ("long", "examples"))
def test_references_of_a_rollout_are_those_in_its_prompt(policy, frame):
    buffer = TaskBuffer(100, random.Random(0))
    buffer.add(Task("deduction", ADD, "1", "2"))  # beside the identity
    cfg = config(references=2, max_prompt=4000, frame=frame)
    rollout = Actor(policy, None, None, cfg).proposal_request(buffer, "deduction")
    prompt = policy.decode(rollout.prompt_ids)
    assert ADD in rollout.references and all(program in prompt for program in rollout.references)


@pytest.mark.parametrize("kind,measured", (("deduction", True), ("induction", False)))
def test_distance_to_references_is_that_of_invented_programs_alone(kind, measured):
    """An induction task has the program that it was given, and with worked examples it has references too."""
    task = Task(kind, ADD, "1", "2", ("1", "2"), ("2", "3"))
    rollout = Rollout("propose", kind, [1], [2], "", task=task, references=["def f(x):\n    return x"])
    assert ("edit_distance" in azr.traits_of(rollout, TaskBuffer(9, random.Random(0)))) == measured


def test_solve_rewards_and_verdicts(policy, executor):
    replies = iter([answer("```output\n3\n```"), answer("```output\n4\n```"), answer(""), "cut off"])
    rollouts = Actor(policy, Scripted(policy, lambda prompt: next(replies)), executor, config()).solve([Task("deduction", ADD, "2", "3")] * 4)
    set_rewards([], [], rollouts, config())
    assert [(r.verdict, r.reward) for r in rollouts] == [("correct", 1.0), ("wrong", -0.5), ("malformed", -1.0), ("truncated", -1.0)]
