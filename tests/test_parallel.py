"""Several ranks do what one process does: dealt out, added up, and ended together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Forked

import azr
import parallel
import train as training

SETUP = """\
    import json, random, sys, torch
    from dataclasses import asdict
    from datetime import timedelta
    from pathlib import Path
    from types import SimpleNamespace
    import azr, model as loading, parallel, train
    from executor import Executor
    from parallel import rank
    from sampling import AnySampler, Sampler
    from tasks import TaskBuffer
    model, out = sys.argv[1:]

    said = {}
"""


def start(count, code, *arguments, setup=SETUP):
    """`count` processes with the surroundings that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(setup) + textwrap.dedent(code)
    return [Forked(code, arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                                     "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for rank in range(count)]


CHECKS = """
    asked = [SimpleNamespace(tokens=len(text), text=text) for text in ("aaa", "b", "cc", "dddd")]
    double = lambda mine: [one.text.upper() + c for one in mine for c in "xy"]
    said["all"], said["one"] = parallel.spread(asked, double), parallel.spread(asked[:1], double)
    said["none"] = parallel.spread([], double)
    said["gathered"], said["of the first"] = parallel.gather(rank()), parallel.of_first(rank())

    parallel.seed_sampling(random.Random(0))
    said["draw"], said["workers"] = torch.rand(1).item(), parallel.workers()

    # weights that are the same, and weights that are not
    weight = torch.ones(3)
    parallel.check_same([weight])
    weight[1] += 1e-6 * (rank() == 1)
    try:
        parallel.check_same([weight])
    except parallel.RankError as error:
        said["alarm"] = str(error)

    # updates
    torch.manual_seed(1)
    policy = loading.load_policy(model, lora_rank=4, device="cpu")
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    draw = torch.Generator().manual_seed(2)
    rollouts = [azr.Rollout("solve", "deduction", torch.randint(256, (p,), generator=draw).tolist(),
                            torch.randint(256, (r,), generator=draw).tolist(), advantage=0.3 * i - 0.7)
                for i, (p, r) in enumerate(torch.randint(3, 40, (7, 2), generator=draw).tolist())]
    rollouts[3].prompt_ids = rollouts[0].prompt_ids  # read once for both
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    cfg = SimpleNamespace(micro_tokens=100, clip=0.2, entropy_coef=0.01, max_grad_norm=1e9)
    for rollout in rollouts:
        rollout.logps = (azr.response_logprobs(policy, [[rollout]])[0] + 0.25).tolist()
    for count in (7, 1):  # of one rollout, other ranks have nothing to do
        kept = []
        hook = optimizer.register_step_pre_hook(
            lambda *_: kept.extend(p.grad.flatten().tolist() for p in policy.trainable().values()))
        said[f"metrics {count}"] = azr.trr_update(policy, optimizer, rollouts[:count], cfg)
        said[f"gradient {count}"] = sum(kept, [])
        parallel.check_same(policy.trainable().values())
        hook.remove()

    # a greedy step, by requests that wait for each other: of one process too
    azr.ranks = lambda: 2
    class Greedy(AnySampler):
        def generate(self, prompts, max_tokens, copies=1, temperature=1.0):
            return [(ids, []) for ids, _ in Sampler(policy).generate(prompts, max_tokens, copies, 0)]

    cfg = train.Config(batch=3, samples=2)
    torch.manual_seed(0)
    policy = loading.load_policy("tiny/longer", lora_rank=4, device="cpu")
    buffer = TaskBuffer(100, random.Random(0))
    for task in azr.load_heldout("tiny")["easy"][::40]:
        buffer.add(task)
    with Executor(1, 5.0) as executor:
        proposals, tries, solutions = azr.Actor(policy, Greedy(), executor, cfg).self_play(buffer)
    said["rollouts"] = [asdict(r) for r in proposals + tries + solutions]
    said["buffer"] = buffer.state()
    Path(out, f"{rank()}.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(random_model, tmp_path_factory):
    """{ranks: [what each rank said]} of all CHECKS in one process, which is this one, in two, and in three."""
    found, code = {}, "with parallel.joined():\n" + CHECKS
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("alone")
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["", random_model, str(folder)])
        patch.setattr(azr, "ranks", azr.ranks)  # CHECKS sets another
        exec(textwrap.dedent(SETUP) + code, {})
        found[1] = [json.loads((folder / "0.json").read_text())]
    for count in (2, 3):
        folder = tmp_path_factory.mktemp("ranks")
        for process in start(count, code, random_model, folder):
            _, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
        found[count] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_work_is_dealt_evenly_by_size(monkeypatch, ranks):
    rollouts = [SimpleNamespace(tokens=tokens) for tokens in (900, 30, 40, 500, 10, 450, 20, 60, 880, 470, 35)]
    order = sorted((rollout.tokens for rollout in rollouts), reverse=True)
    monkeypatch.setattr(parallel, "ranks", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        shares.append([rollout.tokens for rollout in parallel.share(rollouts)])
    assert sorted(sum(shares, []), reverse=True) == order
    assert [own[0] for own in shares] + [own[1] for own in reversed(shares)] == order[:2 * ranks]
    monkeypatch.setattr(parallel, "rank", lambda: ranks - 1)
    assert parallel.share(rollouts[:1]) == (rollouts[:1] if ranks == 1 else [])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_back_in_order_on_every_rank(said, count):
    for found in said[count]:
        assert found["all"] == ["AAAx", "AAAy", "Bx", "By", "CCx", "CCy", "DDDDx", "DDDDy"]
        assert found["one"] == ["AAAx", "AAAy"] and found["none"] == []
        assert found["gathered"] == list(range(count)) and found["of the first"] == 0


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rollouts", [7, 1])
def test_the_summed_gradient_is_that_of_one_process(said, count, rollouts):
    [alone] = said[1]
    assert max(map(abs, alone[f"gradient {rollouts}"])) > 0.01
    for found in said[count]:
        assert found[f"gradient {rollouts}"] == pytest.approx(alone[f"gradient {rollouts}"], abs=1e-6)
        for name in ("loss", "entropy", "grad_norm"):
            assert found[f"metrics {rollouts}"][name] == pytest.approx(alone[f"metrics {rollouts}"][name], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sampler_gap_is_a_mean_over_all_ranks(said, count):
    for found in said[count]:
        assert found["metrics 7"]["sampler_gap"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_draw_their_own_numbers_and_share_the_cores(said, count):
    assert len({found["draw"] for found in said[count]}) == count
    assert all(found["workers"] == max(1, os.cpu_count() // count) for found in said[count]) and said[1][0]["workers"] is None


@pytest.mark.parametrize("count", [2, 3])
def test_a_greedy_step_has_the_rollouts_of_one_process(said, count):
    [alone] = said[1]
    assert any(rollout["verdict"] == "correct" for rollout in alone["rollouts"])
    for found in said[count]:
        assert found["rollouts"] == alone["rollouts"] and found["buffer"] == alone["buffer"]


@pytest.mark.parametrize("count", [2, 3])
def test_weights_that_differ_are_noticed(said, count):
    assert "alarm" not in said[1][0]
    for found in said[count]:
        assert found["alarm"] == "the weights of ranks [1] are not those of rank 0"


# --- whole runs

SMALL = ["--types", "deduction", "--batch", "3", "--samples", "2", "--seed-factor", "1", "--heldout-limit", "2",
         "--save-every", "2", "--eval-every", "5", "--workers", "1"]
TRAIN = """
    parallel.PATIENCE = timedelta(seconds=float(model))
    sys.exit(train.main(json.loads(out)))
"""


def train(*arguments, count=2):
    return start(count, TRAIN, 60, json.dumps([*map(str, arguments)]))


def outcome(processes):
    """[(exit code, last line of stderr)] of each rank."""
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, error.rstrip().splitlines()[-1]) for process, error in zip(processes, errors)]


def rows(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith(("seconds/", "tokens_per_second", "memory_gb"))} for line in lines]


def wait_for_step(processes, run, step):
    deadline = time.monotonic() + 180
    while len(rows(run)) <= step:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), outcome(processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Twenty uninterrupted steps of two ranks under torchrun; every second one compares their weights."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *SMALL,
                           "--steps", "20", "--out", run], cwd=ROOT, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out accuracy") == 1  # of rank 0 alone
    return run


def test_a_killed_rank_ends_all_and_the_run_goes_on_line_for_line(whole_run, tmp_path):
    ranks = train(*SMALL, "--steps", 5, "--out", tmp_path / "run")
    wait_for_step(ranks, tmp_path / "run", 3)
    ranks[1].kill()
    [(code, line), _] = outcome(ranks)
    assert code == 1 and line.startswith("train.py, rank 0: another rank is lost: ")
    assert line.endswith(f"Resume with: python train.py --resume {tmp_path / 'run'}")
    assert all(code == 0 for code, _ in outcome(train("--resume", tmp_path / "run")))
    assert rows(tmp_path / "run") == rows(whole_run)[:6]


def test_with_another_number_of_ranks_a_run_goes_on(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    assert training.main(["--resume", str(tmp_path / "run"), "--steps", "21"]) == 0
    assert rows(tmp_path / "run")[:21] == rows(whole_run) and len(rows(tmp_path / "run")) == 22


def test_a_rank_that_hangs_is_named_within_the_time_limit(tmp_path):
    code = """
        import sys, time, parallel
        from datetime import timedelta
        parallel.PATIENCE = timedelta(seconds=3)
        with parallel.joined():
            parallel.gather("both are here")
            if parallel.rank() == 1:
                time.sleep(600)
            try:
                parallel.gather("one is not")
            except parallel.RankError as error:
                sys.exit(str(error))
    """
    ranks = start(2, code, setup="")
    _, error = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    assert ranks[0].returncode == 1 and "Ranks 1 failed" in error.rstrip().splitlines()[-1]


def test_ctrl_c_reaches_all_and_a_second_job_is_refused(tmp_path, capsys):
    ranks = train(*SMALL, "--steps", 50, "--out", tmp_path / "run")
    wait_for_step(ranks, tmp_path / "run", 1)
    assert training.main(["--resume", str(tmp_path / "run")]) == 2
    assert "another process trains in" in capsys.readouterr().err
    for process in ranks:
        process.send_signal(signal.SIGINT)
    assert [code for code, _ in outcome(ranks)] == [0, 0]
    done = len(rows(tmp_path / "run")) - 1
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == done < 50
