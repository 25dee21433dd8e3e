import json
import math
import random
import statistics
import time
from types import SimpleNamespace

import pytest

import rewards
from azr import load_heldout
from rewards import Rollout, Verdict, composite_reward, is_correct, learnability, reward, set_advantages, set_rewards, task_relative_advantages
from tasks import Task, UsageError

DOUBLE = "def f(x):\n    return x * 2"


def judge(executor, kind, answer, **fields):
    return is_correct([Task(kind, **({"program": DOUBLE} | fields))], [answer], executor)[0]


@pytest.mark.parametrize("output, answer, correct", [
    ("4", "4", True), ("4", " 4 ", True), ("'a'", '"a"', True), ("[1, 2]", "[1,2]", True),
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", True), ("{1, 2}", "{2, 1}", True),
    ("1", "True", False), ("True", "1", False), ("1", "1.0", False), ("(1,)", "[1]", False),
    ("[1, [True]]", "[1, [1]]", False), ("{1: 2}", "{True: 2}", False), ("'1'", "1", False),
    ("4", "2 + 2", False), ("4", "__import__('os').getpid()", False), ("4", "x", False), ("4", "", False),
    ("4", None, False), ("nan", "nan", False), ("float('nan')", "float('nan')", False),
    ("4", "[" * 100000, False), ("4", "9" * 5_000_000, False), ("4", "(" * 90 + ")" * 90, False),
])
def test_deduction_compares_literals_with_their_types(executor, output, answer, correct):
    assert judge(executor, "deduction", answer, input="2", output=output) is correct


@pytest.mark.parametrize("program, output, answer, correct", [
    (DOUBLE, "4", "2", True), (DOUBLE, "4", "x=2", True), (DOUBLE, "4", "1 + 1", True),
    (DOUBLE, "4", "3", False), (DOUBLE, "4", "2.0", False), (DOUBLE, "4", "", False), (DOUBLE, "4", "2, 3", False),
    ("def f(x):\n    return x * x", "4", "-2", True),                     # any input that fits counts
    (DOUBLE, "4", "type('L', (), {'__mul__': lambda s, o: 4})()", False),  # not a plain value
    (DOUBLE, "4", "exec('import builtins')", False),
    (DOUBLE, "4", "float('nan')", False), (DOUBLE, "4", None, False),
    (DOUBLE, "4", "[" * 50000, False), (DOUBLE, "4", "2)\nimport os\n(", False),
])
def test_abduction_runs_the_program_on_the_answer(executor, program, output, answer, correct):
    assert judge(executor, "abduction", answer, program=program, output=output) is correct


PAIRS = {"inputs": ("1", "2", "3", "4"), "outputs": ("2", "4", "6", "8"), "message": "m"}


@pytest.mark.parametrize("answer, correct", [
    (DOUBLE, True), ("def f(x):\n    return x + x", True),
    ("def f(x):\n    return {1: 2, 2: 4}[x]", False),                     # knows the shown half only
    ("def f(x):\n    return x * 2.0", False), ("def f(x):\n    return 6", False),
    ("class E:\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E()", False),
    ("class E(int):\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E(x)", False),
    ("import os\ndef f(x):\n    os._exit(0)", False), ("def f(x):\n    raise SystemExit(0)", False),
    ("def g(x):\n    return x * 2", False), ("not python", False), ("", False), (None, False),
])
def test_induction_must_fit_every_hidden_pair(executor, answer, correct):
    assert judge(executor, "induction", answer, **PAIRS) is correct


def test_induction_with_nothing_hidden_cannot_be_solved(executor):
    one = {"inputs": ("1",), "outputs": ("2",), "message": ""}
    assert judge(executor, "induction", DOUBLE, **one) is False
    assert judge(executor, "induction", DOUBLE, inputs=(), outputs=(), message="") is False


def test_a_batch_keeps_its_order(executor):
    tasks = [Task("deduction", DOUBLE, "1", "2"), Task("abduction", DOUBLE, "1", "2"), Task("induction", DOUBLE, **PAIRS)]
    rng = random.Random(0)
    good = {"deduction": "2", "abduction": "1", "induction": DOUBLE}
    batch = [rng.choice(tasks) for _ in range(60)]
    right = [rng.random() < 0.5 for _ in batch]
    answers = [good[task.type] if ok else rng.choice(["7", None, "def f(x):\n    return 0"]) for task, ok in zip(batch, right)]
    assert is_correct(batch, answers, executor) == right
    with pytest.raises(ValueError):
        is_correct(tasks, ["2"], executor)


def test_learnability_is_equation_4():
    for k in range(1, 8):
        assert learnability(k / 8) == pytest.approx(1 - k / 8)
    assert learnability(0.0) == learnability(1.0) == 0.0
    assert learnability(0.0, zero=-0.5) == learnability(1.0, zero=-0.5) == -0.5
    for nonsense in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            learnability(nonsense)


def test_composite_reward_is_equation_6():
    assert composite_reward(1, True) == 1.0
    assert composite_reward(0.0, True) == 0.0                # valid but not learnable: no penalty
    assert composite_reward(None, True) == -0.5
    assert composite_reward(None, False) == composite_reward(1.0, False) == -1.0


def test_advantages_against_a_slow_oracle():
    rng = random.Random(0)
    rewards = [rng.choice([-1.0, -0.5, 0.0, 0.25, 0.75, 1.0]) for _ in range(300)]
    groups = [(rng.choice("abc"), rng.choice(["propose", "solve"])) for _ in rewards]
    advantages = task_relative_advantages(rewards, groups)
    for reward, group, advantage in zip(rewards, groups, advantages):
        same = [r for r, g in zip(rewards, groups) if g == group]
        assert advantage == pytest.approx((reward - statistics.mean(same)) / statistics.pstdev(same))
    for group in set(groups):
        ours = [a for a, g in zip(advantages, groups) if g == group]
        assert statistics.mean(ours) == pytest.approx(0, abs=1e-12) and statistics.pstdev(ours) == pytest.approx(1)


@pytest.mark.parametrize("rewards", [[0.1] * 3, [0.1] * 7, [-0.5], [0.0, 0.0]])
def test_a_group_of_equal_rewards_says_nothing(rewards):
    assert task_relative_advantages(rewards, ["g"] * len(rewards)) == [0.0] * len(rewards)


def test_advantages_of_nothing_and_of_mismatched_lengths():
    assert task_relative_advantages([], []) == []
    with pytest.raises(ValueError):
        task_relative_advantages([1.0], [])


class Watched:
    """An executor that notes what was asked of it."""

    def __init__(self, executor):
        self.executor, self.texts, self.jobs = executor, [], []

    def read(self, texts):
        self.texts += texts
        return self.executor.read(texts)

    def run(self, jobs):
        self.jobs += jobs
        return self.executor.run(jobs)


def test_equal_answers_to_one_task_are_read_once(executor):
    watched = Watched(executor)
    assert is_correct([Task("deduction", DOUBLE, "2", "4")] * 3, ["4", "5", "4"], watched) == [True, False, True]
    assert watched.texts == ["4", "5"]


def test_an_answer_that_is_unsafe_on_any_hidden_input_is_so(executor):
    late = "def f(x):\n    return 0 if x == 3 else open('x')"  # wrong on the first hidden input, refused on the second
    (verdict, _), = rewards.judge([Task("induction", DOUBLE, **PAIRS)], [late], executor)
    assert verdict is Verdict.UNSAFE


def test_what_a_model_answered_is_parsed_in_the_sandbox_alone(executor, monkeypatch):
    import rewards
    parsed, parse = [], rewards.parse_literal
    monkeypatch.setattr(rewards, "parse_literal", lambda text: parsed.append(text) or parse(text))
    watched, tasks = Watched(executor), [Task("deduction", DOUBLE, "2", "[1, 2]")] * 3
    assert is_correct(tasks, ["[1,2] # odd", "[1,2", "[1,  2]"], watched) == [True, False, True]
    assert watched.texts == ["[1,2] # odd", "[1,2", "[1,  2]"] and not watched.jobs
    assert set(parsed) == {"[1, 2]"}  # the canonical text of the worker, and the output of the task


@pytest.mark.parametrize("answer", ["#" * 30 + "\n$", "[1]\n" + "#" * 40 + "\n#", ("#" * 60 + "\n") * 40 + "$", "-" * 20_000 + "1",
                                    "[" * 9_000 + "]" * 9_000, "1," * 10_000, "'" * 9_999, "\0" * 50])
def test_no_answer_takes_longer_than_a_run(executor, answer):
    start = time.monotonic()
    for task_type in ("deduction", "abduction"):
        assert judge(executor, task_type, answer, input="2", output="4") is False
    assert judge(executor, "induction", answer, **PAIRS) is False
    assert time.monotonic() - start < 10


def test_refused_answers_are_told_from_wrong_ones(executor):
    import rewards
    task = Task("induction", DOUBLE, **PAIRS)
    answers = ["import os\ndef f(x):\n    return os.getpid()", "def f(x):\n    return 1", None, DOUBLE]
    verdicts = rewards.judge([task] * 4, answers, executor)
    assert [verdict.value for verdict, _ in verdicts] == ["unsafe", "wrong", "malformed", "correct"]
    assert verdicts[0][1].startswith("unsafe: ") and "os" in verdicts[0][1] and "\n" not in verdicts[0][1]


TRIPLET_ROW = {"split": "easy", "type": "deduction", "program": DOUBLE, "input": "2", "output": "4"}
PAIRS_ROW = {"split": "easy", "type": "induction", "program": DOUBLE, "inputs": ["1", "2"], "outputs": ["2", "4"],
             "message": "twice"}


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("row, says", [
    (without(TRIPLET_ROW, "output"), "there is no 'output'"), (without(TRIPLET_ROW, "input"), "there is no 'input'"),
    (without(PAIRS_ROW, "inputs"), "there is no 'inputs'"), (without(PAIRS_ROW, "outputs"), "there is no 'outputs'"),
    (without(TRIPLET_ROW, "split"), "there is no 'split'"), (PAIRS_ROW | {"inputs": [], "outputs": []}, "too few pairs"),
    (PAIRS_ROW | {"inputs": ["1", "2", "3"]}, "too few pairs"), (TRIPLET_ROW | {"output": ""}, r"f\(2\) gives 4"), (PAIRS_ROW | {"inputs": "12"}, "is not a list"),
    (TRIPLET_ROW | {"type": "magic"}, "unknown type 'magic'"), ({"split": "easy"}, "there is no 'type'"),
    (without(TRIPLET_ROW, "program"), "there is no 'program'"), (TRIPLET_ROW | {"program": 3}, "is not text"),
    (TRIPLET_ROW | {"output": None}, "is not text"), (PAIRS_ROW | {"inputs": ["1"], "outputs": ["2"]}, "too few pairs"),
    (TRIPLET_ROW | {"output": "x y"}, r"f\(2\) gives 4"), ([1], ""), (TRIPLET_ROW | {"output": "3"}, r"f\(2\) gives 4, and the task says 3"),
    (PAIRS_ROW | {"outputs": ["2", "5"]}, r"f\(2\) gives 4")])
def test_a_heldout_file_says_what_is_missing_and_where(tmp_path, executor, row, says):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (TRIPLET_ROW, PAIRS_ROW, row)))
    with pytest.raises(UsageError, match=f"line 3: .*{says}"):
        load_heldout(path, executor=executor)


def test_a_limit_takes_the_first_of_each_type_and_split(tmp_path, executor):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row | {"split": split}) + "\n" for split in "aab" for row in (TRIPLET_ROW, PAIRS_ROW)))
    splits = load_heldout(path, limit=1, executor=executor)
    assert {name: [task.type for task in tasks] for name, tasks in splits.items()} == {
        "a": ["deduction", "induction"], "b": ["deduction", "induction"]}


@pytest.mark.parametrize("number", (1, 3))
def test_a_line_that_is_no_json_is_named(tmp_path, number):
    lines = [json.dumps(TRIPLET_ROW)] * 4
    lines[number - 1] = "{broken"
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=f"line {number}: Expecting"):
        load_heldout(tmp_path / "mine.jsonl")


@pytest.mark.parametrize("source", ["file", "cruxeval"])
def test_a_row_of_cruxeval_is_a_deduction_and_an_abduction_task(tmp_path, monkeypatch, executor, source):
    rows = [{"code": DOUBLE, "input": "2", "output": "4", "id": "sample_0"}]
    if source == "file":
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: rows)
    assert load_heldout(source, executor=executor) == {
        "cruxeval": [Task(kind, DOUBLE, "2", "4") for kind in ("deduction", "abduction")]}


# --- rewards and advantages of a step

def rollouts_with(rewards):
    return [Rollout(role, kind, [1], [2], reward=reward)
            for (kind, role), values in rewards.items() for reward in values]


REWARDS = {("deduction", "solve"): [1.0, -0.5, -0.5], ("deduction", "propose"): [0.75, 0.0, -1.0], ("induction", "solve"): [1.0, 1.0]}


def test_advantages_are_per_type_and_role_and_lambda_weighs_the_solver():
    plain, weighted = rollouts_with(REWARDS), rollouts_with(REWARDS)
    for rollouts, weight in ((plain, 1.0), (weighted, 3.0)):
        set_advantages(rollouts, SimpleNamespace(shuffle_rewards=False, solve_weight=weight, baseline="group"), random.Random(0))
    assert [r.advantage for r in plain[:3]] == task_relative_advantages([1.0, -0.5, -0.5], "aaa")
    assert [r.advantage for r in plain[-2:]] == [0.0, 0.0]
    for a, b in zip(plain, weighted):
        assert b.advantage == pytest.approx(a.advantage * (3.0 if a.role == "solve" else 1.0))


def test_with_a_baseline_for_each_task_solutions_are_compared_with_those_of_their_task():
    rollouts = rollouts_with({("deduction", "solve"): [1.0, 1.0, -0.5, 1.0, -1.0, 1.0, -0.5], ("deduction", "propose"): [0.75, 0.0]})
    for rollout, task in zip(rollouts, "abababcd?"):
        rollout.task = task
    rollouts[6].task, rollouts[5].task = "c", "d"  # tried once each: compared with each other
    set_advantages(rollouts, SimpleNamespace(shuffle_rewards=False, solve_weight=1.0, baseline="task"), random.Random(0))
    for members in ([0, 2, 4], [1, 3], [5, 6], [7, 8]):
        expected = task_relative_advantages([rollouts[i].reward for i in members], "a" * len(members))
        assert [rollouts[i].advantage for i in members] == expected
    assert rollouts[1].advantage == 0.0 != rollouts[0].advantage  # solved as always, and solved for once


def test_shuffled_rewards_stay_in_their_group_and_rewards_are_kept_for_the_log():
    seen = set()
    for seed in range(20):
        rollouts = rollouts_with(REWARDS)
        set_advantages(rollouts, SimpleNamespace(shuffle_rewards=True, solve_weight=1.0, baseline="group"), random.Random(seed))
        assert [r.reward for r in rollouts] == [r.reward for r in rollouts_with(REWARDS)]
        assert sorted(r.advantage for r in rollouts[:3]) == pytest.approx(sorted(task_relative_advantages([1.0, -0.5, -0.5], "aaa")))
        seen.add(tuple(r.advantage > 0 for r in rollouts[:3]))
    assert len(seen) == 3  # the one good reward lands everywhere


@pytest.mark.parametrize("verdict, solve_rate, zero, expected", [
    (Verdict.CORRECT, None, 0.0, 1.0), (Verdict.WRONG, None, 0.0, -0.5), (Verdict.UNSAFE, None, 0.0, -0.5), (Verdict.INVALID, None, 0.0, -0.5),
    (Verdict.MALFORMED, None, 0.0, -1.0), (Verdict.TRUNCATED, None, 0.0, -1.0), (Verdict.VALID, 0.25, 0.0, 0.75), (Verdict.VALID, 1.0, 0.0, 0.0),
    (Verdict.VALID, 0.0, -0.5, -0.5), (Verdict.VALID, None, -0.5, 0.0)])
def test_a_reward_follows_from_verdict_and_solve_rate(verdict, solve_rate, zero, expected):
    assert reward(Rollout("solve", "deduction", [1], verdict=verdict, solve_rate=solve_rate), zero) == expected


def test_solve_rates_are_those_of_a_tasks_own_tries():
    one, two = Task("deduction", DOUBLE, "1", "2"), Task("deduction", DOUBLE, "2", "4")
    proposals = [Rollout("propose", "deduction", [1], verdict=Verdict.VALID, task=task) for task in (one, two)]
    proposals.append(Rollout("propose", "deduction", [1], verdict=Verdict.VALID, repeat=True))  # nobody tries it
    tries = [Rollout("solve", "deduction", [1], task=task, verdict=verdict) for task, verdict in [
        (two, Verdict.CORRECT), (one, Verdict.WRONG), (two, Verdict.CORRECT), (one, Verdict.CORRECT), (two, Verdict.WRONG), (two, Verdict.CORRECT)]]
    set_rewards(proposals, tries, [], SimpleNamespace(zero_learnability="paper"))
    assert [p.solve_rate for p in proposals] == [0.5, 0.75, None] and [p.reward for p in proposals] == [0.5, 0.25, 0.0]
    assert [t.reward for t in tries] == [1.0, -0.5, 1.0, 1.0, -0.5, 1.0]
