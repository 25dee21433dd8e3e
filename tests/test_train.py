"""The command lines as a user runs them, on the shipped tiny model: killed, resumed, misused."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import report
import train
from azr import Rollout
from conftest import ROOT

SMALL = ["--batch", "4", "--samples", "2", "--seed-factor", "1", "--heldout-limit", "4", "--save-every", "2",
         "--eval-every", "2", "--workers", "2"]
MACHINE = ("seconds/", "tokens_per_second", "memory_gb")  # what may differ from one run to the next


def command(*arguments, **options):
    return subprocess.Popen([sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


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
    out = finish(command(*SMALL, "--steps", 6, "--out", run))
    return SimpleNamespace(folder=run, out=out)


def test_a_run_leaves_all_its_files_and_says_where(whole_run):
    run = whole_run.folder
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "tasks.jsonl", "flags.jsonl", "curves.png", "report.html", "checkpoint", "adapter", "tensorboard"):
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
            "flags", *(f"diversity/{k}" for k in ("unique_ast", "edit_distance", "trivial", "complexity", "answers", "padded")),
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
    readme = (ROOT / "README.md").read_text()
    for key in keys - {"step"}:
        head, *rest = key.split("/")
        assert head in readme and (not rest or rest[-1] in readme or rest[-1] in types), f"{key} is not explained in README"


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


def test_tensorboard_shows_curves_and_texts(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(whole_run.folder / "tensorboard"))
    events.Reload()
    steps = [e.step for e in events.Scalars("heldout/mean")]
    assert steps == [0, 2, 4, 6]
    assert any("solve/deduction" in tag for tag in events.Tags()["tensors"])


def test_adapter_loads_with_plain_peft_and_is_the_trained_policy(whole_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, whole_run.folder / "adapter")(input_ids=ids).logits
    assert not torch.equal(before, after)
    state = torch.load(whole_run.folder / "checkpoint" / "state.pt", weights_only=True)
    policy = train.load_policy("tiny", device="cpu")
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            weight.copy_(state["weights"][name])
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
    process = command(*SMALL, "--steps", 5, "--out", run)
    wait_for(process, lambda: steps_logged(run) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the trainer and all it started
    out = finish(process)
    assert f"--resume {run}" in out
    done = log(run)[-1]["step"]
    assert done < 5 and torch.load(run / "checkpoint" / "state.pt", weights_only=True)["step"] == done
    finish(command("--resume", run, "--steps", 6))
    assert figures(run)[:5] == figures(whole_run.folder)[:5] and len(log(run)) == 7


def test_a_full_disk_loses_nothing(whole_run, tmp_path):
    """Files may not grow over 300 kB, so the checkpoint cannot be written; what is there stays."""
    run = tmp_path / "full"
    finish(command(*SMALL, "--steps", 2, "--out", run))
    before = (run / "checkpoint" / "state.pt").read_bytes()
    limit = 300_000
    process = command("--resume", run, "--steps", 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "--resume" in err and "Traceback" not in err
    assert (run / "checkpoint" / "state.pt").read_bytes() == before
    finish(command("--resume", run, "--steps", 4))
    assert figures(run)[3]["step"] == 3 and len(log(run)) == 5


# --- bad usage: one line, exit code 2, nothing overwritten

def misuse(capsys, *arguments):
    try:
        code = train.main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("arguments, says", [
    (["--no-such-flag"], "unrecognized"), (["--batch", "0"], "--batch is 0"), (["--batch", "x"], "--batch"),
    (["--samples", "1"], "at least 2 tries"), (["--steps", "0"], "--steps"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--types", "deduction,magic"], "--types"), (["--types", ""], "--types"), (["--references", "-1"], "--references"),
    (["--inputs", "1"], "--inputs"), (["--workers", "0"], "--workers"), (["--zero-learnability", "x"], "invalid choice"),
    (["--model", "/no/such/folder"], "--model PATH"), (["--model", "no-such-model-xyz"], "--model PATH"),
    (["--intrinsic", "answers"], "NAME=WEIGHT"), (["--intrinsic", "size=1"], "the names are"), (["--intrinsic", "answers=-1"], "no weight is negative"),
    (["--heldout-splits", "easy,odd"], "no held-out tasks of the split 'odd'"), (["--max-flags", "-1"], "--max-flags is -1"), (["--lr-final", "0"], "--lr-final is 0.0"),
    (["--heldout", "/no/such/file"], "cannot read the held-out tasks"), (["--resume", "/no/such/run"], "not a run folder"),
    (["--device", "warp"], "--device"),
])
def test_bad_values_are_one_clear_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    assert says in misuse(capsys, *arguments, *out)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_touched(capsys, tmp_path, whole_run):
    before = {p: p.stat().st_mtime_ns for p in whole_run.folder.rglob("*")}
    assert "holds another run" in misuse(capsys, "--out", whole_run.folder)
    assert "drop --batch" in misuse(capsys, "--resume", whole_run.folder, "--batch", "2")
    assert {p: p.stat().st_mtime_ns for p in whole_run.folder.rglob("*")} == before
    (tmp_path / "mine.txt").write_text("x")
    assert "not empty" in misuse(capsys, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in misuse(capsys, "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty"])
def test_a_damaged_checkpoint_is_named_and_kept(capsys, tmp_path, whole_run, damage):
    run = tmp_path / "damaged"
    (run / "checkpoint").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((whole_run.folder / name).read_bytes())
    good = (whole_run.folder / "checkpoint" / "state.pt").read_bytes()
    bad = {"truncate": good[:len(good) // 2], "garbage": b"x" * 5000, "empty": b""}[damage]
    (run / "checkpoint" / "state.pt").write_bytes(bad)
    assert "damaged" in misuse(capsys, "--resume", run)
    assert (run / "checkpoint" / "state.pt").read_bytes() == bad
    assert (run / "metrics.jsonl").read_bytes() == (whole_run.folder / "metrics.jsonl").read_bytes()


# --- the parts of a step

def rollouts_with(rewards):
    return [Rollout(role, type, [1], [2], "", reward=reward)
            for (type, role), values in rewards.items() for reward in values]


REWARDS = {("deduction", "solve"): [1.0, -0.5, -0.5], ("deduction", "propose"): [0.75, 0.0, -1.0], ("induction", "solve"): [1.0, 1.0]}


def test_advantages_are_per_type_and_role_and_lambda_weighs_the_solver():
    plain, weighted = rollouts_with(REWARDS), rollouts_with(REWARDS)
    for rollouts, weight in ((plain, 1.0), (weighted, 3.0)):
        train.set_advantages(rollouts, SimpleNamespace(shuffle_rewards=False, solve_weight=weight, baseline="group", rejection_sampling=False), random.Random(0))
    assert [r.advantage for r in plain[:3]] == train.task_relative_advantages([1.0, -0.5, -0.5], "aaa")
    assert [r.advantage for r in plain[-2:]] == [0.0, 0.0]
    for a, b in zip(plain, weighted):
        assert b.advantage == pytest.approx(a.advantage * (3.0 if a.role == "solve" else 1.0))


def test_with_a_baseline_for_each_task_solutions_are_compared_with_those_of_their_task():
    rollouts = rollouts_with({("deduction", "solve"): [1.0, 1.0, -0.5, 1.0, -1.0, 1.0, -0.5], ("deduction", "propose"): [0.75, 0.0]})
    for rollout, task in zip(rollouts, "abababcd?"):
        rollout.task = task
    rollouts[6].task, rollouts[5].task = "c", "d"  # tried once each: compared with each other
    train.set_advantages(rollouts, SimpleNamespace(shuffle_rewards=False, solve_weight=1.0, baseline="task", rejection_sampling=False), random.Random(0))
    for members in ([0, 2, 4], [1, 3], [5, 6], [7, 8]):
        expected = train.task_relative_advantages([rollouts[i].reward for i in members], "a" * len(members))
        assert [rollouts[i].advantage for i in members] == expected
    assert rollouts[1].advantage == 0.0 != rollouts[0].advantage  # solved as always, and solved for once


def test_rejection_sampling_trains_on_what_was_right_and_on_nothing_else(tmp_path, capsys, monkeypatch):
    trained, update = [], train.trr_update
    monkeypatch.setattr(train, "trr_update", lambda policy, optimizer, rollouts, cfg: (
        trained.extend(rollouts), update(policy, optimizer, rollouts, cfg))[1])
    flags = ["--rejection-sampling", "--train-on-estimates", "--steps", "2", "--lora-rank", "0", "--lr", "1e-3"]
    assert train.main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 0
    assert trained and all((r.role, r.verdict, r.advantage) == ("solve", "correct", 1.0) for r in trained)
    assert "one of the two" in misuse(capsys, "--rejection-sampling", "--shuffle-rewards", "--out", tmp_path / "x")


def test_shuffled_rewards_stay_in_their_group_and_rewards_are_kept_for_the_log():
    seen = set()
    for seed in range(20):
        rollouts = rollouts_with(REWARDS)
        train.set_advantages(rollouts, SimpleNamespace(shuffle_rewards=True, solve_weight=1.0, baseline="group", rejection_sampling=False), random.Random(seed))
        assert [r.reward for r in rollouts] == [r.reward for r in rollouts_with(REWARDS)]
        assert sorted(r.advantage for r in rollouts[:3]) == pytest.approx(sorted(train.task_relative_advantages([1.0, -0.5, -0.5], "aaa")))
        seen.add(tuple(r.advantage > 0 for r in rollouts[:3]))
    assert len(seen) == 3  # the one good reward lands everywhere


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


def test_benchmarks_are_measured_during_training(tmp_path, capsys):
    rows = [{"id": f"sample_{n}", "code": f"def f(n):\n    n = n + {n}\n    return n", "input": "3", "output": str(3 + n)} for n in (1, 2)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cruxeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--steps", "1", "--eval-benchmarks", "CRUXEval-O", "--eval-data", str(tmp_path / "data")]
    assert train.main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 0
    before, after = log(tmp_path / "run")
    assert before["benchmark/CRUXEval-O"] in (0.0, 0.5, 1.0) and "benchmark_stderr/CRUXEval-O" in after
    assert "cannot be had" in misuse(capsys, "--eval-benchmarks", "AIME24", "--eval-data", tmp_path / "data", "--out", tmp_path / "x")


def test_readme_names_every_flag_with_its_defaults():
    readme = (ROOT / "README.md").read_text()
    for name, (tiny, card, paper, text) in train.KNOBS.items():
        cells = " | ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in (tiny, card, paper))
        assert f"| `--{name.replace('_', '-')}` | {cells} | {text} |" in readme
    for name in train.DEFAULTS:
        flag = {"train_proposer": "no-train-proposer", "dedup": "no-dedup"}.get(name, name).replace("_", "-")
        assert f"`--{flag}`" in readme, flag


@pytest.mark.parametrize("flags", [["--no-train-proposer", "--samples", "0"], ["--references", "0", "--types", "deduction"],
                                   ["--train-on-estimates", "--types", "abduction,induction", "--shuffle-rewards"], ["--lora-rank", "0", "--lr", "1e-4"],
                                   ["--baseline", "task", "--train-on-estimates", "--heldout-splits", "hard,easy"],
                                   ["--unpadded", "--message-gain", "--intrinsic", "answers=0.25,complexity=0.1"]])
def test_ablations_run(tmp_path, capsys, flags):
    small = [a for i, a in enumerate(SMALL) if not (a == "--samples" or SMALL[i - 1] == "--samples")] if "--samples" in flags else SMALL
    assert train.main([*small, "--steps", "1", "--out", str(tmp_path / "run"), *flags]) == 0
    row = log(tmp_path / "run")[1]
    types = flags[flags.index("--types") + 1].split(",") if "--types" in flags else ["deduction", "abduction", "induction"]
    assert {key.split("/")[1] for key in row if key.startswith("solve/")} == set(types)
    assert ("diversity/padded" in row) and (row["diversity/padded"] is None) == ("--unpadded" not in flags)
    assert ("heldout/easy/mean" in row) == ("--heldout-splits" in flags) and "heldout/mean" in row
    printed = capsys.readouterr().out  # every split that was measured, and none that was not
    assert [line.split("  ")[0] for line in printed.splitlines() if line.startswith("held-out accuracy")] == [
        "held-out accuracy", "held-out accuracy, easy"][:1 + ("--heldout-splits" in flags)]
    assert (tmp_path / "run" / ("model" if "--lora-rank" in flags else "adapter")).is_dir()


def test_flags_stop_a_run_that_goes_on_when_a_person_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(report.RULES, "judge", re.compile("sorted"))  # the tiny model knows no worse word
    run = tmp_path / "run"
    flags = [*SMALL, "--save-every", "100", "--max-flags", "1", "--steps", "9", "--out", str(run)]
    assert train.main(flags) == 3
    done = log(run)[-1]["step"]
    assert f"stopped after step {done}" in capsys.readouterr().out and 0 < done < 9
    found = log(run, "flags.jsonl")
    assert len(found) > 1 and {f["rule"] for f in found} == {"judge"} and all("sorted" in f["context"] for f in found)
    assert [sum(f["step"] == row["step"] for f in found) for row in log(run)] == [row["flags"] for row in log(run)]
    assert train.main(["--resume", str(run), "--max-flags", "100000", "--steps", str(done + 1)]) == 0
    assert log(run)[-1]["step"] == done + 1 and "flags" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())  # what was given with --resume holds from now on
    assert (config["max_flags"], config["steps"]) == (100000, done + 1) and "versions" in config


def test_alarms_are_said_when_they_begin(tmp_path, capsys, monkeypatch):
    alarm = {"name": "entropy", "since": 1, "value": 0.5, "band": "at least 1", "advice": "sleep"}
    monkeypatch.setattr(train, "alarms", lambda metrics: [alarm] if metrics[-1]["step"] == 2 else [])
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert shown.count("step 2: entropy is 0.5, should be at least 1: sleep") == 1 and "ALARM=entropy" in shown


def test_the_page_of_a_killed_run_can_be_had_and_a_folder_that_is_none_is_refused(tmp_path, whole_run, capsys):
    (whole_run.folder / "report.html").unlink()
    assert train.main(["--report", str(whole_run.folder)]) == 0
    assert (whole_run.folder / "report.html").stat().st_size > 10_000
    assert "is not a run folder" in misuse(capsys, "--report", tmp_path)


def test_resume_survives_line_separators_that_only_unicode_knows(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*SMALL, "--types", "deduction", "--eval-every", "0", "--steps", "1", "--out", str(run)]) == 0
    with open(run / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1, "response": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n")
    before = (run / "samples.jsonl").read_bytes()
    assert train.main(["--resume", str(run), "--steps", "2"]) == 0
    assert (run / "samples.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")  # bitsandbytes does not page on a CPU
def test_8bit_optimizers_train_and_resume_as_if_nothing_had_happened(tmp_path, capsys, optimizer):
    flags = [*SMALL, "--optimizer", optimizer, "--types", "deduction", "--eval-every", "0", "--lr", "1e-2"]
    assert train.main([*flags, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*flags, "--steps", "2", "--out", str(tmp_path / "halved")]) == 0
    assert train.main(["--resume", str(tmp_path / "halved"), "--steps", "4"]) == 0
    whole, halved = figures(tmp_path / "whole"), figures(tmp_path / "halved")
    assert whole[3:4] == halved[3:4] and whole[1]["entropy"] != whole[3]["entropy"]
    state = torch.load(tmp_path / "whole" / "checkpoint" / "state.pt", weights_only=True)["optimizer"]["state"]
    moments = [entry["__bnb_optimizer_quant_state__"]["state1"] for entry in state.values()]
    assert all((moment.dtype == torch.uint8) == (moment.numel() >= 4096) for moment in moments)  # its smallest tensor
