"""A fourth task type is one entry in KINDS: `repair`, a program to mend so that an input gives an output."""

import json
import random
from types import SimpleNamespace

import pytest

import tasks
import train
from azr import Actor
from conftest import Scripted
from rewards import set_rewards

BROKEN = "def f(x):\n    return x + 1"
REPAIR = tasks.Kind(
    propose=tasks.KINDS["deduction"].propose,  # a question that the tiny model knows
    solve="Change one line of this program so that f({input}) is {message}, not {output}.\n"
          "```python\n{program}\n```\nGive the whole program in one fenced block:\n```python\n...\n```",
    tag="python", hidden="message",
    parse=lambda blocks, program, count: (fields := tasks.parse_triplet(blocks, program, count)) and (
        fields | {"message": "".join(blocks("message")[:1]) or "0"}),
    complete=lambda task, runs: tasks.complete_triplet(task, runs) if runs[0].output != task.message else None,
    judge=lambda task, answer: [(answer, task.input, task.message)])
CFG = SimpleNamespace(types=("repair",), batch=4, samples=4, references=1, inputs=4, max_prompt=9999,
                      max_response=50, dedup=True, zero_learnability="paper", frame="long")


def text(*blocks):
    return "so</think> <answer>" + "\n".join(f"```{tag}\n{body}\n```" for tag, body in blocks) + "\n</answer>"


@pytest.fixture(autouse=True)
def repair(monkeypatch):
    monkeypatch.setitem(tasks.KINDS, "repair", REPAIR)


def test_proposals_and_answers_are_judged_and_rewarded(policy, executor):
    def task(program, wanted):
        return text(("python", program), ("input", "2"), ("message", wanted))
    says = [task(BROKEN, "4"), task(BROKEN + "  ", "5"), task("def f(x):\n    return 9", "9"), "no idea"]
    good, bad = text(("python", "def f(x):\n    return x + 2")), text(("python", BROKEN))
    written, answered = iter(says), iter([good, bad, bad, bad, good, bad, bad, bad])  # 4 tries, 4 solutions
    buffer = tasks.TaskBuffer(10, random.Random(0))
    sampler = Scripted(policy, lambda prompt: next(written if "Invent" in prompt else answered))
    proposals, tries, solutions = Actor(policy, sampler, executor, CFG).self_play(buffer)
    set_rewards(proposals, tries, solutions, CFG)
    assert [r.verdict.value for r in proposals] == ["valid", "valid", "invalid", "truncated"]
    assert [r.repeat for r in proposals] == [False, True, False, False]
    assert [r.reward for r in proposals] == [0.75, 0.0, -0.5, -1.0]  # solved by one of four
    assert buffer.tasks["repair"] == [tasks.Task("repair", BROKEN, "2", "3", message="4")]
    assert [r.reward for r in tries] == [r.reward for r in solutions] == [1.0, -0.5, -0.5, -0.5]


def test_three_steps_of_training(tmp_path):
    flags = "--types repair,deduction --batch 4 --samples 2 --seed-factor 1 --heldout-limit 2 --steps 3 --workers 1 --max-prompt 3000"
    assert train.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3 and rows[-1]["buffer/repair"] > 0 and rows[-1]["loss"] is not None
    assert all(0 <= row["solve/repair/accuracy"] <= 1 for row in rows[1:])
