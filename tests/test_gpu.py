"""On a CUDA GPU: the same numbers as on a CPU, 4-bit weights, CUDA graphs, out of memory, a run that is resumed."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, make_random_model

import azr
import sampling
from azr import trr_update
from model import load_policy, response_logprobs
from rewards import Rollout
from sampling import Sampler
from train import CARD, preset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12] * 20, [5], [7, 8]]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


def loaded(folder, device, **options):
    """The model with LoRA that is not zero, alike on every device."""
    policy = load_policy(folder, **{"lora_rank": 8, "quantize": "none", "device": device, **options})
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.trainable().items():
        if "lora_" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_random_model(tmp_path_factory.mktemp("wide"), **WIDE)


def rollouts_of(policy, copies=3, tokens=40):
    """Samples of every prompt, with advantages of both signs."""
    requests = []
    for prompt in PROMPTS:
        requests += [prompt] * copies
    responses = Sampler(policy).generate(PROMPTS, tokens, copies)
    return [Rollout("solve", "deduction", prompt, ids, logps, advantage=(-1.0) ** i)
            for i, (prompt, (ids, logps)) in enumerate(zip(requests, responses))]


def greedy_tokens(policy, rows):
    """120 greedy tokens of every prompt, twice."""
    return [ids for ids, logps in Sampler(policy, rows).generate(PROMPTS, 120, copies=2, temperature=0)]


def test_the_gradient_is_that_of_a_cpu(folder):
    policies = [loaded(folder, device, dtype="fp32") for device in ("cpu", "cuda")]
    rollouts, found = rollouts_of(policies[0]), []
    for policy in policies:
        policy.causal.train()
        figures = azr._accumulate_gradients(policy, rollouts, 4096, preset(CARD))
        found.append((figures, [p.grad.cpu() for p in policy.trainable().values()]))
    (loss, entropy, gap), theirs = found[0][0], found[1][0]
    assert [loss, entropy] == pytest.approx(theirs[:2], rel=1e-4) and max(gap, theirs[2]) < 1e-3
    for ours, theirs in zip(found[0][1], found[1][1]):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(ours.abs().max()) + 1e-8)


def test_greedy_tokens_are_those_of_a_cpu_with_graphs_and_without(folder, monkeypatch):
    policies = [loaded(folder, device, dtype="fp32") for device in ("cpu", "cuda")]
    captured = []
    monkeypatch.setattr(sampling, "capture", lambda do, capture=sampling.capture: captured.append(1) or capture(do))
    for policy in policies:
        policy.end_ids = frozenset(range(0, 258, 16))
    for rows in (0, 3):
        expected, found = (greedy_tokens(policy, rows) for policy in policies)
        assert found == expected and captured
    monkeypatch.setattr(sampling, "uses_graphs", lambda policy: False)
    assert greedy_tokens(policies[1], 3) == expected


@pytest.mark.parametrize("quantize", ("none", "4bit"))
def test_samples_are_from_what_is_trained(folder, quantize):
    """The mean of −log p(sample) − entropy is 0 if sampler and trainer are one; in bf16, over graphs."""
    policy = loaded(folder, "cuda", quantize=quantize)
    kinds = {type(module).__name__ for module in policy.causal.modules()}
    assert ("Linear4bit" in kinds) == (quantize == "4bit")
    responses = Sampler(policy).generate([[9, 8, 7]], 40, copies=256)
    samples = [Rollout("solve", "deduction", [9, 8, 7], *response, advantage=1.0) for response in responses]
    rows = [[sample] for sample in samples]
    with torch.no_grad():
        parts = [response_logprobs(policy, rows[i:i + 64]) for i in range(0, 256, 64)]
    surprise_N = torch.cat([-logps_N - entropies_N for logps_N, entropies_N in parts])
    assert len(surprise_N) > 5000
    assert abs(float(surprise_N.mean())) < 4 * float(surprise_N.std()) / len(surprise_N) ** 0.5
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.0)
    gap = trr_update(policy, optimizer, samples, preset(CARD))["sampler_gap"]
    assert 0 < gap < 0.1  # the rounding of bf16: 0.05 with 4-bit weights on an H100


@pytest.mark.parametrize("options", ({"quantize": "4bit"}, {"quantize": "none"}, {"lora_rank": 0}, {"dtype": "fp16"}))
def test_good_responses_become_likelier(folder, options):
    policy = loaded(folder, "cuda", **options)
    rollouts = rollouts_of(policy)
    rate = 1e-4 if options == {"lora_rank": 0} else 1e-2
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=rate)

    def gain():
        with torch.no_grad(), policy.autocast():
            return sum(r.advantage * response_logprobs(policy, [[r]])[0].mean().item() for r in rollouts)
    before = gain()
    for _ in range(3):
        figures = trr_update(policy, optimizer, rollouts, preset(CARD, entropy_coef=0.0))
        assert figures["grad_norm"] > 0
    assert gain() > before + 0.1


def test_out_of_memory_is_answered_with_fewer_rows_and_smaller_batches(folder, monkeypatch):
    """Real ones: the process may take little more than the model does."""
    policy = loaded(folder, "cuda", dtype="fp32")
    policy.end_ids = frozenset({256})
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 ** 27) / whole)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sampler = Sampler(policy)
            responses = sampler.generate(PROMPTS, 600, copies=100)
            assert len(responses) == 500 and all(ids for ids, logps in responses) and 0 < sampler.rows < 500
            rollouts = [Rollout("solve", "deduction", [3] * 40, ids, advantage=1.0) for ids, logps in responses[:60]]
            optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
            figures = trr_update(policy, optimizer, rollouts, preset(CARD, micro_tokens=40_000))
        assert figures["loss"] is not None and figures["micro_tokens"] < 40_000
        assert {str(warning.message).split(":")[0] for warning in said} >= {
            "out of GPU memory in sampling", "out of GPU memory in the update"}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_on_a_gpu_goes_on_where_it_was(tmp_path):
    """The shipped model on a GPU: five steps, and two with three after them, give the same accepted tasks."""
    def run(*arguments):
        done = subprocess.run([sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    small = ["--batch", 4, "--samples", 2, "--seed-factor", 1, "--heldout-limit", 4, "--save-every", 1, "--device", "cuda"]
    out = run(*small, "--steps", 4, "--out", tmp_path / "whole")
    assert "micro-batches of at most 4,096 tokens fit into memory" in out
    run(*small, "--steps", 2, "--out", tmp_path / "parts")
    run("--resume", tmp_path / "parts", "--steps", 4)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "parts")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 1, 2, 3, 4]
    assert all(row["memory_gb"] > 0 and row["sampler_gap"] < 0.1 for row in rows[0][1:])
    assert [row["loss"] for row in rows[0][1:]] == pytest.approx([row["loss"] for row in rows[1][1:]], abs=1e-3)
