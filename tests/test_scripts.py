"""scripts/: the simulation against a real run, ways to decode against plain greedy, the paper's experiment whole."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Forked
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT / "scripts"))

import gpu
import memory
import reproduce
from shapes import SHAPES, make_policy
from tables import markdown

from azr import fit_micro_tokens
from train import CARD, preset


def test_a_markdown_table_is_aligned():
    lines = markdown([["accuracy", "base", "trained"], ["deduction", 9.5, "75.5 ± 3.0"], ["mean", "–", 7]]).split("\n")
    assert lines[1].split() == ["|", "-" * 9, "|", "---:", "|", "-" * 9 + ":", "|"]
    assert len({len(line) for line in lines}) == 1 and lines[-1].startswith("| mean      |")


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


@pytest.mark.parametrize("micro_tokens", [1024])
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


def test_train_keeps_micro_batches_to_what_the_simulation_says_a_card_holds():
    cfg, gigabytes = preset(CARD), 4
    with memory.simulated("1.5B", "4bit") as (policy, optimizer, peak):
        assert fit_micro_tokens(policy, cfg, 24 * memory.GB) == cfg.micro_tokens
        fitting = fit_micro_tokens(policy, cfg, gigabytes * memory.GB)
        assert fitting < cfg.micro_tokens
        taken = memory.update_peak(policy, optimizer, peak, fitting, 1024) / memory.GB + memory.CONTEXT
    assert taken <= gigabytes and taken == pytest.approx(gigabytes, abs=1)  # it leaves little unused


# --- gpu.py ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["azr", "eager", "fused", "paged", "static"])
def test_each_way_to_decode_gives_the_greedy_tokens_of_plain_generate(way):
    torch.manual_seed(0)
    policy = make_policy("tiny", "bf16", "cpu", torch.float32, mean_response=16)
    assert gpu.share_equal(policy, 3, gpu.WAYS[way]) == 1
    prompts = [[500] * 9, [600] * 30]
    responses = gpu.WAYS[way](policy, 3, prompts, 20, 2)
    assert len(responses) == 4 and all(0 < len(ids) <= 20 for ids in responses)


# --- reproduce.py ------------------------------------------------------------------------------------

def run_until(arguments, is_there):
    """Start it and kill it with all that it started, as soon as is_there(). Fails if it ends before."""
    process = Forked("import sys; sys.path.append('scripts'); import reproduce; sys.exit(reproduce.main())", arguments)
    while not is_there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_reproduce_goes_the_whole_way_though_it_is_killed_while_training_and_while_evaluating(
        tmp_path, capsys, monkeypatch):
    flags = ("--steps 2 --batch 2 --samples 2 --max-response 48 --seed-factor 1 --save-every 1 --eval-every 0 "
             "--heldout-limit 2 --workers 1").split()
    arguments = ["--model", "tiny", "--limit", "20", "--out", str(tmp_path / "out"), "--", *flags]
    run, evaluation = tmp_path / "out" / "run", tmp_path / "out" / "eval-2"
    run_until(arguments, lambda: (run / "checkpoint" / "state.pt").exists())
    run_until(arguments, lambda: (evaluation / "answers.jsonl").exists() and (evaluation / "answers.jsonl").stat().st_size)
    answered = (evaluation / "answers.jsonl").read_bytes().count(b"\n")
    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda command: Forked(
        f"import sys, {Path(command[1]).stem} as script; sys.exit(script.main())", command[2:]))
    assert reproduce.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "$ python train.py --resume" in printed
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 3  # steps 0, 1 and 2
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if line.startswith("| heldout")}
    assert rows.keys() == {"heldout-deduction", "heldout-abduction", "heldout-induction"}
    assert all(0 <= float(cell) <= 100 for cells in rows.values() for cell in cells[:2])
    assert "only the first 20 tasks" in printed and "no figures for this model" in printed
    assert 0 < answered <= 120 == (evaluation / "answers.jsonl").read_bytes().count(b"\n")
    assert reproduce.main([*arguments, "--lr", "1"]) == 2
    assert "begun with another --lr" in capsys.readouterr().err
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "cut')  # by a kill
    assert reproduce.main([*arguments, "--steps", "3", "--micro-tokens", "2048"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["steps"], config["micro_tokens"]) == (3, 2048)
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 4
    assert (tmp_path / "out" / "eval-3" / "results.json").exists()


def scores(**accuracies):
    return {name: {"accuracy": accuracy} for name, accuracy in accuracies.items()}


def test_the_table_has_the_papers_averages_beside_ours(capsys):
    base = scores(**{"HumanEval+": 0.5, "MBPP+": 0.7, "AIME24": 0.1, "MATH500": 0.3})
    results = {"results": {"base": base, "trained": base | scores(AIME24=0.3)}, "limit": None,
               "missing": {"AMC23": "no file"}}
    reproduce.table("Qwen/Qwen2.5-Coder-3B", results)
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines)
            if len(cells) > 5}
    assert rows["code"] == ["60.0", "60.0", "51.2", "54.9"]
    assert rows["math"] == ["20.0", "30.0", "18.8", "26.5"]
    assert rows["total"] == ["40.0", "45.0", "35.0", "40.7"]
    assert any("Not comparable: AMC23" in line for line in lines)


def test_a_dry_run_says_steps_sizes_and_hours_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert reproduce.main(["--model", "Qwen2.5-3B", "--out", str(out), "--dry-run", "--", "--steps", "100"]) == 0
    text = capsys.readouterr().out
    assert "100 steps" in text and "2048 tokens" in text and " 6 hours in all" in text and "not measured" in text
    assert not out.exists()
    assert reproduce.main(["--model", "tiny", "--dry-run", "--", "--steps", "0"]) == 2
