"""Loading: what is trained, what is refused and how it is said, what comes back from a saved folder."""

import functools
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoConfig

import azr
import model
import train
from azr import trr_update
from conftest import make_random_model
from model import (check_lengths, check_policy, describe, load_policy, lora_layers, read_gguf, resolve_model,
                   response_logprobs, save_policy)
from rewards import Rollout
from sampling import Sampler
from tasks import UsageError
from test_azr import PROMPTS, config, generate, gradients, logprobs, naive_logprobs, rollouts_of, sgd


def test_model_names():
    assert resolve_model("Qwen2.5-3B") == "Qwen/Qwen2.5-3B" and resolve_model("Qwen3-4B-Base") == "Qwen/Qwen3-4B-Base"
    assert resolve_model("Llama-3.1-8B") == "meta-llama/Llama-3.1-8B" and resolve_model("gemma-2-2b") == "google/gemma-2-2b"
    assert resolve_model("me/mine") == "me/mine" and resolve_model("tiny").endswith("tiny")
    assert (Path(resolve_model("tiny/longer")) / "config.json").exists()


def test_a_model_that_cannot_be_had_says_so_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot load the model.*--model PATH") as error:
        load_policy(str(tmp_path / "nothing/here"))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="4-bit weights cannot be trained"):
        load_policy("whatever", quantize="4bit", lora_rank=0)
    with pytest.raises(UsageError, match="cannot load the model"):  # to answer only, nothing is trained
        load_policy(str(tmp_path / "nothing"), quantize="4bit", lora_rank=0, trained=False)


def test_a_model_that_does_not_fit_into_the_gpu_is_not_taken_for_a_wrong_name(random_model, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", full)
    with pytest.raises(UsageError, match="cannot load the model.*: it does not fit into the GPU; try 4 bits and LoRA"):
        load_policy(random_model, device="cpu")


@pytest.mark.parametrize("device", ("cuda", None))
def test_each_rank_has_a_gpu_of_its_own_or_says_that_there_are_too_few(random_model, monkeypatch, device):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="torch cannot use device .cuda:3. .0 GPUs visible.*fewer processes"):
        load_policy(random_model, device=device)


def test_lora_is_on_every_linear_layer_but_the_head(policy):
    touched = {name.split(".lora_")[0].split(".")[-1] for name in policy.trainable()}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_full_fine_tuning_trains_every_weight(random_model):
    policy = load_policy(random_model, lora_rank=0, device="cpu")
    assert len(policy.trainable()) == len(list(policy.causal.parameters()))
    before = generate(policy, PROMPTS, 8, greedy=True)
    trr_update(policy, sgd(policy, 5.0), rollouts_of(policy, [1.0, -1.0]), config())
    assert generate(policy, PROMPTS, 8, greedy=True) != before


FAMILIES = {"Llama": {}, "Qwen3": {"head_dim": 12}, "Gemma2": {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12},
            "Granite": {"logits_scaling": 8.0, "attention_dropout": 0.5}, "Cohere": {"logit_scale": 0.25},
            "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 4}, "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 48}}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_sample_and_train_what_they_say(tmp_path, family):
    """Greedy sampling equals a plain loop and logprobs the model's own, also with sliding windows, logits that
    are scaled or capped, dropout, and widths under another name."""
    folder = make_random_model(tmp_path)  # for its tokenizer
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(
        vocab_size=258, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, eos_token_id=256, pad_token_id=257, bos_token_id=None, initializer_range=0.1,
        **FAMILIES[family])).save_pretrained(folder)
    if family != "OPT":  # bf16's rounding is no unknown change of the logits
        load_policy(folder, lora_rank=4, device="cpu", dtype="bf16")
    policy = load_policy(folder, lora_rank=4, device="cpu")
    policy.end_ids = frozenset(range(0, 258, 16))

    def plain(prompt):
        ids = list(prompt)
        while len(ids) - len(prompt) < 40 and (ids == list(prompt) or ids[-1] not in policy.end_ids):
            with torch.no_grad():
                ids.append(int(policy.causal(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt):]

    expected = [plain(prompt) for prompt in PROMPTS]
    for rows in (0, 4):
        found = Sampler(policy, rows).generate(PROMPTS, 40, copies=2, temperature=0)
        assert [ids for ids, _ in found] == [r for r in expected for _ in range(2)]
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5])
    logps_N, _ = logprobs(policy, rollouts)
    assert torch.allclose(logps_N, torch.cat([naive_logprobs(policy, r)[0] for r in rollouts]), atol=1e-5)
    policy.causal.train()
    assert torch.allclose(logprobs(policy, rollouts)[0], logps_N, atol=1e-5)  # no dropout
    assert azr.fit_micro_tokens(policy, config()) > 0


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(random_model, monkeypatch):
    from transformers import Qwen2ForCausalLM
    forward = Qwen2ForCausalLM.forward

    @functools.wraps(forward)  # transformers reads its signature
    def doubled(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", doubled)
    with pytest.raises(UsageError, match="logprobs in eval mode are .* nats a token off .* it changes logits"):
        load_policy(random_model, lora_rank=4, device="cpu")
    load_policy(random_model, lora_rank=0, device="cpu", trained=False)  # its answers are its own


def test_gemma_2_keeps_the_soft_cap_of_its_attention(tmp_path):
    """Logprobs and greedy sampling as of eager attention; without the cap, here a tight one, they are others."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
    folder = make_random_model(tmp_path)  # for its tokenizer
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(
        vocab_size=258, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, sliding_window=8, query_pre_attn_scalar=12, attn_logit_softcapping=0.3, eos_token_id=256, pad_token_id=257,
        bos_token_id=None, initializer_range=0.4)).save_pretrained(folder)
    policy = load_policy(folder, lora_rank=4, device="cpu")
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5])
    logps_N = logprobs(policy, rollouts)[0]
    gaps = {}
    for attention in ("eager", "sdpa"):
        oracle = SimpleNamespace(causal=AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention))
        gaps[attention] = (logps_N - torch.cat([naive_logprobs(oracle, r)[0] for r in rollouts])).abs().max().item()
    assert gaps["eager"] < 1e-4 and gaps["sdpa"] > 0.1


def test_gradient_checkpointing_changes_no_gradient(random_model):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        policy = load_policy(random_model, lora_rank=4, device="cpu")
        if not checkpointing:
            policy.causal.gradient_checkpointing_disable()
        policy.causal.train()
        rollouts = rollouts_of(policy, [1.0, -1.0, 0.5])
        policy.causal.train()
        azr._accumulate_gradients(policy, rollouts, 10 ** 6, config())
        found.append(gradients(policy))
    assert any(float(grad.abs().sum()) > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6), name


def test_4bit_base_with_lora_trains_and_generates_at_the_real_vocabulary(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = make_random_model(tmp_path)  # for its tokenizer
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=151_936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1, eos_token_id=256)).save_pretrained(folder)
    policy = load_policy(folder, quantize="4bit", lora_rank=8, device="cpu")
    linear = policy.causal.model.layers[0].self_attn.q_proj.base_layer
    assert type(linear).__name__ == "Linear4bit" and linear.weight.dtype == torch.uint8
    rollouts = rollouts_of(policy, [1.0, 1.0, -1.0, -1.0], max_tokens=8)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    before = [naive_logprobs(policy, r)[0].sum().item() for r in rollouts]
    for _ in range(5):
        trr_update(policy, optimizer, rollouts, config(max_grad_norm=1.0))
    after = [naive_logprobs(policy, r)[0].sum().item() for r in rollouts]
    assert all((new > old) == (r.advantage > 0) for r, old, new in zip(rollouts, before, after))
    # the trained policy samples from what it trains: E[−log p(sample)] is the entropy
    samples = [Rollout("solve", "deduction", [9, 8, 7], ids, "") for ids in generate(policy, [[9, 8, 7]], 4, copies=150)]
    with torch.no_grad():
        logps_N, entropies_N = logprobs(policy, samples)
    surprise = -logps_N - entropies_N
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / math.sqrt(len(surprise))


def test_base_weights_are_never_upcast(random_model):
    policy = load_policy(random_model, quantize="none", dtype="bf16", lora_rank=4, device="cpu")
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16} and policy.causal.get_output_embeddings().weight.dtype == torch.bfloat16
    rollouts = rollouts_of(policy, [1.0, -1.0], max_tokens=5)
    trr_update(policy, torch.optim.AdamW(policy.trainable().values(), lr=1e-3), rollouts, config(max_grad_norm=1.0))
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_tokenizer_without_pad_token_and_a_model_with_several_end_tokens(tmp_path):
    folder = make_random_model(tmp_path)
    for name, changes in (("tokenizer_config.json", {"pad_token": None}), ("generation_config.json", {"eos_token_id": [256, 65], "pad_token_id": None})):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    policy = load_policy(folder, lora_rank=4, device="cpu")
    assert policy.end_ids == {256, 65}
    rollouts = rollouts_of(policy, [1.0] * 6, max_tokens=200)
    assert any(r.response_ids[-1] == 65 for r in rollouts) and all(65 not in r.response_ids[:-1] for r in rollouts)
    logps_N, _ = logprobs(policy, rollouts)
    assert torch.allclose(logps_N, torch.cat([naive_logprobs(policy, r)[0] for r in rollouts]), atol=1e-5)


def test_instruct_models_get_their_chat_template_and_an_open_thought(policy):
    policy.tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                                      "{% if add_generation_prompt %}[assistant]{% endif %}")
    policy.chat = True
    text = policy.decode(policy.encode("What {question}?"))
    assert text.startswith("[user]") and text.endswith("What {question}?[assistant]<think>")
    policy.tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert policy.decode(policy.encode("Q")).endswith("Q[assistant]<think>\n")


# --- random models of other families

SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "max_position_embeddings": 512, "eos_token_id": 256,
         "pad_token_id": 257, "bos_token_id": None}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
          "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
         "layer_types": ["linear_attention", "full_attention"]}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2,
         "patch_size": 4, "image_size": 16, "out_hidden_size": 64, "head_dim": 16, "num_position_embeddings": 16}
MULTIMODAL = {  # class: (model type, of the text, of the tower, changes to the text)
    "Gemma3ForConditionalGeneration": ("gemma3", "gemma3_text", "siglip_vision_model", {}),
    "Mistral3ForConditionalGeneration": ("mistral3", "ministral3", "pixtral", {}),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "qwen3_5_text", "qwen3_5_vision", DELTA),
    "SmolVLMForConditionalGeneration": ("smolvlm", "llama", "smolvlm_vision", {})}


def make_model(folder, model_type, **changes):
    """Save a random model of a family, with a byte-level tokenizer. → its folder"""
    make_random_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def make_multimodal(folder, name):
    make_random_model(folder)
    model_type, text, tower, changes = MULTIMODAL[name]
    config = AutoConfig.for_model(model_type, text_config=SIZES | changes | {"model_type": text, "tie_word_embeddings": True},
                                  vision_config=TOWER | {"model_type": tower}, pad_token_id=257, tie_word_embeddings=True)
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return str(folder)


def shake(policy):
    """Give all that is trained another value, so that it matters."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(torch.randn_like(weight) * 0.1)


@torch.no_grad()
def logits_of(causal):
    return causal(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the check at loading

UNSUPPORTED = {"rwkv": {"attention_hidden_size": 64}, "doge": {}, "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8},
               "minimax": EXPERTS, "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1}, "jetmoe": {"kv_channels": 16}}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_family_that_cannot_be_read_is_refused_in_one_line(tmp_path, family, capfd):
    folder = make_model(tmp_path / "model", family, **UNSUPPORTED[family])
    capfd.readouterr()
    assert train.main(["--model", folder, "--device", "cpu", "--out", str(tmp_path / "run"), "--heldout", "tiny"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and ("cannot run the model" in said[0] or "this model cannot be used" in said[0])
    assert not (tmp_path / "run").exists()


def test_the_check_compares_tokens_and_logprobs_of_the_sampler(policy, monkeypatch):
    check_policy(policy)
    sample = Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda *given, **options: [
        (ids, [logp - 0.01 for logp in logps]) for ids, logps in sample(*given, **options)])
    with pytest.raises(UsageError, match="logprobs of the sampler are 0.01 nats a token off .* give another model"):
        check_policy(policy, trained=False)
    monkeypatch.setattr(Sampler, "generate", lambda *given, **options: [
        ([3] * len(ids), logps) for ids, logps in sample(*given, **options)])
    with pytest.raises(UsageError, match="likeliest tokens that the sampler finds"):
        check_policy(policy, trained=False)


def test_the_check_sees_what_happens_in_train_mode_alone(random_model, monkeypatch):
    forward = transformers.models.qwen2.modeling_qwen2.Qwen2MLP.forward
    monkeypatch.setattr(transformers.models.qwen2.modeling_qwen2.Qwen2MLP, "forward",
                        lambda self, x: forward(self, x) * (1.1 if self.training else 1.0))
    with pytest.raises(UsageError, match="logprobs in train mode are .* draws random numbers"):
        load_policy(random_model, lora_rank=4, device="cpu")
    load_policy(random_model, lora_rank=0, device="cpu", trained=False)


@pytest.mark.parametrize("family", ("mixtral", "phimoe"))
def test_routers_draw_no_noise_in_training(tmp_path, family):
    """Also where eval mode reads the noise's width, and so the model is another one without it."""
    folder = make_model(tmp_path, family, **EXPERTS, router_jitter_noise=0.2, input_jitter_noise=0.2)
    policy = load_policy(folder, lora_rank=4, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits_of(policy.causal), logits_of(plain), atol=1e-5)
    rollouts = rollouts_of(policy, [1.0, -1.0, 0.5])
    logps_N, _ = logprobs(policy, rollouts)
    policy.causal.train()
    assert torch.allclose(logprobs(policy, rollouts)[0], logps_N, atol=1e-5)


def test_a_package_that_is_missing_is_named(random_model, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("\nTimmWrapperModel requires the timm library\nbut it was not found")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", missing)
    with pytest.raises(UsageError, match="requires the timm library. Install the package that it names"):
        load_policy(random_model, device="cpu")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    for size in (200, 256):  # less than its bytes, and without its end token
        with pytest.raises(UsageError, match=rf"has 25[67] tokens and its model {size}: .* different models"):
            load_policy(make_random_model(tmp_path, vocab_size=size, eos_token_id=None, pad_token_id=None), device="cpu")


def test_weights_of_another_width_are_refused_in_one_line(tmp_path, capfd):
    folder = make_random_model(tmp_path)
    edit(tmp_path / "config.json", intermediate_size=80)
    with pytest.raises(UsageError, match=r"mlp.*proj.weight is \(.*96.*\) in its files and \(.*80.*\) by its config") as error:
        load_policy(folder, device="cpu")
    assert "\n" not in str(error.value) and "LOAD REPORT" not in capfd.readouterr().err


def test_a_checkpoint_that_is_quantized_already_says_quantize_none(tmp_path):
    folder = make_random_model(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match=r"is quantized already \(mxfp4\): use --quantize none"):
        load_policy(folder, quantize="4bit", device="cpu")


def test_an_encoder_decoder_model_is_refused(tmp_path):
    make_random_model(tmp_path)
    config = AutoConfig.for_model("t5", vocab_size=258, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has an encoder"):
        load_policy(str(tmp_path), device="cpu")


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64}
CONTEXTS = {"gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "max_position_embeddings": 100}, 100, "--max-response"),
            "llama": ({"max_position_embeddings": 100}, 100, "--max-prompt"),
            "phi3": ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64, "change for all rows"),
            "qwen2": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 64}, 64, "change for all rows")}


@pytest.mark.parametrize("family", CONTEXTS)
def test_prompt_and_response_stay_within_the_context(tmp_path, family):
    changes, limit, says = CONTEXTS[family]
    policy = load_policy(make_model(tmp_path, family, **changes), lora_rank=4, device="cpu")
    check_lengths(policy, limit - 20, 20)
    with pytest.raises(UsageError, match=says):
        check_lengths(policy, limit - 20, 21)


def test_below_its_switch_a_longrope_row_does_not_depend_on_the_others(tmp_path):
    policy = load_policy(make_model(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64), lora_rank=4, device="cpu")
    short, fits, long = (Rollout("solve", "", [7, 8, 9], [*range(20, 20 + n)]) for n in (10, 61, 80))
    alone_N = logprobs(policy, [short])[0]
    assert torch.allclose(logprobs(policy, [short, fits])[0][:10], alone_N, atol=1e-5)
    assert not torch.allclose(logprobs(policy, [short, long])[0][:10], alone_N, atol=1e-2)


# --- what is trained

DENSE = {"llama": {}, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "bloom": {"n_layer": 2, "n_head": 4}, "phi3": {}}


@pytest.mark.parametrize("family", ("tiny", *DENSE))
def test_lora_begins_with_the_numbers_that_all_linear_gives(tmp_path, family):
    folder = str(model.TINY) if family == "tiny" else make_model(tmp_path, family, **DENSE[family])
    torch.manual_seed(3)
    policy = load_policy("tiny" if family == "tiny" else folder, lora_rank=4, device="cpu")
    torch.manual_seed(3)
    expected = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {name: weight for name, weight in expected.named_parameters() if weight.requires_grad}
    assert policy.trainable().keys() == expected.keys()
    for name, weight in policy.trainable().items():
        assert torch.equal(weight, expected[name]), name


MIXTURES = {"mixtral": (EXPERTS, set()), "qwen3_moe": (EXPERTS, set()), "phimoe": (EXPERTS, set()), "gpt_oss": (EXPERTS, set()),
            "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 32}, {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}),
            "deepseek_v3": (EXPERTS | LATENT | {"n_shared_experts": 1}, {"gate_proj", "up_proj", "down_proj"}),
            "glm4_moe": (EXPERTS | {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
                         {"gate_proj", "up_proj", "down_proj"})}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_train_all_but_routers_and_routed_experts(tmp_path, family):
    changes, others = MIXTURES[family]
    policy = load_policy(make_model(tmp_path, family, **changes), lora_rank=4, device="cpu")
    names = {name.split(".lora_")[0] for name in policy.trainable()}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if family == "deepseek_v3":
        attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name.split(".")[-1] for name in names} == attention | others
    assert not [name for name in names if ".experts" in name or ".router" in name or name.endswith(".gate")]
    if others:  # in every layer, dense or not
        assert {name.split(".")[4] for name in names if name.endswith(".down_proj")} == {"0", "1"}
    shake(policy)
    for parameter in policy.trainable().values():
        parameter.grad = None
    policy.causal.train()
    logprobs(policy, [Rollout("solve", "", [*range(30)], [*range(30, 60)])])[0].sum().backward()
    dead = [name for name, weight in policy.trainable().items() if not weight.grad.abs().sum() > 0]
    assert not dead
    policy.causal.eval()
    save_policy(policy, tmp_path / "adapter")
    again = load_policy(str(tmp_path), lora_rank=4, device="cpu", adapter=str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(again.causal), logits_of(policy.causal), atol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits_of(theirs), logits_of(policy.causal), atol=1e-4)


def test_layers_whose_weight_is_read_past_them_are_left_out(tmp_path):
    """Mamba's kernels take the weight of out_proj, and LoRA on it would have no effect."""
    config = AutoConfig.for_model("bamba", **SIZES, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=8)
    causal = transformers.AutoModelForCausalLM.from_config(config)
    used = dict.fromkeys(causal.modules(), True)
    layers = lora_layers(causal, used)
    assert "model.layers.0.mamba.in_proj" in layers and "model.layers.0.mamba.out_proj" not in layers
    assert "model.layers.1.self_attn.o_proj" in layers and "lm_head" not in layers


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_checkpoints_load_as_the_class_that_they_name(tmp_path, name, monkeypatch):
    """LoRA and full fine-tuning leave the tower alone, and what was trained loads into that class."""
    monkeypatch.setattr(model, "check_policy", lambda *given: None)  # of the sampler, not of what is trained
    folder = make_multimodal(tmp_path / "model", name)
    policy = load_policy(folder, lora_rank=4, device="cpu")
    assert type(policy.causal).__name__ == name
    assert not [name for name in policy.trainable() if "vision" in name or "visual" in name or "modal" in name]
    shake(policy)
    save_policy(policy, tmp_path / "adapter")
    own = getattr(transformers, name).from_pretrained(folder)
    untrained = logits_of(own)
    served = peft.PeftModel.from_pretrained(own, tmp_path / "adapter")
    assert torch.allclose(logits_of(served), logits_of(policy.causal), atol=1e-5)
    assert not torch.allclose(logits_of(served), untrained, atol=0.1)

    policy = load_policy(folder, lora_rank=0, device="cpu")
    towers = [name for name, weight in policy.causal.named_parameters() if not weight.requires_grad]
    assert towers and all("vision" in name or "visual" in name or "modal" in name or "connector" in name for name in towers)
    shake(policy)
    save_policy(policy, tmp_path / "whole")
    again = getattr(transformers, name).from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits_of(again), logits_of(policy.causal), atol=1e-5)


def test_an_adapter_of_qwen_3_5_has_effect_on_its_text_class_under_other_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "check_policy", lambda *given: None)
    folder = make_multimodal(tmp_path / "model", "Qwen3_5ForConditionalGeneration")
    policy = load_policy(folder, lora_rank=4, device="cpu")
    shake(policy)
    save_policy(policy, tmp_path / "adapter")
    text = transformers.Qwen3_5ForCausalLM.from_pretrained(folder)
    served = peft.PeftModel.from_pretrained(text, tmp_path / "adapter", key_mapping={"model.language_model": "model"})
    assert torch.allclose(logits_of(served), logits_of(policy.causal), atol=1e-5)


def test_what_is_trained_is_described_in_one_line(random_model):
    policy = load_policy(random_model, lora_rank=4, device="cpu")
    count = sum(weight.numel() for weight in policy.trainable().values())
    assert describe(policy) == ("LoRA of rank 4 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: "
                                f"{count:,} weights")
    policy = load_policy(random_model, lora_rank=0, device="cpu")
    assert describe(policy) == f"full fine-tuning of {policy.causal.num_parameters():,} weights"


def test_in_4_bits_what_is_really_held_is_told(tmp_path):
    """transformers holds the experts of a layer as one parameter, which stays in full precision."""
    sizes = {"hidden_size": 512, "num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    folder = make_model(tmp_path, "qwen3_moe", **(EXPERTS | sizes))
    policy = load_policy(folder, quantize="4bit", lora_rank=4, device="cpu")
    experts = 4 * 16 * 3 * 512 * 512 * 4
    held = sum(weight.nbytes for weight in policy.causal.parameters())
    assert held > experts and f"of {held / 1e9:.1f} GB that it holds 0.0 GB are in 4 bits" in describe(policy)


# --- adapters and whole models that come back

def test_an_adapter_that_comes_back_in_part_is_refused(policy, random_model, tmp_path):
    from safetensors.torch import load_file, save_file
    save_policy(policy, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    for change in ({first: None}, {first.replace("layers", "language_model.layers"): weights[first].clone()}):
        changed = {name: weight for name, weight in (weights | change).items() if weight is not None}
        save_file(changed, file)
        with warnings.catch_warnings(), pytest.raises(UsageError, match=r"cannot load the adapter .* have no place in this model.* that it trains are not there") as error:
            warnings.simplefilter("error")
            load_policy(random_model, lora_rank=4, device="cpu", adapter=str(tmp_path))
        assert "\n" not in str(error.value)


def test_an_adapter_that_was_trained_goes_on_as_it_was(policy, random_model, tmp_path):
    save_policy(policy, tmp_path)
    again = load_policy(random_model, device="cpu", adapter=str(tmp_path))
    assert again.trainable().keys() == policy.trainable().keys()
    for name, weight in again.trainable().items():
        assert torch.equal(weight, policy.trainable()[name])


@pytest.mark.parametrize("rank", (4, 0))
def test_files_that_lack_weights_are_not_taken_for_a_saved_policy(random_model, tmp_path, monkeypatch, rank):
    """Here saving drops the weights of a layer, as PEFT and transformers have for some names."""
    policy = load_policy(random_model, lora_rank=rank, device="cpu")
    save_policy(policy, tmp_path / "intact")
    module = peft.peft_model if rank else transformers.modeling_utils
    write = module.safe_save_file if rank else module.safe_save_file

    def without_a_layer(weights, *given, **options):
        write({name: weight for name, weight in weights.items() if "layers.1." not in name}, *given, **options)

    monkeypatch.setattr(module, "safe_save_file", without_a_layer)
    with pytest.raises(UsageError, match="cannot load what was written"):
        save_policy(policy, tmp_path / "partial")


def test_a_whole_model_comes_back_with_its_tokenizer(random_model, tmp_path):
    policy = load_policy(random_model, lora_rank=0, device="cpu")
    shake(policy)
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path), lora_rank=0, device="cpu")
    assert torch.equal(logits_of(again.causal), logits_of(policy.causal))
    assert again.encode("f(1)") == policy.encode("f(1)") and again.end_ids == policy.end_ids


# --- 4 bits on a CPU

@pytest.mark.parametrize("family", ("llama", "qwen2"))  # without and with biases
def test_the_gradient_in_4_bits_is_that_of_the_dequantised_model(tmp_path, family):
    """Also after a pass in eval mode, where bitsandbytes packs weights on CPUs with AVX512-BF16."""
    folder = make_model(tmp_path, family)
    rows = [[Rollout("solve", "", [*range(10)], [*range(10, 50)])]]
    found = {}
    for quantize in ("4bit", "none"):
        torch.manual_seed(3)
        policy = load_policy(folder, quantize=quantize, lora_rank=4, device="cpu")
        shake(policy)
        modules = dict(policy.causal.named_modules())
        if quantize == "4bit":
            weights = {name: dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in modules.items()
                       if type(layer) is bitsandbytes.nn.Linear4bit}
        else:
            for name, weight in weights.items():
                modules[name].weight.data = weight
        with torch.no_grad():
            response_logprobs(policy, rows)
        policy.causal.train()
        logps_N, _ = response_logprobs(policy, rows)
        logps_N.sum().backward()
        found[quantize] = logps_N.detach(), gradients(policy)
    assert len(weights) == 14
    assert torch.allclose(found["4bit"][0], found["none"][0], atol=1e-4)
    for name, gradient in found["none"][1].items():
        assert torch.allclose(found["4bit"][1][name], gradient, rtol=1e-3, atol=1e-4), name


# --- GGUF

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
    _, causal = read_gguf(path, torch.float32)
    head, exact = causal.get_output_embeddings().weight, torch.from_numpy(embedding)
    assert head is causal.get_input_embeddings().weight and causal.config.tie_word_embeddings
    assert (head - exact).abs().max() < 0.02  # 8 bits; 4 have steps of a third
    write_gguf(path, {"output": embedding[::-1].copy()})
    _, causal = read_gguf(path, torch.float32)
    assert not torch.equal(causal.get_output_embeddings().weight, causal.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ("llama", "gemma3"))
@pytest.mark.parametrize("fields, asks", (({"add_bos": True}, True), ({"add_bos": False}, False), ({}, True)))
def test_a_tokenizer_gives_bos_if_its_file_asks_for_it(tmp_path, family, fields, asks):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "small.gguf", family=family, **fields)
    tokenizer, _ = read_gguf(tmp_path / "small.gguf", torch.float32)
    ids = tokenizer("f(1)").input_ids
    assert (ids[0] == tokenizer.bos_token_id == 1) == asks and ids.count(1) == asks
    tokenizer.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("f(1)").input_ids == ids


def test_a_gguf_file_trains_and_saves_as_any_model(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    write_gguf(path, **{"blk.0.ffn_up": "Q8_0"})
    policy = load_policy(str(path), lora_rank=0, device="cpu")
    trr_update(policy, sgd(policy, 0.1), rollouts_of(policy, [1.0, -1.0]), config())
    save_policy(policy, tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    again = load_policy(str(tmp_path / "model"), lora_rank=4, device="cpu")
    assert torch.allclose(logits_of(again.causal), logits_of(policy.causal), atol=1e-5)
    with pytest.raises(UsageError, match="use --quantize none"):
        load_policy(str(path), quantize="4bit", device="cpu")


def test_a_gguf_file_without_the_package_names_it(tmp_path, monkeypatch):
    def missing(*given, **options):
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    (tmp_path / "small.gguf").touch()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(UsageError, match="gguf>=0.10.0.* Install the package"):
        load_policy(str(tmp_path / "small.gguf"), device="cpu")
