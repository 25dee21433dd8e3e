"""scripts/: the simulation against a real run, ways to decode against plain greedy, the paper's experiment whole."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT / "scripts"))

import gpu
import memory
import reproduce
from shapes import SHAPES, make_policy


# --- memory.py ---------------------------------------------------------------------------------------

def allocated(action):
    """Bytes at most that PyTorch's CPU allocator gave out during the action, over what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", (128, 4, 4, 2, 512, 4000, True))
    policy = make_policy("small", "bf16", "cpu", torch.float32)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-5)
    return policy, optimizer


class Nothing:
    """Stands for memory.Peak where PyTorch's own allocator is asked instead."""

    phase, peaks = "", dict.fromkeys(("update", "prompt pass", "decoding"), 0)

    def begin(self, phase):
        pass


@pytest.mark.parametrize("micro_tokens", [1024, 4096])
def test_the_simulated_update_takes_what_a_real_one_takes(small, micro_tokens):
    memory.update_peak(*small, Nothing(), 256, 128)  # once before, so that AdamW has its moments
    real = allocated(lambda: memory.update_peak(*small, Nothing(), micro_tokens, 256))
    with memory.simulated("small", "bf16", torch.float32) as (policy, optimizer, peak):
        before = peak.live
        assert memory.update_peak(policy, optimizer, peak, micro_tokens, 256) - before == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("rows, prompt", [(4, 64), (16, 200)])
def test_the_simulated_sampling_takes_what_a_real_one_takes(small, rows, prompt):
    real = allocated(lambda: memory.sampling_peaks(small[0], Nothing(), rows, prompt))
    with memory.simulated("small", "bf16", torch.float32) as (policy, _, peak):
        before = peak.live
        assert max(memory.sampling_peaks(policy, peak, rows, prompt)) - before == pytest.approx(real, rel=0.05)
