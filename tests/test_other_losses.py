"""Another loss is one function in place of `azr.policy_loss`: GSPO and Dr. GRPO as worked examples."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import naive_logprobs, rollouts_of

import azr
import train

CFG = SimpleNamespace(clip=0.2, entropy_coef=0.0, max_grad_norm=1e9, micro_tokens=60, types=("deduction",), batch=3, max_response=20)


def gspo_loss(new_N, old_N, advantages_R, lengths_R, total, cfg):
    """GSPO (Zheng et al. 2025): one ratio a response, the geometric mean of its tokens' ratios; a mean over responses."""
    owners_N = torch.repeat_interleave(torch.arange(len(lengths_R), device=new_N.device), lengths_R)
    sums_R = torch.zeros_like(advantages_R).index_add(0, owners_N, new_N - old_N)
    ratio_R = torch.exp(sums_R / lengths_R)
    clipped_R = ratio_R.clamp(1 - cfg.clip, 1 + cfg.clip)
    surrogate_R = torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
    return -surrogate_R.sum() / (2 * len(cfg.types) * cfg.batch)  # responses of the whole step


def dr_grpo_loss(new_N, old_N, advantages_R, lengths_R, total, cfg):
    """Dr. GRPO (Liu et al. 2025): a constant instead of the number of tokens, so that length earns nothing."""
    ratio_N = torch.exp(new_N - old_N)
    advantages_N = torch.repeat_interleave(advantages_R, lengths_R)
    clipped_N = ratio_N.clamp(1 - cfg.clip, 1 + cfg.clip)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    return -surrogate_N.sum() / (2 * len(cfg.types) * cfg.batch * cfg.max_response)


def slow_gspo(new, old, advantages, cfg):
    """new, old: a list of numbers for each response."""
    total = 0.0
    for news, olds, advantage in zip(new, old, advantages):
        ratio = math.exp(sum(a - b for a, b in zip(news, olds)) / len(news))
        total -= min(ratio * advantage, min(max(ratio, 1 - cfg.clip), 1 + cfg.clip) * advantage)
    return total / (2 * len(cfg.types) * cfg.batch)


def slow_dr_grpo(new, old, advantages, cfg):
    total = 0.0
    for news, olds, advantage in zip(new, old, advantages):
        for a, b in zip(news, olds):
            ratio = math.exp(a - b)
            total -= min(ratio * advantage, min(max(ratio, 1 - cfg.clip), 1 + cfg.clip) * advantage)
    return total / (2 * len(cfg.types) * cfg.batch * cfg.max_response)


def slow_token_mean(new, old, advantages, cfg):
    scale = 2 * len(cfg.types) * cfg.batch * cfg.max_response / sum(map(len, new))
    return slow_dr_grpo(new, old, advantages, cfg) * scale


LOSSES = [(azr.policy_loss, slow_token_mean), (gspo_loss, slow_gspo), (dr_grpo_loss, slow_dr_grpo)]


@pytest.mark.parametrize("loss, oracle", LOSSES)
def test_value_and_gradient_off_the_policy(loss, oracle):
    """Ratios on both sides of the clip, against a loop, and its differences."""
    draw = torch.Generator().manual_seed(0)
    lengths, advantages = [1, 4, 2, 7], [1.0, -0.5, 2.0, -1.5]
    old_N = -torch.rand(sum(lengths), generator=draw, dtype=torch.float64)
    new_N = (old_N + 0.4 * torch.randn(sum(lengths), generator=draw, dtype=torch.float64)).requires_grad_()

    def slow(values):
        new = [part.tolist() for part in values.split(lengths)]
        return oracle(new, [part.tolist() for part in old_N.split(lengths)], advantages, CFG)

    value = loss(new_N, old_N, torch.tensor(advantages, dtype=torch.float64), torch.tensor(lengths), sum(lengths), CFG)
    value.backward()
    assert value.item() == pytest.approx(slow(new_N.detach()), rel=1e-9)
    for place in range(len(new_N)):
        up, down = new_N.detach().clone(), new_N.detach().clone()
        up[place] += 1e-6
        down[place] -= 1e-6
        assert new_N.grad[place].item() == pytest.approx((slow(up) - slow(down)) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("loss, oracle", LOSSES)
def test_the_update_steps_along_its_gradient(loss, oracle, policy, monkeypatch):
    """In micro-batches, against one row after the other: where the ratio is 1, d ratio = d log p."""
    monkeypatch.setattr(azr, "policy_loss", loss)
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5, 2.0, -0.3, 0.1])
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    metrics = azr.trr_update(policy, torch.optim.SGD(policy.trainable().values(), lr=1.0), rollouts, CFG)
    steps = {name: before[name] - p.detach() for name, p in policy.trainable().items()}
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(before[name])
    policy.causal.zero_grad()
    new = [naive_logprobs(policy, rollout)[0] for rollout in rollouts]
    advantages = [rollout.advantage for rollout in rollouts]
    if loss is gspo_loss:
        weights = [1 / (6 * len(logps)) for logps in new]
    elif loss is dr_grpo_loss:
        weights = [1 / (6 * CFG.max_response)] * 6
    else:
        weights = [1 / sum(map(len, new))] * 6
    sum(-weight * advantage * logps.sum() for weight, advantage, logps in zip(weights, advantages, new)).backward()
    for name, p in policy.trainable().items():
        assert torch.allclose(steps[name], p.grad, atol=1e-5), name
    numbers = [logps.tolist() for logps in new]
    assert metrics["loss"] == pytest.approx(oracle(numbers, numbers, advantages, CFG), abs=1e-6)


@pytest.mark.parametrize("loss", [gspo_loss, dr_grpo_loss])
def test_a_step_of_training(loss, tmp_path, monkeypatch):
    monkeypatch.setattr(azr, "policy_loss", loss)
    flags = "--batch 4 --samples 2 --seed-factor 1 --heldout-limit 2 --steps 1 --workers 1".split()
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["grad_norm"] > 0
