"""The command lines as a user runs them, on the shipped tiny model: killed, resumed, misused."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Forked

import run as run_folder
import train
from model import load_policy
from rewards import Rollout, Verdict
from sampling import Sampler
from tasks import Task, TaskBuffer, fingerprint

SMALL = ["--batch", "4", "--samples", "2", "--seed-factor", "1", "--heldout-limit", "2", "--save-every", "2",
         "--eval-every", "2", "--workers", "2"]
MACHINE = ("seconds/", "tokens_per_second", "memory_gb")  # what may differ from one run to the next


def command(*arguments, **options):
    return Forked("import sys, train; sys.exit(train.main())", arguments, **options)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def log(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def figures(run):
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in log(run)]


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else -1


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six uninterrupted steps; the other tests look at it or compare with it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--steps", "6", "--out", run], cwd=ROOT, text=True,
                          capture_output=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=run, out=done.stdout)


def test_a_run_leaves_all_its_files_and_says_where(whole_run):
    run = whole_run.folder
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "tasks.jsonl", "flags.jsonl", "curves.png", "checkpoint", "adapter", "tensorboard"):
        assert (run / name).exists(), name
    assert str(run) in whole_run.out and "curves.png" in whole_run.out and "±" in whole_run.out
    assert "step 0" in whole_run.out and "step 6" in whole_run.out
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(run.rglob("*.new"))


def test_metrics_have_every_documented_key(whole_run):
    rows = log(whole_run.folder)
    assert [row["step"] for row in rows] == list(range(7))
    types = ("deduction", "abduction", "induction")
    keys = {"step", "truncated", "entropy", "grad_norm", "loss", "lr", "tokens_per_second", "memory_gb",
            "flags", *(f"diversity/{k}" for k in ("unique_ast", "edit_distance", "trivial", "answers")),
            *(f"seconds/{k}" for k in ("generate", "execute", "update", "total"))}
    for t in types:
        keys |= {f"propose/{t}/{k}" for k in ("valid", "reward", "learnable", "solve_rate")}
        keys |= {f"solve/{t}/{k}" for k in ("accuracy", "reward", "well_formed")}
        keys |= {f"response_tokens/{role}/{t}" for role in ("propose", "solve")} | {f"buffer/{t}"}
    for row in rows[1:]:
        assert keys <= row.keys()
        assert all(not isinstance(value, (dict, list)) for value in row.values())
    for row in rows[::2]:
        assert {f"heldout/{t}" for t in types} <= row.keys()


def test_tasks_and_samples_are_whole(whole_run):
    tasks, samples = log(whole_run.folder, "tasks.jsonl"), log(whole_run.folder, "samples.jsonl")
    assert {t["type"] for t in tasks if t["step"] == 0} == {"deduction", "abduction", "induction"}
    assert all(0 <= t["solve_rate"] <= 1 for t in tasks if t["step"]) and any(t["step"] for t in tasks)
    for row in log(whole_run.folder)[1:]:
        new = [t for t in tasks if t["step"] == row["step"]]
        assert row["buffer/deduction"] == sum(t["type"] == "deduction" for t in tasks if t["step"] <= row["step"])
        assert len({t["program"] for t in new if t["type"] != "induction"}) == sum(t["type"] != "induction" for t in new)
    for step in range(1, 7):
        ours = [s for s in samples if s["step"] == step]
        assert len({(s["role"], s["type"]) for s in ours}) == len(ours) == 6
    assert all(s["prompt"].endswith("<think>") and s["response"] and s["verdict"] for s in samples)


def test_tensorboard_shows_curves(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(whole_run.folder / "tensorboard"))
    events.Reload()
    steps = [e.step for e in events.Scalars("heldout/mean")]
    assert steps == [0, 2, 4, 6]
    assert set(events.Tags()["scalars"]) == {key for row in log(whole_run.folder) for key in row} - {"step"}


def test_adapter_loads_with_plain_peft_and_is_the_trained_policy(whole_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, whole_run.folder / "adapter")(input_ids=ids).logits
    assert not torch.equal(before, after)
    policy, rng = load_policy("tiny", device="cpu"), random.Random(0)
    optimizer, sampler = torch.optim.AdamW(policy.trainable().values()), Sampler(policy)
    run_folder.load((whole_run.folder / "checkpoint" / "state.pt").read_bytes(),
                    run_folder.State(policy, sampler, optimizer, TaskBuffer(9, rng), rng))
    assert 0 < sampler.mean_tokens < 100  # by which the next request is planned
    with torch.no_grad():
        assert torch.allclose(policy.model(input_ids=ids).logits, after, atol=1e-6)


def test_kill_9_at_any_moment_then_resume_writes_the_same_metrics(whole_run, tmp_path):
    run = tmp_path / "killed"
    rng = random.Random(os.getpid())
    process = command(*SMALL, "--steps", 6, "--out", run)
    wait_for(process, lambda: (run / "config.json").exists())
    moments = [lambda: True, lambda: steps_logged(run) >= 2, lambda: steps_logged(run) >= 4]  # seeding, steps 1, 3
    for moment in moments:
        wait_for(process, moment)
        time.sleep(rng.random())  # somewhere inside seeding or a step
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        process = command("--resume", run)
    finish(process)
    assert figures(run) == figures(whole_run.folder)
    for name in ("tasks.jsonl", "samples.jsonl"):
        assert log(run, name) == log(whole_run.folder, name)


def test_ctrl_c_saves_and_more_steps_can_be_asked_for(whole_run, tmp_path):
    run = tmp_path / "stopped"
    process = command(*SMALL, "--steps", 4, "--out", run)
    wait_for(process, lambda: steps_logged(run) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the trainer and all it started
    out = finish(process)
    assert f"--resume {run}" in out
    done = log(run)[-1]["step"]
    assert done < 4 and torch.load(run / "checkpoint" / "state.pt", weights_only=True)["step"] == done
    finish(command("--resume", run, "--steps", 5))
    assert figures(run)[:4] == figures(whole_run.folder)[:4] and len(log(run)) == 6


def test_a_full_disk_loses_nothing(tmp_path):
    """Files may not grow over 300 kB, so the checkpoint cannot be written; what is there stays."""
    run = tmp_path / "full"
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "2", "--out", str(run)]) == 0
    before = (run / "checkpoint" / "state.pt").read_bytes()
    process = command("--resume", run, "--steps", 4, file_size=300_000)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "--resume" in err and "Traceback" not in err
    assert (run / "checkpoint" / "state.pt").read_bytes() == before
    finish(command("--resume", run, "--steps", 4))
    assert figures(run)[3]["step"] == 3 and len(log(run)) == 5


# --- bad usage: one line, exit code 2, nothing overwritten

def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def misuse(capsys, *arguments):
    try:
        code = train.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("arguments, says", [
    (["--no-such-flag"], "unrecognized"), (["--batch", "0"], "--batch is 0"), (["--batch", "x"], "--batch"),
    (["--samples", "1"], "at least 2 tries"), (["--batch", "1"], "at least 2 responses"), (["--buffer", "1"], "--buffer is 1"), (["--steps", "0"], "--steps"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--types", "deduction,magic"], "--types"), (["--types", ""], "--types"), (["--references", "-1"], "--references"),
    (["--inputs", "1"], "--inputs"), (["--workers", "0"], "--workers"), (["--zero-learnability", "x"], "invalid choice"),
    (["--model", "/no/such/folder"], "--model PATH"), (["--model", "no-such-model-xyz"], "--model PATH"),
    (["--entropy-coef", "nan"], "--entropy-coef is nan"), (["--solve-weight", "inf"], "--solve-weight is inf"),
    (["--timeout", "1e-9"], "--timeout is 1e-09"), (["--timeout", "1e300"], "--timeout is 1e+300"),
    (["--seed", "9" * 30], "--seed is 999"), (["--seed", "-1"], "--seed is -1"),
    (["--generate-batch", "-1"], "--generate-batch is -1"), (["--resume", ""], "--resume is empty"),
    (["--out", ""], "--out is empty"), (["--model", ""], "--model is empty"),
    (["--model", "tiny", "--quantize", "4bit", "--lora-rank", "0"], "4-bit"),
    (["--heldout-splits", "easy,odd"], "no held-out tasks of the split 'odd'"), (["--lr-final", "0"], "--lr-final is 0.0"),
    (["--heldout", "/no/such/file"], "cannot read the held-out tasks"), (["--resume", "/no/such/run"], "not a run folder"),
    (["--device", "warp"], "--device"),
])
def test_bad_values_are_one_clear_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    assert says in misuse(capsys, *out, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_touched(capsys, tmp_path, whole_run):
    before = {p: p.stat().st_mtime_ns for p in whole_run.folder.rglob("*")}
    assert "is not empty" in misuse(capsys, "--out", whole_run.folder)
    assert "drop --batch" in misuse(capsys, "--resume", whole_run.folder, "--batch", "2")
    assert {p: p.stat().st_mtime_ns for p in whole_run.folder.rglob("*")} == before
    (tmp_path / "mine.txt").write_text("x")
    assert "not empty" in misuse(capsys, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in misuse(capsys, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "tensor", "no weights", "text", "list"])
def test_a_damaged_checkpoint_is_named_and_kept(capsys, tmp_path, whole_run, damage):
    run = tmp_path / "damaged"
    (run / "checkpoint").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((whole_run.folder / name).read_bytes())
    good = (whole_run.folder / "checkpoint" / "state.pt").read_bytes()
    state = torch.load(io.BytesIO(good), weights_only=True)
    bad = {"truncate": good[:len(good) // 2], "garbage": b"x" * 5000, "empty": b"", "tensor": saved(torch.ones(3)), "list": saved([1, 2]),
           "no weights": saved(state | {"weights": None}), "text": saved(state | {"step": "six"})}[damage]
    (run / "checkpoint" / "state.pt").write_bytes(bad)
    assert "damaged" in misuse(capsys, "--resume", run)
    assert (run / "checkpoint" / "state.pt").read_bytes() == bad
    assert (run / "metrics.jsonl").read_bytes() == (whole_run.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("content", [b"", b"\xff", b"3", b"[1]", b"{}", b'{"versions": {}, "types": 3}', b"[" * 100_000])
def test_a_damaged_config_is_one_line(capsys, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "is not a run folder" in misuse(capsys, "--resume", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --- the parts of a step

def test_a_run_that_has_lost_its_checkpoint_keeps_its_logs(capsys, tmp_path, whole_run):
    run = copy_of(whole_run.folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoint")
    before = contents(run)
    assert "there is no" in (said := misuse(capsys, "--resume", run)) and "state.pt" in said
    assert contents(run) == before


def test_whoever_has_a_checkpoint_has_its_picture_and_adapter(tmp_path, monkeypatch):
    run, there = tmp_path / "run", []
    replace = run_folder.replace_file

    def watched(path, content):
        if path.name == "state.pt":
            there.append([(run / "curves.png").exists(), (run / "adapter" / "adapter_config.json").exists()])
        replace(path, content)

    monkeypatch.setattr(run_folder, "replace_file", watched)
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "1", "--out", str(run)]) == 0
    assert there == [[True, True]] * 2


def test_a_tokenizer_with_several_chat_templates_is_written_again_and_again(tmp_path, random_model):
    from transformers import AutoTokenizer
    policy = load_policy(random_model, lora_rank=0, device="cpu")
    policy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    run = run_folder.Run(tmp_path)
    run.export(policy)
    run.export(policy)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == policy.tokenizer.chat_template
    assert not (tmp_path / "model.new").exists()


def test_paper_values_and_that_a_flag_beats_them(tmp_path):
    cfg, _ = train.configure(train.parse(["--paper", "--steps", "3", "--out", str(tmp_path / "run")]))
    assert (cfg.batch, cfg.samples, cfg.references, cfg.inputs, cfg.max_prompt, cfg.max_response, cfg.lr, cfg.buffer, cfg.dedup, cfg.steps) == (
        64, 8, 6, 10, 6144, 8096, 1e-6, 16384, False, 3)


def test_learning_rate_falls_on_a_straight_line(tmp_path, capsys):
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "3", "--lr", "1e-4", "--lr-final", "0.1",
                       "--out", str(tmp_path / "run")]) == 0
    assert [row["lr"] for row in log(tmp_path / "run")[1:]] == pytest.approx([1e-4, 0.55e-4, 0.1e-4])
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1e-4)


def test_what_is_trained_is_what_the_flags_say(tmp_path, monkeypatch):
    kept, screened = [], []

    def watched(policy, optimizer, rollouts, cfg, micro_tokens):
        kept.append((optimizer, rollouts))
        return dict.fromkeys(("loss", "entropy", "grad_norm", "sampler_gap", "signal")) | {"micro_tokens": micro_tokens}

    monkeypatch.setattr(train, "trr_update", watched)
    monkeypatch.setattr(train, "screen", lambda step, rollouts: screened.append([*rollouts]) or [])
    for name, flags in (("a", []), ("b", ["--train-on-estimates", "--no-train-proposer", "--seed", "1"])):
        assert train.main([*SMALL, "--eval-every", "0", "--seed-factor", "2", "--types", "deduction,abduction",
                           "--steps", "1", "--out", str(tmp_path / name), *flags]) == 0
    (optimizer, plain), (_, other) = kept
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["weight_decay"] == 0
    tasks = {name: log(tmp_path / name, "tasks.jsonl") for name in "ab"}
    new = {name: [task for task in rows if task["step"]] for name, rows in tasks.items()}

    def count(rollouts):
        return [sum(r.role == role for r in rollouts) for role in ("propose", "solve")]

    assert count(plain) == [8, 8] and new["b"] and count(other) == [0, 8 + 2 * len(new["b"])]
    solved = {(r.type, r.task.program) for r in plain if r.role == "solve"}
    assert {(task["type"], task["program"]) for task in new["a"]} <= solved  # in the step that made them
    seeds, step, *_ = screened
    assert seeds and len(step) == 16 + 2 * len(new["a"])  # the tries of new tasks too
    assert tasks["a"] != tasks["b"]  # of another seed
    for rows in tasks.values():
        first = [task for task in rows if not task["step"]]
        triplets = [{(t["program"], t["input"]) for t in first if t["type"] == kind} for kind in ("deduction", "abduction")]
        assert triplets[0] == triplets[1] and len(first) == 2 * 8  # B·S of each
        assert len({fingerprint(task["program"]) for task in first}) == 8


def test_seeds_are_of_different_programs():
    def program(n):
        return f"def f(x):\n    return x + {n}"
    twice = [Rollout("propose", "deduction", [1], [2], verdict=Verdict.VALID, task=Task("deduction", program(n // 2), "1", "1"))
             for n in range(8)]
    buffer, cfg = TaskBuffer(100, random.Random(0)), train.Config(batch=4, seed_factor=1, types=("deduction",))
    actor = SimpleNamespace(propose=lambda *_: twice, clock={"generate": 1}, policy=SimpleNamespace(decode=str))
    train.seed_buffers(actor, buffer, cfg, SimpleNamespace(append=lambda *_: None), [])
    assert [task.program for task in buffer.tasks["deduction"][1:]] == [program(n) for n in range(3)]


def test_the_figures_of_a_step_are_those_of_its_rollouts():
    def made(role, verdict, tokens, reward, rate=None, **traits):
        return Rollout(role, "deduction", [1] * 9, [1] * tokens, verdict=verdict, reward=reward, solve_rate=rate,
                       advantage=7.0, traits=traits)
    proposals = [made("propose", Verdict.VALID, 1, 0.5, 0.5, trivial=True), made("propose", Verdict.VALID, 2, 0.0, 1.0, trivial=False),
                 made("propose", Verdict.VALID, 3, 0.0), made("propose", Verdict.MALFORMED, 6, -1.0)]
    solutions = [made("solve", Verdict.CORRECT, 2, 1.0), made("solve", Verdict.WRONG, 4, -0.5),
                 made("solve", Verdict.MALFORMED, 6, -1.0), made("solve", Verdict.TRUNCATED, 8, -1.0)]
    assert run_folder.step_metrics(proposals, solutions, train.Config(types=("deduction",))) == {
        "propose/deduction/valid": 0.75, "propose/deduction/reward": -0.125, "propose/deduction/learnable": 0.25,
        "propose/deduction/solve_rate": 0.75, "response_tokens/propose/deduction": 3, "solve/deduction/accuracy": 0.25,
        "solve/deduction/reward": -0.375, "solve/deduction/well_formed": 0.5, "response_tokens/solve/deduction": 5,
        "truncated": 0.125, "diversity/trivial": 0.5, "diversity/unique_ast": None, "diversity/edit_distance": None,
        "diversity/answers": None}


def test_samples_are_drawn_from_all_rollouts():
    rollouts = [Rollout("solve", kind, [1], [2], response=str(n)) for n in range(5) for kind in ("deduction", "abduction")]
    drawn = [train.pick_samples(step, rollouts, SimpleNamespace(decode=str)) for step in range(50)]
    assert all(len(rows) == 2 for rows in drawn) and {row["response"] for rows in drawn for row in rows} == set("01234")


def test_checkpoints_come_every_so_many_steps(tmp_path, monkeypatch):
    saved, run, save = {}, tmp_path / "run", run_folder.Run.save

    def watched(self, step, *rest):
        save(self, step, *rest)
        saved[step] = self.checkpoint.read_bytes()

    monkeypatch.setattr(run_folder.Run, "save", watched)
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "5", "--out", str(run)]) == 0
    assert list(saved) == [0, 2, 4, 5]
    for row in log(run)[1:]:
        assert row["seconds/generate"] + row["seconds/execute"] + row["seconds/update"] <= row["seconds/total"] + 0.01
    (run / "checkpoint" / "state.pt").write_bytes(saved[4])  # as after a kill in step 5
    assert train.main(["--resume", str(run), "--save-every", "3", "--device", "cpu", "--heldout", "tiny"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5]  # the fifth once


def test_ctrl_c_while_seeding_ends_at_once(tmp_path):
    run = tmp_path / "run"
    process = command(*SMALL, "--seed-factor", "99", "--steps", 1, "--out", run)
    wait_for(process, lambda: (run / "samples.jsonl").exists() and (run / "samples.jsonl").stat().st_size)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "No checkpoint yet. Begin with: python train.py --resume" in err
    assert not (run / "checkpoint").exists()


def test_a_second_ctrl_c_is_at_once_but_one_that_torchrun_passes_on_is_not():
    with train.interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert len(asked) == 2
        asked[0] -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("flags", [["--no-train-proposer", "--samples", "0"], ["--references", "0", "--types", "deduction"],
                                   ["--train-on-estimates", "--types", "abduction,induction", "--shuffle-rewards"], ["--lora-rank", "0", "--lr", "1e-4"],
                                   ["--baseline", "task", "--train-on-estimates", "--heldout-splits", "hard,easy"]])
def test_ablations_run(tmp_path, capsys, flags):
    small = [a for i, a in enumerate(SMALL) if not (a == "--samples" or SMALL[i - 1] == "--samples")] if "--samples" in flags else SMALL
    assert train.main([*small, "--steps", "1", "--out", str(tmp_path / "run"), *flags]) == 0
    row = log(tmp_path / "run")[1]
    types = flags[flags.index("--types") + 1].split(",") if "--types" in flags else ["deduction", "abduction", "induction"]
    assert {key.split("/")[1] for key in row if key.startswith("solve/")} == set(types)
    assert ("heldout/easy/mean" in row) == ("--heldout-splits" in flags) and "heldout/mean" in row
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed.count("mean") == 1 and ("easy/mean" in printed) == ("--heldout-splits" in flags)
    assert (tmp_path / "run" / ("model" if "--lora-rank" in flags else "adapter")).is_dir()


def test_flags_are_logged_counted_and_named_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run_folder.RULES, "judge", re.compile("return"))  # every program has it
    run = tmp_path / "run"
    assert train.main([*SMALL, "--types", "deduction", "--steps", "2", "--out", str(run)]) == 0
    found = log(run, "flags.jsonl")
    assert len(found) > 1 and {f["rule"] for f in found} == {"judge"} and all("return" in f["context"] for f in found)
    assert [sum(f["step"] == row["step"] for f in found) for row in log(run)] == [row["flags"] for row in log(run)]
    assert f"flags       {len(found)}, in {run}/flags.jsonl" in capsys.readouterr().out
    assert train.main(["--resume", str(run), "--steps", "3"]) == 0
    config = json.loads((run / "config.json").read_text())  # what was given with --resume holds from now on
    assert config["steps"] == 3 and "versions" in config


def test_alarms_are_said_when_they_begin(tmp_path, capsys, monkeypatch):
    alarm = {"name": "entropy", "value": 0.5, "band": "at least 1", "advice": "sleep"}
    monkeypatch.setattr(run_folder, "alarms", lambda metrics: [alarm] if metrics[-1]["step"] == 2 else [])
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert shown.count("step 2: entropy is 0.5, should be at least 1: sleep") == 1 and "ALARM=entropy" in shown


def test_resume_survives_line_separators_that_only_unicode_knows(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "1", "--out", str(run)]) == 0
    with open(run / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1, "response": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n")
    before = (run / "samples.jsonl").read_bytes()
    assert train.main(["--resume", str(run), "--steps", "2"]) == 0
    assert (run / "samples.jsonl").read_bytes().startswith(before)


# --- one process a run, nothing written before all is read

def copy_of(run, folder):
    shutil.copytree(run, folder)
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_one_process_at_a_time_and_no_lock_outlives_it(capsys, tmp_path, whole_run):
    run = copy_of(whole_run.folder, tmp_path / "run")
    first = run_folder.Run(run)
    first.acquire()
    before = contents(run)
    assert "another process trains in" in misuse(capsys, "--resume", run)
    assert contents(run) == before
    first.lock.release()  # as the kernel does for a process that is killed: the file stays, the lock goes
    assert (run / "lock").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert not (run / "lock").exists()


@pytest.mark.parametrize("flags, says", [(["--steps", "0"], "--steps is 0"), (["--steps", "3"], "has done 6 steps already"),
                                         (["--micro-tokens", "0"], "--micro-tokens is 0")])
def test_what_is_wrong_beside_resume_changes_nothing(capsys, tmp_path, whole_run, flags, says):
    run = copy_of(whole_run.folder, tmp_path / "run")
    before = contents(run)
    assert says in misuse(capsys, "--resume", run, *flags)
    assert contents(run) == before


def test_knobs_of_memory_speed_and_place_may_change_and_are_kept(tmp_path, whole_run):
    run = copy_of(whole_run.folder, tmp_path / "run")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")  # for others: a resumed run never reads it
    assert train.main(["--resume", str(run), "--micro-tokens", "512", "--workers", "1", "--generate-batch", "8"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["micro_tokens"], config["workers"], config["generate_batch"]) == (512, 1, 8)


@pytest.mark.parametrize("name, change, says", [
    ("metrics.jsonl", lambda lines: lines[:3] + lines[4:], "has lost 1 of its 7 lines up to step 6"),
    ("tasks.jsonl", lambda lines: lines[:-2], "has lost 2 of its"),
    ("metrics.jsonl", lambda lines: [*lines, b"\n"], "line 8 of"), ("samples.jsonl", lambda lines: [b"garbage\n", *lines], "line 1 of"),
    ("metrics.jsonl", lambda lines: [*lines[:2], b"\0" * 50 + b"\n", *lines[3:]], "line 3 of"),
    ("metrics.jsonl", lambda lines: [*lines[:2], b"[1]\n", *lines[3:]], "line 3 of"),
    ("metrics.jsonl", lambda lines: [b"[" * 100_000 + b"\n", *lines], "line 1 of")])
def test_logs_that_are_not_what_the_checkpoint_counted(capsys, tmp_path, whole_run, name, change, says):
    run = copy_of(whole_run.folder, tmp_path / "run")
    lines = (run / name).read_bytes().splitlines(keepends=True)
    (run / name).write_bytes(b"".join(change(lines)))
    before = contents(run)
    assert says in misuse(capsys, "--resume", run)
    assert contents(run) == before


TRIPLET = {"split": "easy", "type": "deduction", "program": "def f(x):\n    return x + 1", "input": "1", "output": "2"}


@pytest.mark.parametrize("row, says", [
    (TRIPLET | {"type": "magic"}, "unknown type 'magic'"), ([1], ""), (TRIPLET | {"output": "3"}, "f(1) gives 2, and the task says 3")])
def test_heldout_files_are_checked_when_they_are_read(capsys, tmp_path, row, says):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps(TRIPLET) + "\n" + json.dumps(row) + "\n")
    line = misuse(capsys, "--heldout", path, "--workers", "1", "--out", tmp_path / "run")
    assert "line 2" in line and says in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "width", "list"])
def test_damaged_model_files_are_one_line(capsys, tmp_path, damage):
    model = shutil.copytree(ROOT / "tiny", tmp_path / "model", ignore=shutil.ignore_patterns("longer", "*.py", "*.jsonl"))
    weights, config = model / "model.safetensors", model / "config.json"
    if damage == "list":
        config.write_text("[1]")
    elif damage == "width":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"intermediate_size": values["intermediate_size"] * 2}))
    else:
        weights.write_bytes({"cut": weights.read_bytes()[:5000], "empty": b"",
                             "pointer": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    assert "cannot load the model" in misuse(capsys, "--model", model, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_moves_with_its_checkout_and_paths_hold_from_any_folder(tmp_path, monkeypatch, whole_run):
    assert json.loads((whole_run.folder / "config.json").read_text())["heldout"] == "tiny"
    monkeypatch.chdir(ROOT.parent)
    given = ["--model", f"{ROOT.name}/tiny", "--heldout", f"{ROOT.name}/tiny/heldout.jsonl", "--out", str(tmp_path / "run")]
    cfg, run = train.configure(train.parse(given))
    run.close()
    assert cfg.model == str(ROOT / "tiny") and cfg.heldout == str(ROOT / "tiny" / "heldout.jsonl")


def test_a_disk_that_is_full_at_the_start_leaves_nothing_in_the_way(tmp_path):
    run = tmp_path / "run"
    process = command(*SMALL, "--steps", 1, "--out", run, file_size=100)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "cannot write to the run folder" in err and "Traceback" not in err
    assert not run.exists()


def test_what_the_user_leaves_open_follows_from_the_size_of_the_model():
    chosen = {}
    for weights in (135e6, 494e6, 3.1e9):
        cfg = train.fit_to_size(train.preset(train.CARD), weights)
        chosen[weights] = cfg.frame, cfg.max_response
    assert chosen == {135e6: ("brief", 512), 494e6: ("examples", 512), 3.1e9: ("examples", 2048)}
    given = train.preset(train.CARD, frame="long", max_response=7)
    assert train.fit_to_size(given, 135e6) == given


def test_a_model_that_never_writes_a_valid_task_is_told_why_and_ends_the_run(tmp_path, random_model, capsys, monkeypatch):
    monkeypatch.setattr(train, "fit_to_size", lambda cfg, weights: train.replace(cfg, frame="brief", max_response=12))
    run = tmp_path / "run"
    flags = "--batch 2 --seed-factor 1 --heldout-limit 1 --workers 1 --device cpu".split()
    assert train.main(["--model", random_model, *flags, "--out", str(run)]) == 2
    said = capsys.readouterr().err
    samples = log(run, "samples.jsonl")
    assert len(samples) == 20 and {row["step"] for row in samples} == {0}  # one of each type in each of ten rounds
    first, last = said.index("no valid task in 8 proposals; 8 of them are truncated"), said.index("train.py: none of 40")
    assert first < said.index("--- one complete response ---") < said.index("a higher --max-response") < last
    assert said[last:].count("\n") == 1 and str(run / "samples.jsonl") in said[last:] and "Traceback" not in said
    assert "40 sampled, 0% well formed, 0% valid" in said and not (run / "checkpoint").exists()
    assert json.loads((run / "config.json").read_text())["max_response"] == 12
    assert "--frame brief and --max-response 12" in said


def test_of_invalid_seeds_the_commonest_reason_is_named_with_a_whole_response():
    verdicts = Verdict
    drafts = [Rollout("propose", "deduction", [1], response=text, verdict=verdict, reason=reason) for text, verdict, reason in [
        ("one", verdicts.MALFORMED, ""), ("two\n\x1b[2J", verdicts.INVALID, "error: NameError: y"), ("three", verdicts.INVALID, "error: NameError: y")]]
    said = run_folder.why_none_is_valid(drafts)
    assert "3 proposals; 2 of them are invalid error: NameError: y" in said and "two\n?[2J\n" in said and "\x1b" not in said
    assert run_folder.WHAT_TO_TRY.keys() == {verdicts.TRUNCATED, verdicts.MALFORMED, verdicts.INVALID, verdicts.UNSAFE}


def test_a_disk_that_fills_during_seeding_is_one_line(tmp_path):
    run = tmp_path / "run"
    process = command(*SMALL, "--types", "deduction", "--steps", 1, "--out", run, file_size=4_000)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and f"--resume {run}" in err and "Traceback" not in err
    finish(command("--resume", run))  # the same command goes on once there is room


def test_a_real_model_is_measured_on_cruxeval_or_says_why_not(capsys, tmp_path, monkeypatch, random_model):
    import datasets
    from huggingface_hub.utils import httpx
    rows = [{"code": "def f(x):\n    return x * 2", "input": "2", "output": "4"}]

    def failing(error):
        def load(*_, **__):
            raise error
        return load

    for name, found in {"hub": lambda *_, **__: rows, "offline": None, "proxy": failing(httpx.ProxyError("403 Forbidden")),
                        "damaged": failing(datasets.exceptions.DatasetGenerationError("cut"))}.items():
        if found:
            monkeypatch.setattr(datasets, "load_dataset", found)
        else:
            monkeypatch.undo()
        cfg, run = train.configure(train.parse(["--model", random_model, "--out", str(tmp_path / name)]))
        run.close()
        assert cfg.heldout == json.loads((tmp_path / name / "config.json").read_text())["heldout"]
        assert cfg.heldout == ("cruxeval" if name == "hub" else "tiny")
    assert capsys.readouterr().err.count("cannot read the held-out tasks cruxeval") == 3
    metrics = [{"step": 0} | {f"heldout{key}": 0.5 for key in (
        "/mean", "_stderr/mean", "/deduction", "_stderr/deduction")}]
    assert run_folder.heldout_table(metrics, "cruxeval").startswith("held-out accuracy, cruxeval")
    assert run_folder.heldout_table(metrics, "tiny").startswith("held-out accuracy  ")
    metrics.append({"step": 1} | {f"heldout{key}": 0.25 for key in (  # resumed with other held-out tasks
        "/mean", "_stderr/mean", "/abduction", "_stderr/abduction")})
    assert re.search("abduction +– +25.0", run_folder.heldout_table(metrics, "other.jsonl"))
