"""scripts/: the simulation against a real run, ways to decode against plain greedy, the paper's experiment whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Forked
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT / "scripts"))

import bonus
import gpu
import memory
import peer
import real_run
import reproduce
from shapes import SHAPES, make_policy
from tables import markdown

from azr import fit_micro_tokens
from rewards import Rollout
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


# --- peer.py -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--model MODEL --micro-rows 5", "--micro-rows is 5; it must divide the 64 completions of a step"),
    ("--model MODEL --prompts 31", "--prompts is 31; it must be between 1 and 30"),
    ("--model MODEL --copies 1", "--copies is 1; it must be between 2 and 10000"),
    ("--model MODEL/config.json", "give a folder with a config.json")])
def test_sizes_that_do_not_go_together_are_one_line(tmp_path, capsys, flags, message):
    (tmp_path / "config.json").write_text("{}")
    assert peer.main(flags.replace("MODEL", str(tmp_path)).split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def step_of(sampling, update, tokens, prompt_tokens=900):
    return {"sampling": sampling, "update": update, "step": sampling + update + 1, "tokens": tokens,
            "prompt tokens": prompt_tokens, "trained weights": 10}


def test_the_ratio_to_trl_is_of_seconds_a_token_in_the_same_round():
    theirs = [step_of(4, 8, 200), step_of(9, 6, 100), step_of(6, 7, 100)]
    ours = [step_of(1, 2, 100), step_of(2, 3, 100), step_of(2, 4, 200)]
    results = {"TRL: generate": theirs, peer.CONTINUOUS: [], "this code": ours}
    lines = peer.table(results, {peer.CONTINUOUS: "ValueError: no pages"}).splitlines()
    head, _, generate, continuous, own = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    figures = dict(zip(head, generate))
    assert figures["tokens"] == "100" and figures["sampling: s"] == "6.0" and figures["step: s"] == "14.0"
    assert figures["sampling: s / 1,000 tokens"] == "60.0"  # of 20, 90 and 60
    assert figures["sampling: ratio"] == "4.50"             # of 20 / 10, 90 / 20 and 60 / 10
    assert figures["update: ratio"] == "2.00"               # of 40 / 20, 60 / 30 and 70 / 20
    assert own[-3:] == ["1.00"] * 3
    assert continuous[0] == "TRL: continuous batching did not run: ValueError: no pages" and set(continuous[1:]) == {"–"}


@pytest.mark.parametrize("results, failures, message", [
    ({"TRL: generate": [step_of(1, 1, 9, 901)], "this code": [step_of(1, 1, 9)]}, {}, "901 prompt tokens, this code 900"),
    ({"TRL: generate": [step_of(1, 1, 9)], "this code": []}, {"this code": "MemoryError"}, "no step: MemoryError")])
def test_no_table_without_a_comparison(results, failures, message):
    with pytest.raises(peer.UsageError, match=message):
        peer.table(results, failures)


@pytest.mark.parametrize("source, reason", [
    ("raise ValueError('one\\ntwo')", "ValueError: one"),
    ("try: 1 / 0\nexcept ZeroDivisionError: raise ValueError('no cache')", "ValueError: no cache"),
    ("import sys; sys.exit('no model')", "no model"),
    ("import sys; sys.exit(3)", "it ended with code 3"),
    ("import os; os.kill(os.getpid(), 9)", "it was killed by signal 9, perhaps for want of memory")])
def test_the_reason_why_a_process_ended_is_one_line(source, reason):
    done = subprocess.run([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)
    assert peer.end_reason(done.returncode, done.stderr) == reason


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


# --- real_run.py -------------------------------------------------------------------------------------

def test_a_real_run_that_is_killed_goes_on_and_gives_paired_differences(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = ("--batch 2 --samples 2 --max-response 48 --seed-factor 1 --save-every 1 --eval-every 0 --heldout-limit 2 "
             "--workers 1").split()
    arguments = ["--model", "tiny", "--minutes", "0.01", "--benchmarks", "heldout", "--limit", "8", "--out", str(out)]
    process = Forked("import sys; sys.path.append('scripts'); import real_run; sys.exit(real_run.main())",
                     [*arguments, "--", *flags])
    while not (out / "self-play" / "checkpoint" / "state.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    monkeypatch.setattr(real_run, "LOOK", 0.05)
    monkeypatch.setattr(real_run.subprocess, "Popen", lambda command: Forked(
        f"import sys, {Path(command[1]).stem} as script; sys.exit(script.main())", command[2:]))
    assert real_run.main([*arguments, "--", *flags]) == 0
    first = capsys.readouterr().out
    assert "$ python train.py --resume" in first
    assert json.loads((out / "shuffled" / "config.json").read_text())["shuffle_rewards"] is True
    for name in ("self-play", "shuffled"):
        steps = real_run.metrics_of(out / name)
        assert 1 < len(steps) < 100 and real_run.minutes_of(out / name) >= 0.01
    table = (out / "results.md").read_text()
    assert "| heldout-deduction |" in table and "shuffled, difference" in table and (out / "results.png").stat().st_size
    assert real_run.main([*arguments, "--", *flags]) == 0  # nothing is trained or answered again
    second = capsys.readouterr().out
    assert "train.py" not in second and (out / "results.md").read_text() == table


def test_the_columns_of_a_real_run_are_accuracies_and_paired_differences():
    def figures(*correct):
        share = sum(correct) / len(correct)
        return {"pass@k": {"1": [share, 0.25]}, "correct": {str(place): [hit] for place, hit in enumerate(correct)}}
    columns = real_run.columns_of({"MATH500": figures(0, 0, 1, 1)}, {"self-play": {"MATH500": figures(1, 0, 1, 1)}})
    assert columns["base"]["MATH500"][0] == 0.5 and columns["self-play"]["MATH500"][0] == 0.75
    mean, error = columns["self-play, difference"]["MATH500"]
    assert mean == 0.25 and error == pytest.approx((3 / 16 / 4) ** 0.5)  # of four differences: 1, 0, 0, 0


def test_a_real_run_needs_a_run_that_exists(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        real_run.main(["--model", "tiny", "--minutes", "1", "--out", str(tmp_path / "out"), "--runs", "self-play,best"])
    assert ended.value.code == 2 and "--runs is self-play,best" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- bonus.py ----------------------------------------------------------------------------------------

def test_the_parts_of_an_update_add_up_to_it(small):
    policy, _ = small
    rollouts = [Rollout("solve", "deduction", [1, 2, 3], [4, 5, 6], advantage=1.0),
                Rollout("solve", "abduction", [7, 8], [9, 10], advantage=-0.5)]
    cfg = preset(CARD, entropy_coef=0.1)
    whole = bonus.gradient(policy, rollouts, cfg, 64)
    of_advantages, of_bonus = bonus.parts(policy, rollouts, cfg, 64)
    torch.testing.assert_close(of_advantages + of_bonus, whole)
    assert of_advantages.norm() > 0 and of_bonus.norm() > 0
    assert [rollout.advantage for rollout in rollouts] == [1.0, -0.5]
    assert bonus.gradient(policy, rollouts, preset(CARD, entropy_coef=0.0), 64).equal(of_advantages)


def test_parts_are_compared_before_and_after_adamw_divides_them():
    before, after, cosine = bonus.compare(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.1]))
    assert before == pytest.approx(1 / 5)
    assert after == pytest.approx(10 / (9 + 1600) ** 0.5)
    assert cosine == pytest.approx(50 / (9 + 2500) ** 0.5)


def test_the_scale_is_what_adamw_divides_by(small):
    policy, optimizer = small
    weights = [*policy.trainable().values()]
    before = torch.cat([weight.detach().flatten().clone() for weight in weights])
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    step = torch.cat([weight.detach().flatten() for weight in weights]) - before
    torch.testing.assert_close(step, -1e-5 * gradient / bonus.scale_of(policy, optimizer), rtol=1e-2, atol=1e-8)
