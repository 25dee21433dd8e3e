"""scripts/evidence.py: its figures by hand, its archive, and that docs/evidence-details.md has the tables of the kept runs."""

import json
import random
import re
import statistics
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from conftest import ROOT, Forked

import azr
import train
from azr import load_heldout
from executor import Executor
from rewards import Verdict

sys.path.append(str(ROOT / "scripts"))
import controls
import evidence

TYPES = ("deduction", "abduction", "induction")


def row(rng, met=()):
    answers = {name: {kind: "".join(str(rng.randint(0, 8 if name == "samples" else 1)) for _ in range(20)) for kind in TYPES}
               for name in ("hard", "easy", "samples")}
    return {"answers": answers, "met": {kind: list(met) for kind in TYPES}}


@pytest.mark.parametrize("measure, name, value", [
    ("hard, greedy", "hard", int), ("easy, greedy", "easy", int), ("hard, sampled", "samples", lambda n: int(n) / 8),
    ("hard, pass@8", "samples", lambda n: float(n != "0"))])
def test_differences_are_paired_by_task_and_leave_out_what_a_run_proposed(measure, name, value):
    rng = random.Random(0)
    base, runs = row(rng), [row(rng, met=[3]), row(rng, met=[3, 7])]
    means, variances = [], []
    for kind in TYPES:
        gains = [100 * (statistics.mean(value(run["answers"][name][kind][i]) for run in runs) - value(base["answers"][name][kind][i]))
                 for i in range(20) if name == "easy" or i not in (3, 7)]
        means.append(statistics.mean(gains))
        variances.append(statistics.pvariance(gains) / len(gains))
    mean, error = evidence.difference([base], runs, measure, TYPES)
    assert mean == pytest.approx(statistics.mean(means)) and error == pytest.approx(sum(variances) ** 0.5 / 3)


def test_every_row_is_a_command_that_train_accepts(tmp_path):
    from train import Config, configure, parse
    for name in evidence.commands():
        flags = evidence.flags_of(name, 3, tmp_path)
        cfg, _ = configure(parse([*flags, "--out", str(tmp_path / evidence.slug(name, 3))]))
        assert cfg.seed == 3 and cfg.inputs == Config().inputs  # the tiny model's values, also for other bases
        samples = 4 if "four tries" in name else 16 if "sixteen tries" in name else evidence.TRIES
        assert (cfg.batch, cfg.samples) == (16, samples) and 3 * cfg.batch == evidence.PROPOSALS
        assert cfg.train_proposer != any(text in name for text in ("proposer not trained", "imposed", "grammar", "replayed"))


def test_the_proposer_and_the_steps_tell_the_runs_of_a_pair_apart(tmp_path):
    from train import configure, parse
    for base in range(3):
        names = f"scarce ({base})", f"scarce, proposer not trained ({base})"
        trained, untrained = (asdict(configure(parse([*evidence.flags_of(name, 4, tmp_path), "--out", str(tmp_path / name)]))[0])
                              for name in names)
        assert {key for key in trained if trained[key] != untrained[key]} == {"train_proposer", "steps"}


def test_the_steps_of_sampled_deductions_are_counted(tmp_path):
    def task(kind, statements):
        program = "def f(n):\n" + "    n = n + 1\n" * statements + "    return n"
        return {"split": "hard", "type": kind, "program": program, "input": "1", "output": str(1 + statements)}
    tasks = [task("abduction", 4), task("deduction", 4), task("deduction", 5), task("deduction", 4)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    steps = {0: "4 44", 1: "4 3", 2: "4 5", 3: "4 6"}  # of the two samples of each task
    rows = [{"benchmark": f"heldout-{tasks[index]['type']}", "id": str(index), "response": "1 + 1 -> 2\n" * int(count) + "an arrow->"}
            for index, counts in steps.items() for count in counts.split()]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    correct = {"1": [True, True], "2": [True, True], "3": [False, True]}
    (tmp_path / "samples" / "results.json").write_text(json.dumps({"results": {"model": {"heldout-deduction": {"correct": correct}}}}))
    assert evidence.thoughts_of(tmp_path, tmp_path / "heldout.jsonl") == {"samples": 4, "complete": 2, "short": 1, "right": 1}
    assert evidence.thoughts([{"thoughts": {"samples": 4, "complete": 2, "short": 1, "right": 1}}, {},
                              {"thoughts": {"samples": 4, "complete": 4, "short": 0, "right": 1}}]) == ["75", "33", "12"]


def curve(scores, tried):
    """A kept run that is measured at each step: its accuracy on harder tasks, and how many new tasks a step tries."""
    lines = [{"step": step, "rates": {"0": tried - 1, "0.5": 1} if step else {}} for step in range(len(scores))]
    for line, score in zip(lines, scores):
        line |= {f"heldout{error}/{n}/mean": value for n in (4, 5, 6) for error, value in (("", score), ("_stderr", 0.03))}
    return [*lines, {"seconds": 1}]


def test_two_runs_are_compared_when_both_have_spent_the_same():
    trained, untrained = curve([0.1, 0.2, 0.4], tried=24), curve([0.1, 0.1, 0.2, 0.2, 0.3], tried=6)
    assert evidence.rollouts(trained[1]) == 96 + 192 and evidence.rollouts(untrained[1]) == 96 + 48
    assert evidence.learnable(trained[1]) == pytest.approx(100 / 48)
    for spent, gaps in (lambda row: 1, [0, 10, 20]), (evidence.rollouts, [0, 0, 10]):
        steps, found, errors = evidence.advantage(trained, untrained, spent)
        assert list(steps) == [0, 1, 2] and list(found) == pytest.approx(gaps)
        assert list(errors) == pytest.approx([3 * (2 / 3) ** 0.5] * 3)
    steps, _, _ = evidence.advantage(trained, untrained[:3] + untrained[-1:], evidence.rollouts)
    assert list(steps) == [0, 1]  # the other run never spent what two steps of this one did


def test_the_tables_of_the_page_are_those_of_the_kept_runs(tmp_path, monkeypatch):
    name = "docs/evidence-details.md"
    text = (ROOT / name).read_text()
    (tmp_path / "docs").mkdir()
    emptied, tables = re.subn(r"(?s)(<!-- \w+: [^\n]*\n).*?(<!-- end)", r"\1\2", text)
    assert tables == 3
    (tmp_path / name).write_text(emptied)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    runs = evidence.kept_runs()
    evidence.self_play_tables(runs)
    evidence.proposer_table(runs)
    evidence.controls_table(runs)
    assert (tmp_path / name).read_text() == text, "run python scripts/evidence.py --draw"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "ARCHIVE", tmp_path / "evidence.zip")
    return tmp_path / "evidence.zip"


def test_each_run_adds_its_rows_to_the_archive_and_keeps_the_others(archive):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: evidence.write_kept(f"run-{n}", [{"step": n}, {"text": "é\n"}]), range(12)))
    evidence.write_kept("run-3", [{"step": 30}])
    kept = {n: evidence.rows_of(evidence.kept_file(f"run-{n}")) for n in range(12)}
    assert kept == {n: [{"step": n}, {"text": "é\n"}] for n in range(12)} | {3: [{"step": 30}]}
    assert evidence.rows_of(evidence.kept_file("run-12")) == []


def test_equal_rows_make_equal_archives_in_any_order(archive):
    found = []
    for names in "ab", "ba":
        archive.unlink(missing_ok=True)
        for name in names:
            evidence.write_kept(name, [{"name": name}])
        found.append(archive.read_bytes())
    assert found[0] == found[1]


def test_a_kill_while_the_archive_is_written_loses_no_rows(archive, monkeypatch):
    evidence.write_kept("a", [{"step": 1}])

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", fail)
        with pytest.raises(KeyboardInterrupt):
            evidence.write_kept("b", [{"step": 2}])
    assert evidence.rows_of(evidence.kept_file("a")) == [{"step": 1}]
    evidence.write_kept("b", [{"step": 2}])
    assert [evidence.rows_of(evidence.kept_file(name)) for name in "ab"] == [[{"step": 1}], [{"step": 2}]]


# --- scripts/controls.py

SMALL = "--batch 3 --samples 2 --seed-factor 1 --save-every 1 --eval-every 0 --heldout-limit 1 --workers 1"


def run(script, folder, *flags):
    """Run it to its end. → the rows of tasks.jsonl"""
    process = Forked(f"import sys; sys.path.append('scripts'); import {script}; sys.exit({script}.main())", flags)
    printed = process.communicate()
    assert process.returncode == 0, printed
    return evidence.rows_of(folder / "tasks.jsonl")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("followed")
    return folder, run("train", folder, *SMALL.split(), "--steps", "3", "--out", folder)


def lengths(tasks):
    # the identity has no statement; the grammar has no such program, and gives one of one statement
    return Counter((task["step"], task["type"], max(1, task["program"].count("\n") - 1)) for task in tasks if task["step"])


@pytest.mark.parametrize("source", ("replayed", "grammar", "lengths"))
def test_new_tasks_are_as_long_as_those_of_the_followed_run_also_after_a_stop(tmp_path, followed, source):
    others, wanted = followed
    flags = ["--tasks", source, "--follow", others, "--no-train-proposer"]
    whole = run("controls", tmp_path / "whole", *flags, *SMALL.split(), "--steps", "3", "--out", tmp_path / "whole")
    if source == "replayed":
        assert [task | {"solve_rate": 0} for task in whole] == [task | {"solve_rate": 0} for task in wanted]
    elif source == "grammar":
        assert lengths(whole) == lengths(wanted)
        heldout = {task.program for tasks in load_heldout("tiny").values() for task in tasks if task.program.count("\n") > 4}
        assert heldout and not heldout & {task["program"] for task in whole if task["step"]}
    else:
        assert lengths(whole) <= lengths(wanted) and lengths(whole)
    run("controls", tmp_path / "cut", *flags, *SMALL.split(), "--steps", "2", "--out", tmp_path / "cut")
    again = run("controls", tmp_path / "cut", *flags[:4], "--resume", tmp_path / "cut", "--steps", "3")
    assert again == whole and any(task["solve_rate"] is not None for task in whole)


@pytest.mark.parametrize("reward, value", [("variance", lambda rate: 4 * rate * (1 - rate)), ("novelty", lambda rate: 1.0)])
def test_new_tasks_earn_another_reward(tmp_path, reward, value):
    tasks = run("controls", tmp_path, "--reward", reward, *SMALL.split(), "--steps", "2", "--out", tmp_path)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    valid = [row for row in samples if row["role"] == "propose" and row["solve_rate"] is not None]
    assert valid and all(row["reward"] == value(row["solve_rate"]) for row in valid)
    assert any(task["step"] for task in tasks)


def test_proposals_with_an_idle_statement_count_as_repeats(tmp_path):
    tasks = run("controls", tmp_path, "--refuse-idle", *SMALL.split(), "--batch", "8", "--steps", "2", "--out", tmp_path)
    own = [task for task in tasks if task["type"] != "induction"]
    seeded = {task["program"] for task in own if not task["step"]}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    refused = [row for row in samples if row["verdict"] == "repeat" and not any(
        f"```python\n{program}\n```" in row["response"] for program in seeded | {task["program"] for task in own})]
    assert refused and all(row["reward"] == 0 for row in refused)
    with Executor(workers=1) as executor:
        for task in own:
            lines = task["program"].split("\n")
            for index in range(1, len(lines) - 1):
                result, = executor.run([("\n".join(lines[:index] + lines[index + 1:]), task["input"])])
                assert not task["step"] or not result.ok or result.output != task["output"]


def test_proposals_wait_for_the_next_update_and_are_judged_a_second_time(tmp_path, monkeypatch):
    settle, set_rewards, set_advantages = azr.Actor.settle, train.set_rewards, train.set_advantages
    steps, second = [], []

    def watch_settle(actor, requests, temperature=1.0):
        if temperature and any(request.role == "solve" for request in requests):  # neither seeds nor held-out tasks
            second.extend(requests)
        return settle(actor, requests, temperature)

    def watch_rewards(proposals, *others):
        set_rewards(proposals, *others)
        steps.append({"proposed": proposals, "second": [*second],
                      "first": {r.task: r.solve_rate for r in proposals if r.task}})
        second.clear()

    def watch_advantages(rollouts, *arguments):
        set_advantages(rollouts, *arguments)
        steps[-1]["trained"] = [(r, r.solve_rate, r.reward, r.advantage) for r in rollouts]

    for name in ("Actor", "trained_rollouts"):  # which the control replaces, until the test ends
        monkeypatch.setattr(train, name, getattr(train, name))
    controls.judge_again()
    monkeypatch.setattr(train, "set_rewards", watch_rewards)
    monkeypatch.setattr(train, "set_advantages", watch_advantages)
    monkeypatch.setattr(azr.Actor, "settle", watch_settle)
    flags = [*SMALL.split(), "--batch", "8", "--samples", "4", "--steps", "3", "--out", str(tmp_path)]
    assert train.main(["--model", "tiny", *flags]) == 0

    assert not any(r.role == "propose" for r, *_ in steps[0]["trained"]) and not steps[0]["second"]
    compared = 0
    for before, after in zip(steps, steps[1:]):
        trained = [row for row in after["trained"] if row[0].role == "propose"]
        assert [r for r, *_ in trained] == before["proposed"] and any(advantage for *_, advantage in trained)
        assert not {id(r) for r in after["second"]} & {id(r) for r, *_ in after["trained"]}
        for rollout, rate, reward, _ in trained:
            if rollout.task:
                tries = [r for r in after["second"] if r.task == rollout.task]
                assert len(tries) == 4
                second = sum(r.verdict is Verdict.CORRECT for r in tries) / 4
                assert rate == (before["first"][rollout.task] + second) / 2
                assert reward == (1 - rate if rate else 0)
                compared += second != before["first"][rollout.task]
    assert compared


def test_a_followed_run_has_to_be_long_enough(tmp_path, followed):
    flags = f"--tasks grammar --no-train-proposer {SMALL} --steps 4 --follow {followed[0]} --out {tmp_path / 'run'}"
    process = Forked("import sys; sys.path.append('scripts'); import controls; sys.exit(controls.main())", flags.split())
    _, said = process.communicate()
    assert process.returncode == 2 and "has made 3 steps: there are no tasks for step 4; complete it first" in said


def test_runs_that_differ_more_than_their_tasks_have_the_error_of_their_spread():
    def row(right):
        return {"answers": {"samples": dict.fromkeys(evidence.TASK_TYPES, right)}}
    pairs = [(row("0000"), row("8888")), (row("0000"), row("0000"))]  # +100 points and 0, alike for all tasks
    assert evidence.gain(pairs, "hard, sampled") == pytest.approx((50.0, 50.0))
    assert evidence.gain([(row("0000"), row("0088"))], "hard, sampled") == evidence.difference([row("0000")], [row("0088")], "hard, sampled")
