"""The paper's experiment: train, evaluate the base and the trained model, print them beside the paper's figures.

    python scripts/reproduce.py --model Qwen2.5-Coder-3B              # with train.py's values for a card
    python scripts/reproduce.py --model Qwen2.5-Coder-3B --dry-run    # only say what it takes
    python scripts/reproduce.py --model tiny -- --steps 2 --batch 2   # minutes on a CPU; flags of train.py after --

Stopped or killed at any point, the same command goes on: the run is resumed, and eval.py keeps its answers as
they come. It calls train.py and eval.py as a user would; all files are in --out. Benchmarks come from the
Hugging Face hub or --data DIR; for the shipped models without --data, the held-out tasks take their place.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from azr import fit_micro_tokens
from judges import BENCHMARKS
from model import SHIPPED, count_weights
from run import flag, read_rows
from shapes import SHAPES, make_policy
from tables import markdown
from tasks import UsageError
from train import KEPT, configure, parse, fit_to_size

SOURCE = "README of the official repository, LeapLabTHU/Absolute-Zero-Reasoner"
PAPER = {  # model: (code, math, total) of the base, and of it after the paper's training
    "Llama-3.1-8B": ((28.5, 3.4, 16.0), (31.6, 6.8, 19.2)),
    "Qwen2.5-Coder-3B": ((51.2, 18.8, 35.0), (54.9, 26.5, 40.7)),
    "Qwen2.5-7B": ((52.0, 27.5, 39.8), (55.2, 38.4, 46.8)),
    "Qwen2.5-Coder-7B": ((56.6, 23.9, 40.2), (61.6, 39.1, 50.4)),
    "Qwen2.5-Coder-14B": ((60.0, 20.2, 40.1), (63.6, 43.0, 53.3))}
CARD_GB = 24  # of --dry-run


def plan(options):
    """The run's Config, checked as train.py checks it. Raises UsageError."""
    with tempfile.TemporaryDirectory() as folder:
        cfg, run = configure(parse(["--model", options.model, "--out", f"{folder}/run", *options.flags]))
        run.close()
    return cfg


def progress(run):
    """(the run's settings, its last step on disk), or (None, None) where no run has begun."""
    try:
        settings = json.loads((run / "config.json").read_text())
        rows = read_rows(run / "metrics.jsonl", {"step": int})
        return settings, rows[-1]["step"] if rows else None
    except FileNotFoundError:
        return None, None


def train(cfg, options, run):
    """Train to the end, or as far as the user lets it; True if the run is complete. Raises UsageError."""
    settings, step = progress(run)
    if settings is None:
        (run / "lock").unlink(missing_ok=True)  # of a process that was killed before it wrote anything else
        code = call("train.py", "--model", options.model, "--out", run, *options.flags)
    else:
        wanted = json.loads(json.dumps(asdict(cfg)))
        chosen = {"date", "frame", "max_response"} - parse(options.flags).keys()  # by the run, where nobody gives them
        if changed := [name for name in wanted
                       if name not in {*KEPT, *chosen} and settings.get(name) != wanted[name]]:
            raise UsageError(f"{run} was begun with another {flag(changed[0])}; give its value, or another --out")
        changed = [name for name in KEPT if name in {"steps", *parse(options.flags)} and settings[name] != wanted[name]]
        code = call("train.py", "--resume", run, *(word for name in changed for word in (flag(name), wanted[name])))
    step = progress(run)[1]
    if code == 0 and (step is None or step < cfg.steps):
        print(f"training stands at step {step} of {cfg.steps}; the same command goes on")
    return code == 0 and step == cfg.steps


def evaluate(options, run, out):
    """Base and trained model on the benchmarks; eval.py goes on by itself. → its results, or None"""
    given = {"--data": options.data, "--limit": options.limit}
    flags = [str(word) for pair in given.items() if pair[1] for word in pair]
    code = call("eval.py", "--run", run, "--benchmarks", options.benchmarks, "--out", out, *flags)
    return json.loads((out / "results.json").read_text()) if code == 0 else None


def call(script, *arguments):
    """Run a script of this project to its end. → exit code"""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ python", script, *arguments, flush=True)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal sent it to the child as well, which saves and ends
            pass


def table(model, results):
    """Averages as the paper takes them, base and trained, beside its own; percent."""
    rows = [["accuracy, %", "base", "trained", "paper: base", "paper: trained"]]
    means = {column: averages(scores) for column, scores in results["results"].items()}
    paper = PAPER.get(model.split("/")[-1].replace("Meta-Llama", "Llama"))
    for place, name in enumerate(("code", "math", "total")):
        if means["base"][name] is not None:
            theirs = [before_after[place] for before_after in paper] if paper else ["–", "–"]
            rows.append([name, *(f"{means[column][name]:.1f}" for column in ("base", "trained")), *theirs])
    base, trained = results["results"].values()
    rows += [[name, *(f"{100 * scores[name]['accuracy']:.1f}" for scores in (base, trained)), "–", "–"]
             for name in base]
    print("\n" + markdown(rows))
    print(f"\nPaper: {SOURCE}." if paper else "\nThe paper has no figures for this model.")
    if results["missing"]:
        print(f"Not comparable: {', '.join(results['missing'])} could not be had and are not in the averages.")
    if results["limit"]:
        print(f"Not comparable: only the first {results['limit']} tasks of each benchmark.")


def averages(scores):
    """{code, math, total}: means over benchmarks, and the mean of both groups; None where there are none."""
    groups = {"code": [], "math": [], "heldout": [], "io": []}
    for name, score in scores.items():
        groups[BENCHMARKS[name].group].append(100 * score["accuracy"])
    code, math = (fmean(groups[name]) if groups[name] else None for name in ("code", "math"))
    return {"code": code, "math": math, "total": None if code is None or math is None else (code + math) / 2}


def describe(cfg, options, run, out):
    """What a run would do, what is there already, and how long it takes, by estimate."""
    rollouts = len(cfg.types) * cfg.batch * (2 + cfg.samples * cfg.train_on_estimates)
    print(f"train.py: {cfg.steps} steps of {cfg.batch} proposals and solutions for each of {len(cfg.types)} types, "
          f"{cfg.samples} tries a task; at most {rollouts} rollouts an update, prompts up to {cfg.max_prompt} and "
          f"responses up to {cfg.max_response or '512 or 2048'} tokens, micro-batches of {cfg.micro_tokens}, "
          + (f"LoRA of rank {cfg.lora_rank}" if cfg.lora_rank else "all weights"))
    print(f"eval.py: {options.benchmarks}, base and trained, greedy"
          + f", the first {options.limit} tasks of each" * bool(options.limit))
    step = progress(run)[1]
    print(f"on disk in {options.out}: " + (f"step {step} of {cfg.steps}" if step is not None else "no step yet")
          + ", results of eval.py" * (out / "results.json").exists())
    size = cfg.model.split("-")[-1]
    if "Qwen2.5-" in cfg.model and size in SHAPES:
        policy = make_policy(size, "4bit" if cfg.lora_rank else "bf16", "meta")
        cfg = fit_to_size(cfg, count_weights(policy.causal))
        fitting, seconds = fit_micro_tokens(policy, cfg, CARD_GB * 2 ** 30), seconds_of_a_step(policy, cfg)
        print(f"on a card of {CARD_GB} GB, expected, not measured: micro-batches of at most {fitting} tokens, "
              f"{seconds:.0f} seconds a step, {seconds * cfg.steps / 3600:.0f} hours in all")
    else:
        print("hours: unknown; only those of Qwen2.5 are estimated")


def seconds_of_a_step(policy, cfg):
    """An estimate for a 24 GB card, not measured.

    At most 4,100 tokens are decoded one after the other. Each takes 0.5 ms a layer, and its 4-bit weights are
    unpacked and read once, at 4.5 bytes a weight and 1 TB/s. The update has 650 tokens a rollout, at 60 TFLOP/s.
    """
    config = policy.causal.config.get_text_config()
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    token = 5e-4 + 4.5e-12 * 3 * width * (width + inner)
    update = 0.7e-9 * cfg.batch * (2 + cfg.samples) * width * inner
    return layers * (min(4100, 3 * cfg.max_response) * token + update)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="as train.py takes it")
    add("--out", help="default: runs/reproduce-<model>")
    add("--data", metavar="DIR", help="the benchmarks' files; default: the Hugging Face hub")
    add("--benchmarks", help="as eval.py takes them; default: code,math")
    add("--limit", type=int, help="only the first so many tasks of each benchmark")
    add("--dry-run", action="store_true", help="say steps, sizes and hours, and do nothing")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of train.py")
    options = parser.parse_args(arguments)
    own = options.model in SHIPPED and not options.data
    options.benchmarks = options.benchmarks or ("heldout" if own else "code,math")
    options.out = Path(options.out or f"runs/reproduce-{options.model.replace('/', '-')}")
    run = options.out / "run"
    try:
        cfg = plan(options)
        out = options.out / f"eval-{cfg.steps}"
        if options.dry_run:
            describe(cfg, options, run, out)
            return 0
        if not train(cfg, options, run):
            return 1
    except UsageError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    results = evaluate(options, run, out)
    if results is None:
        return 1
    table(options.model, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
