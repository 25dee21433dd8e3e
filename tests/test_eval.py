"""eval.py: figures, finished benchmarks, folders that are not its own, damaged files, judging from a file."""

import gzip
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Forked, make_random_model

import eval as e
from judges.math import MathProblem
from judges.values import read_heldout
from sampling import Sampler
from tasks import TASK_TYPES, ZERO_TRIPLET, UsageError

HALF = 'def half(x: float) -> float:\n    """ Half of x. """\n'
RELEASE = [
    {"task_id": "HumanEval/900", "prompt": HALF, "entry_point": "half", "contract": "", "atol": 0,
     "canonical_solution": "    return x / 2\n", "base_input": [[1.0], [3]], "plus_input": [[0.1], [-7]]},
    {"task_id": "HumanEval/901", "prompt": "def lift(x):\n    'Up.'\n", "entry_point": "lift", "contract": "",
     "atol": 0, "canonical_solution": "    return x + 1\n", "base_input": [[1.5]], "plus_input": [[2]]}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fence(code):
    return f"Let me see.\n```python\n{code}\n```\n"


# --- figures -----------------------------------------------------------------------------------------

def test_pass_at_k_against_brute_force():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert math.isclose(e.pass_at_k(n, right, k), sum(map(any, draws)) / len(draws))


def test_scores_count_what_is_missing_as_wrong():
    problems = [MathProblem(str(i), "", "") for i in range(4)]
    rows = [{"id": "0", "response": "ab", "tokens": 2}, {"id": "0", "response": "ab", "tokens": 2},
            {"id": "1", "response": "", "tokens": 0}, {"id": "1", "response": "ab", "tokens": 2}]
    verdicts = [{"correct": c, "well_formed": w} for c, w in ((1, 1), (0, 1), (0, 0), (0, 1))]
    score = e.score(problems, [row | verdict for row, verdict in zip(rows, verdicts)])
    assert score["accuracy"] == 0.5 / 4 and score["pass@k"][2][0] == 0.25 and score["unanswered"] == 2
    assert score["n"] == 4 and score["truncated"] is None
    assert score["well_formed"] == 3 / 4 and score["tokens"] == 1.5 and score["base"] is None  # of four answers


def test_base_and_trained_differ_pairwise():
    before = {"1": [True, False], "2": [False, False], "3": [True, True], "4": [False, False]}
    after = {"1": [True, True], "2": [True, True], "3": [True, True], "4": [False, False]}
    assert e.paired_difference(before, after) == (3 / 8, pytest.approx(math.sqrt(11 / 64 / 4)))
    problems = [MathProblem(key, "", "") for key in before]
    columns = {}
    for column, answers in (("base", before), ("trained", after)):
        rows = [{"id": key, "response": "a"} for key, hits in answers.items() for _ in hits]
        verdicts = [{"correct": hit, "well_formed": True} for hits in answers.values() for hit in hits]
        columns[column] = {"AIME24": e.score(problems, [row | verdict for row, verdict in zip(rows, verdicts)])}
    first, second = e.tables(columns).splitlines()[:2]
    assert first.split() == ["pass@1,", "%", "base", "trained", "difference"]
    assert second.endswith("+37.5 ± 20.7")
    assert "difference" not in e.tables({"base": columns["base"]})


# --- the command -------------------------------------------------------------------------------------

def run(*arguments, **how):
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, arguments)], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **how)


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data" / "aime24.jsonl", [
        {"id": i, "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(300)])
    write(tmp_path / "data" / "HumanEvalPlus.jsonl", RELEASE)
    return tmp_path / "data"


def test_judging_answers_made_elsewhere(data, tmp_path, monkeypatch):
    write(tmp_path / "answers.jsonl", [
        *({"benchmark": "AIME 2024", "id": i, "response": f"\\boxed{{{i + 1}}}"} for i in range(299)),
        {"benchmark": "humaneval+", "id": "HumanEval/900", "response": fence(HALF + "    return x / 2")},
        {"benchmark": "humaneval+", "id": "HumanEval/900", "response": fence(HALF + "    return x")},
        {"benchmark": "humaneval+", "id": "HumanEval/901", "response": "no idea"},
        {"benchmark": "humaneval+", "id": "HumanEval/901", "response": "none"}])
    (tmp_path / "no").mkdir()  # judging must do without what cannot be imported
    for name in ("transformers", "datasets", "peft"):
        (tmp_path / "no" / f"{name}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "no"))
    done = run("--judge", tmp_path / "answers.jsonl", "--data", data, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["answers"]
    assert results["AIME24"]["accuracy"] == 299 / 300 and results["AIME24"]["unanswered"] == 1
    assert results["HumanEval+"]["accuracy"] == 0.25 and results["HumanEval+"]["pass@k"]["2"][0] == 0.5
    assert results["HumanEval+"]["well_formed"] == 0.5 and results["HumanEval+"]["base"] is not None
    first, second = (line.split() for line in done.stdout.splitlines() if line.startswith("HumanEval+"))
    assert first == "HumanEval+ 25.0 ± 17.7".split() and second[:6] == "HumanEval+ answers 1: 25.0%, 2: 50.0%".split()


@pytest.mark.parametrize("arguments,message", [
    (["--benchmarks", "gsm8k"], "no benchmark 'gsm8k'"), (["--judge", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--samples", "4", "--temperature", "0"], "all the same"), (["--limit", "0"], "--limit: 0 is not between 1"),
    (["--benchmarks", "math", "--data", "nowhere"], "--data nowhere"),
    (["--run", "nowhere"], "not a run folder"), (["--split", "impossible"], "--split impossible"),
    *(([flag, ""], f"{flag} is empty") for flag in (
        "--run", "--model", "--adapter", "--judge", "--out", "--data", "--benchmarks", "--heldout",
        "--device")),
    (["--limit", "many"], "--limit: invalid number value: 'many'"),
    (["--template", "poem"], "--template: invalid choice: 'poem'"), (["--samples"], "--samples: expected one"),
    (["--no-think"], "need --template chat"), (["--think", "--template", "plain"], "need --template chat"),
    *(([flag, value], f"{flag}: {value} is not between") for flag, value in (
        ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "-1.0"),
        ("--generate-batch", "-1"),
        ("--workers", "0"), ("--workers", "100000"), ("--max-response", "0"), ("--samples", "0"),
        ("--seed", "-1"), ("--seed", "9" * 30)))])
def test_usage_errors(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert e.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("eval.py: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(arguments, message, capsys, folder):
    """The command ends in one line with the message and exit code 2, and changes nothing in the folder."""
    before = snapshot(folder)
    assert e.main(list(map(str, arguments))) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: ")]
    assert len(error) == 1 and message in error[0]
    assert snapshot(folder) == before


@pytest.fixture
def judging(data, tmp_path):
    """The command that judges answers made elsewhere into the folder out."""
    write(tmp_path / "answers.jsonl", [{"benchmark": "aime24", "id": 1, "response": "\\boxed{2}"}])
    return ["--judge", str(tmp_path / "answers.jsonl"), "--data", str(data), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("name,content", [
    ("results.json", "{}"), ("answers.jsonl", ""),
    ("settings.json", "{not json"), ("settings.json", "[" * 100_000), ("settings.json", "\x00" * 40),
    ("settings.json", "[]"), ("settings.json", "{}")])
def test_a_folder_that_is_not_of_these_settings_stays_as_it_is(name, content, judging, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    refused(judging, "give another --out", capsys, tmp_path)


def test_the_same_command_may_write_its_results_again(judging, tmp_path):
    assert e.main(judging) == 0
    first = snapshot(tmp_path / "out")
    assert e.main(judging) == 0 and snapshot(tmp_path / "out") == first


def test_an_out_that_is_a_file(judging, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    refused(judging, "File exists", capsys, tmp_path)


@pytest.mark.parametrize("line", [
    "{not json", "[]", "null", "7", '{"benchmark": "aime24", "id": 1}',
    '{"benchmark": 3, "id": 1, "response": ""}',
    '{"benchmark": "aime24", "id": 1, "response": {}}', '{"benchmark": "aime24", "id": null, "response": ""}',
    "[" * 100_000, "\x00\x00"])
def test_damaged_answers_from_elsewhere(line, judging, tmp_path, capsys):
    with open(judging[1], "a") as file:
        file.write(line + "\n")
    refused(judging, "cannot read line 2", capsys, tmp_path)


def test_answers_from_elsewhere_may_be_compressed_and_hold_blank_lines(judging, tmp_path, capsys):
    path = tmp_path / "answers.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" + (tmp_path / "answers.jsonl").read_bytes() + b"\n\n"))
    assert e.main([judging[0], str(path), *judging[2:]]) == 0
    shutil.rmtree(tmp_path / "out")
    path.write_bytes(gzip.compress(b"\n"))
    refused([judging[0], str(path), *judging[2:]], "no answers", capsys, tmp_path)


def test_two_at_once_are_kept_apart(judging, tmp_path, capsys):
    with e.held(tmp_path / "out", b""):
        assert e.main(judging) == 2
        assert "wait if another evaluation is at work" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert e.main(judging) == 0
    assert not (tmp_path / "out" / "lock").exists()


def test_a_lock_that_a_killed_evaluation_left_stops_nobody(judging, tmp_path):
    code = """import sys, pathlib, eval
with eval.held(pathlib.Path(sys.argv[1]), b""):
    print("held", flush=True)
    input()"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert e.main(judging) == 2
        holder.kill()
    assert (tmp_path / "out" / "lock").exists()
    assert e.main(judging) == 0


def test_what_fails_first_does_not_stand_in_the_way(random_model, data, tmp_path, capsys):
    arguments = ["--benchmarks", "aime24", "--data", data, "--out", tmp_path / "out", "--limit", "2",
                 "--max-response", "8", "--device", "cpu", "--model"]
    refused([*arguments, tmp_path / "no-such-model"], "cannot load the model", capsys, tmp_path)
    refused([*arguments, random_model, "--template", "chat"], "no chat template", capsys, tmp_path)
    refused([*arguments, random_model, "--device", "abacus"], "torch cannot use device 'abacus'", capsys, tmp_path)
    assert not (tmp_path / "out").exists()
    assert e.main([*map(str, arguments), random_model]) == 0


@pytest.mark.parametrize("line", [
    "garbage", "", "[]", "\x00\x00\x00",
    '{"column": "model", "benchmark": "AIME24", "id": "0", "question": "", "response": ""}',
    *(json.dumps({"column": "model", "benchmark": "AIME24", "id": "0", "question": "", "response": "", "tokens": 1,
                  "truncated": False} | change) for change in ({"column": []}, {"question": None}, {"tokens": "x"}))])
def test_a_damaged_line_of_answers_is_named(line, random_model, data, tmp_path, capsys):
    arguments = ["--benchmarks", "aime24", "--data", data, "--out", tmp_path / "out", "--limit", "2",
                 "--max-response", "8", "--device", "cpu", "--model", random_model]
    assert e.main(list(map(str, arguments))) == 0
    path = tmp_path / "out" / "answers.jsonl"
    first, second, end = path.read_text().split("\n")
    path.write_text("\n".join([first, line, second, end]))
    refused(arguments, "cannot read line 2", capsys, tmp_path)


@pytest.mark.parametrize("content", [
    "[]", "{}", "7", "{", '{"model": 3, "quantize": "none", "max_response": 9}',
    '{"model": "tiny", "quantize": "none", "max_response": "long"}'])
def test_a_damaged_config_of_a_run(content, tmp_path, capsys):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(content)
    refused(["--run", tmp_path / "run", "--out", tmp_path / "out"], "not a run folder", capsys, tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("what", ["model", "adapter"])
def test_damaged_model_files(what, damage, policy, random_model, tmp_path, capsys):
    if what == "adapter":
        policy.model.save_pretrained(tmp_path / what)
        arguments = ["--model", random_model, "--adapter", tmp_path / what]
    else:
        make_random_model(tmp_path / what)
        arguments = ["--model", tmp_path / what]
    weights, = (tmp_path / what).glob("*.safetensors")
    weights.write_bytes(damage(weights.read_bytes()))
    refused([*arguments, "--limit", "1", "--device", "cpu", "--out", tmp_path / "out"],
            f"cannot load the {what}", capsys, tmp_path)


@pytest.fixture
def two_benchmarks(random_model, data, tmp_path, monkeypatch):
    """The command that samples answers to two benchmarks, of 10 and 9 problems in chunks of 4, into the folder out."""
    monkeypatch.setattr(e, "CHUNK", 4)
    for name, count in (("i", 10), ("o", 9)):
        write(data / f"cruxeval-{name}.jsonl", [
            {"id": i, "code": f"def f({name}):\n    return {name} + 70{i}", "input": "1", "output": f"70{i + 1}"}
            for i in range(count)])
    return ["--model", random_model, "--benchmarks", "cruxeval", "--data", str(data), "--samples", "2",
            "--temperature", "0.9", "--max-response", "12", "--device", "cpu", "--workers", "1",
            "--out", str(tmp_path / "out")]


def stop_in_the_second_benchmark(monkeypatch, error):
    """Let the sampler raise this error at the second chunk of the second benchmark. → the list of all its prompts"""
    generate, asked = Sampler.generate, []

    def stop(self, prompts, *how):
        asked.extend(self.policy.decode(ids) for ids in prompts)
        if "return o + 704" in asked[-4]:
            raise error
        return generate(self, prompts, *how)

    monkeypatch.setattr(Sampler, "generate", stop)
    monkeypatch.setattr("model.check_policy", lambda *_: None)  # which samples, too
    return asked


@pytest.mark.parametrize("error,code,message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), 1, "--generate-batch"),
    (MemoryError(), 1, "out of memory"), (OSError(28, "No space left on device"), 1, "No space left"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_what_stops_the_second_benchmark_is_one_line_and_the_first_is_kept(
        error, code, message, two_benchmarks, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_the_second_benchmark(patch, error)
        assert e.main(two_benchmarks) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: ")]
    assert len(lines) == 1 and message in lines[0] and "finished benchmarks are kept" in lines[0]
    kept = (tmp_path / "out" / "answers.jsonl").read_text()
    assert [json.loads(line)["benchmark"] for line in kept.splitlines()] == ["CRUXEval-I"] * 20
    assert not (tmp_path / "out" / "results.json").exists()
    assert e.main([*two_benchmarks, "--generate-batch", "8"]) == 0
    assert (tmp_path / "out" / "answers.jsonl").read_text().startswith(kept)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["model"]
    assert (results["CRUXEval-I"]["n"], results["CRUXEval-O"]["n"]) == (10, 9)


def test_a_full_disk_takes_no_finished_benchmark(two_benchmarks, tmp_path):
    assert e.main([*two_benchmarks[:-1], str(tmp_path / "whole")]) == 0
    whole, out = (tmp_path / "whole" / "answers.jsonl").read_bytes(), tmp_path / "out" / "answers.jsonl"
    code = "import sys, eval; eval.CHUNK = 4; sys.exit(eval.main())"
    process = Forked(code, two_benchmarks, file_size=len(whole) - 100)
    _, errors = process.communicate()
    assert process.returncode == 1 and "File too large; finished benchmarks are kept" in errors
    assert "Traceback" not in errors
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:20])
    assert sorted(os.listdir(out.parent)) == ["answers.jsonl", "settings.json"]
    assert e.main(two_benchmarks) == 0
    assert out.read_bytes() == whole


def test_an_evaluation_killed_in_its_second_benchmark_keeps_the_first(two_benchmarks, tmp_path, capsys, monkeypatch):
    whole = tmp_path / "whole"
    assert e.main([*two_benchmarks[:-1], str(whole)]) == 0
    code = """import os, signal, sys, eval, model
model.check_policy = lambda *_: None  # which samples, too
from sampling import Sampler
generate = Sampler.generate
def die(self, prompts, *how):
    rows = generate(self, prompts, *how)
    if "return o + 704" in self.policy.decode(prompts[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rows
Sampler.generate, eval.CHUNK = die, 4
sys.exit(eval.main())"""
    assert Forked(code, two_benchmarks).wait() == -signal.SIGKILL
    out = tmp_path / "out"
    first = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)[:20]
    assert (out / "answers.jsonl").read_bytes() == b"".join(first) and (out / "lock").exists()
    with monkeypatch.context() as patch:  # nothing of the first is asked again, and the second from its start
        asked = stop_in_the_second_benchmark(patch, KeyboardInterrupt())
        assert e.main(two_benchmarks) == 130
    assert [prompt.count(f"return o + 70{i}") for i, prompt in enumerate(asked)] == [1] * 8
    assert e.main([*two_benchmarks, "--seed", "5"]) == 2 and "other settings" in capsys.readouterr().err
    assert e.main(two_benchmarks) == 0
    for name in ("answers.jsonl", "results.json"):  # as if it had never been stopped
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[:20]] == [str(i // 2) for i in range(20)]
    results = json.loads((out / "results.json").read_text())["results"]["model"]["CRUXEval-I"]
    assert results["tokens"] == pytest.approx(sum(row["tokens"] for row in rows[:20]) / 20)


def test_more_benchmarks_join_a_folder_and_others_stay(two_benchmarks, tmp_path):
    one = [*two_benchmarks[:3], "CRUXEval-O", *two_benchmarks[4:]]
    assert e.main(one) == 0
    kept = (tmp_path / "out" / "answers.jsonl").read_text()
    assert e.main(two_benchmarks) == 0 and e.main(one) == 0
    assert (tmp_path / "out" / "answers.jsonl").read_text().startswith(kept)
    assert (tmp_path / "out" / "answers.jsonl").read_text().count("\n") == 38
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["results"]["model"]) == ["CRUXEval-O"]


@pytest.mark.parametrize("change", ("another question", "a lost line"))
def test_a_benchmark_whose_questions_have_no_longer_their_answers_is_asked_again(
        change, two_benchmarks, data, tmp_path):
    assert e.main(two_benchmarks) == 0
    out = tmp_path / "out" / "answers.jsonl"
    before = out.read_text().splitlines()
    if change == "another question":
        file = data / "cruxeval-o.jsonl"
        file.write_text(file.read_text().replace("o + 703", "o + 913"))
    else:
        out.write_text("".join(line + "\n" for line in before[:-1]))
    assert e.main(two_benchmarks) == 0
    after = out.read_text().splitlines()
    assert after[:20] == before[:20] and len(after) == 38
    asked = [json.loads(line)["question"] for line in after]
    assert sum("o + 913" in question for question in asked) == (2 if change == "another question" else 0)


@pytest.fixture
def heldout(tmp_path):
    task = {"split": "easy", "program": "def f(x):\n    return x + 1", "input": "1", "output": "2",
            "inputs": ["1", "2", "3"], "outputs": ["2", "3", "4"], "message": "adds"}
    write(tmp_path / "heldout.jsonl", [task | {"type": kind} for kind in TASK_TYPES for _ in range(3)])
    return tmp_path / "heldout.jsonl"


@pytest.mark.parametrize("change,message", [
    ({"output": None, "type": "deduction"}, "there is no 'output'"),
    ({"inputs": None, "outputs": None, "type": "induction"}, "there is no '"),
    ({"inputs": [], "outputs": [], "type": "induction"}, "it has too few pairs"),
    ({"output": "3", "inputs": None, "outputs": None, "type": "deduction"}, "f(1) gives 2, and the task says 3")])
def test_a_held_out_file_that_is_not_right_is_refused(change, message, heldout, tmp_path, capsys):
    row = json.loads(heldout.read_text().splitlines()[0]) | change
    with open(heldout, "a") as file:
        file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
    refused(["--heldout", heldout, "--out", tmp_path / "out"], f"line 10: {message}", capsys, tmp_path)


def test_base_and_adapter_side_by_side(policy, random_model, heldout, tmp_path, capsys):
    run_folder = tmp_path / "run"
    policy.model.save_pretrained(run_folder / "adapter")
    config = {"model": random_model, "max_response": 12, "lora_rank": 4, "quantize": "none", "heldout": "tiny"}
    (run_folder / "config.json").write_text(json.dumps(config))
    arguments = ["--run", str(run_folder), "--heldout", str(heldout), "--limit", "2", "--device", "cpu",
                 "--temperature", "1"]
    assert e.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())["results"]
    assert list(results) == ["base", "trained"] and results["base"]["heldout-deduction"]["n"] == 2
    rows = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    base, trained = ([row["response"] for row in rows if row["column"] == column] for column in results)
    assert len(rows) == 12 and base != trained
    for seed in ("0", "1"):
        assert e.main(["--model", random_model, "--max-response", "12", "--quantize", "none", *arguments[2:],
                       "--seed", seed, "--out", str(tmp_path / seed)]) == 0
        alone = (tmp_path / seed / "answers.jsonl").read_text().splitlines()
        assert ([json.loads(line)["response"] for line in alone] == base) == (seed == "0")


def test_types_that_the_held_out_tasks_lack_are_left_out(random_model, heldout, tmp_path, capsys):
    heldout.write_text("".join(line + "\n" for line in heldout.read_text().splitlines() if '"induction"' not in line))
    arguments = ["--model", random_model, "--heldout", str(heldout), "--device", "cpu", "--max-response", "8"]
    assert e.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "heldout-induction is left out: the held-out tasks have none of this type" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["model"]
    assert list(results) == ["heldout-deduction", "heldout-abduction"]


@pytest.mark.parametrize("what", ("adapter", "heldout"))
def test_answers_of_other_weights_or_to_other_tasks_are_not_taken_for_those_of_these(
        what, policy, random_model, heldout, tmp_path, capsys):
    policy.model.save_pretrained(tmp_path / "run" / "adapter")
    config = {"model": random_model, "max_response": 12, "lora_rank": 4, "quantize": "none", "heldout": "tiny"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    arguments = ["--run", str(tmp_path / "run"), "--heldout", str(heldout), "--limit", "1", "--device", "cpu",
                 "--out", str(tmp_path / "out")]
    assert e.main(arguments) == 0 and e.main(arguments) == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "answers.jsonl").read_text()
    if what == "adapter":  # trained further
        for weight in policy.trainable().values():
            weight.data += 0.1
        policy.model.save_pretrained(tmp_path / "run" / "adapter")
        assert e.main(arguments) == 2 and "holds answers with other settings" in capsys.readouterr().err
        assert (tmp_path / "out" / "answers.jsonl").read_text() == before
    else:
        heldout.write_text(heldout.read_text().replace('"1", "output": "2"', '"2", "output": "3"'))
        assert e.main(arguments) == 0
        rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        kept = [row for row in rows if json.dumps(row) in before.splitlines()]
        assert len(rows) == 6 and {row["benchmark"] for row in kept} == {"heldout-induction"}


def test_what_is_not_given_is_as_the_run_was_trained(tmp_path):
    options = e.parse([])
    assert (options.model, options.template, options.max_response, options.heldout) == ("tiny", "azr", 128, "tiny")
    assert options.temperature == 0.0 and e.parse(["--samples", "4"]).temperature == 1.0
    assert e.parse(["--model", "m"]).max_response == 4096
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "max_response": 12, "quantize": "none", "samples": 8,
                                                      "heldout": str(tmp_path / "gone"), "frame": "examples"}))
    options = e.parse(["--run", str(tmp_path)])
    assert (options.model, options.max_response, options.template, options.quantize) == ("m", 12, "examples", "none")
    assert options.adapter == str(tmp_path / "adapter") and options.samples == 1
    given = ["--model", "n", "--max-response", "9", "--template", "plain", "--quantize", "4bit", "--adapter", "a"]
    options = e.parse(["--run", str(tmp_path), *given])
    assert (options.model, options.max_response, options.template, options.quantize, options.adapter) == (
        "n", 9, "plain", "4bit", "a")
    # a file that is gone is not missed by other benchmarks
    assert e.heldout_tasks(["AIME24"], options, None) == []


def test_a_run_that_trained_all_weights(random_model, heldout, tmp_path):
    run_folder = tmp_path / "run"
    make_random_model(run_folder / "model", seed=5)
    heldout.write_text(heldout.read_text().replace('"easy"', '"cruxeval"'))  # and the run's own held-out tasks
    (run_folder / "config.json").write_text(json.dumps({"model": random_model, "max_response": 12, "lora_rank": 0,
                                                        "quantize": "auto", "heldout": str(heldout)}))
    assert e.main(["--run", str(run_folder), "--device", "cpu", "--out", str(tmp_path / "a")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert {row["column"] for row in rows} == {"base", "trained"}
    assert len(rows) == 18 and rows[0]["response"] != rows[-1]["response"]


def test_templates(policy):
    what, task = MathProblem("0", "What?", ""), read_heldout("0", ZERO_TRIPLET)
    assert policy.decode(e.encode(policy, what, "azr")).endswith("<think>")
    assert policy.decode(e.encode(policy, what, "plain")) == "What?\n\n"
    shown = policy.decode(e.encode(policy, task, "examples"))
    assert shown.endswith("<think>") and shown.count("### Problem") > 1 and task.question not in shown
    assert e.encode(policy, what, "examples") == e.encode(policy, what, "azr")  # no task, no examples
    with pytest.raises(UsageError, match="no chat template"):
        e.encode(policy, what, "chat")
    policy.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    policy.chat = True
    for think in (None, True, False):  # a switch that this template does not have
        assert policy.decode(e.encode(policy, what, "chat", think)) == "[What?]>"


def test_think_is_passed_on_to_the_chat_template(policy):
    policy.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if enable_thinking is not defined %}as it is"
        "{% elif enable_thinking %}<think>{% else %}<think></think>{% endif %}")
    policy.chat = True
    what = MathProblem("0", "What?", "")
    prompts = {think: policy.decode(e.encode(policy, what, "chat", think)) for think in (None, True, False)}
    assert prompts == {None: "[What?]as it is", True: "[What?]<think>", False: "[What?]<think></think>"}
    for flags, think in (([], None), (["--think"], True), (["--no-think"], False)):
        assert e.parse(["--template", "chat", *flags]).think is think


def test_a_model_and_its_base_are_asked_by_one_template_and_quantized_alike(policy, random_model, heldout, tmp_path,
                                                                            monkeypatch):
    """A chat model that was trained with --frame examples reads no chat template."""
    shutil.copytree(random_model, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    policy.model.save_pretrained(tmp_path / "run" / "adapter")
    config = {"model": str(tmp_path / "chat"), "max_response": 6, "quantize": "auto", "heldout": str(heldout)}
    generate, seen = Sampler.generate, []

    def look(self, prompts, *how):
        seen.append([self.policy.decode(ids) for ids in prompts])
        return generate(self, prompts, *how)

    monkeypatch.setattr(Sampler, "generate", look)
    monkeypatch.setattr("model.check_policy", lambda *_: None)  # which samples, too
    shown = {}
    for frame in ("long", "examples"):
        (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"frame": frame}))
        seen.clear()
        assert e.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / frame)]) == 0
        shown[frame] = [*seen]
    for prompts in shown.values():
        assert len(prompts) == 6 and prompts[:3] == prompts[3:]  # base and trained
    assert shown["long"][0][0].startswith("[") and not shown["examples"][0][0].startswith("[")
    assert shown["examples"][0][0].count("### Problem") > 1


def test_heldout_figures_are_those_of_training(random_model, heldout, executor, tmp_path):
    from types import SimpleNamespace

    from azr import Actor, heldout_accuracy, load_heldout
    from model import load_policy
    policy = load_policy(random_model, "none", 0, device="cpu")
    tasks = load_heldout(heldout)["easy"]
    cfg = SimpleNamespace(max_response=12, frame="long")
    scores = heldout_accuracy(Actor(policy, Sampler(policy), executor, cfg), tasks)
    assert e.main(["--model", random_model, "--heldout", str(heldout), "--device", "cpu",
                   "--max-response", "12", "--out", str(tmp_path / "a")]) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())["results"]["model"]
    assert scores == {name.removeprefix("heldout-"): (s["accuracy"], s["stderr"])
                      for name, s in results.items()}


def test_the_shipped_model(tmp_path):
    process = Forked("import sys, eval; sys.exit(eval.main())", ["--limit", "2", "--out", tmp_path / "out"])
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "heldout-induction" in out and (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("language", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_without_unicode(language, judging, tmp_path, monkeypatch):
    for name, value in language.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), *judging], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"pass@1" in done.stdout and b" ? " in done.stdout  # ± and –
