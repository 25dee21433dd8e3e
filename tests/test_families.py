"""Random models of many families, each with every kind of layer that it has: sampling, update and adapter.

The reference is transformers alone: a plain forward pass of one sequence, without a cache and without padding.
"""

import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

import sampling
from azr import trr_update
from model import load_policy, response_logprobs
from rewards import Rollout
from sampling import Sampler
from tasks import UsageError

COMMON = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "sliding_window": None, "max_position_embeddings": 512,
          "tie_word_embeddings": False, "eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8,
          "num_key_value_heads": 4}
WINDOW = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 8}, "phi3": {}, "olmo2": {}, "glm4": {},
    "smollm3": {"no_rope_layers": [1, 0]}, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "attention_dropout": 0.5}, "cohere2": {"logit_scale": 0.25, **WINDOW},
    "olmo3": WINDOW, "gemma2": {"query_pre_attn_scalar": 16, **WINDOW}, "gemma3_text": WINDOW,
    "gemma3n_text": {"num_kv_shared_layers": 1, "num_hidden_layers": 3, "vocab_size_per_layer_input": 258,
                     "hidden_size_per_layer_input": 8, "laurel_rank": 8, "sliding_window": 8,
                     "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma4_text": {"global_head_dim": 32, "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 8, **WINDOW},
    "qwen3_moe": EXPERTS, "gpt_oss": {**EXPERTS, **WINDOW},
    "deepseek_v3": {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_5_text": {**DELTA, **RECURRENT}, "qwen3_next": {**DELTA, **RECURRENT, **EXPERTS, "shared_expert_intermediate_size": 48},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {**MAMBA, **RECURRENT, "num_local_experts": 0, "shared_intermediate_size": 96},
    "olmo_hybrid": {**DELTA, **RECURRENT},
    "kimi_linear": {**LATENT, **RECURRENT, **EXPERTS, "q_lora_rank": None, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", "full_attention", "moe"], "num_hidden_layers": 4, "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 4,
                   "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48, "use_mamba_kernels": False},
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [*range(20, 46)], [5], [7, 8], [*range(60, 72)], [*range(99, 140)], [9] * 5]
TOKENS = 24


def make_policy(folder, random_model, model_type, changes):
    """A policy with LoRA, whose B matrices matter, on a random model that is saved in the folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{random_model}/{name}", folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    policy = load_policy(str(folder), lora_rank=4, device="cpu")
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return policy


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, random_model, tmp_path_factory):
    """A folder with a random model of the family, and its policy."""
    folder = tmp_path_factory.mktemp(request.param)
    policy = make_policy(folder, random_model, request.param, FAMILIES[request.param])
    policy.end_ids = frozenset()
    responses = [ids for ids, _ in Sampler(policy).generate(PROMPTS, TOKENS, temperature=0)]
    policy.end_ids = frozenset({responses[1][5], responses[5][9]})  # so that some are short
    return SimpleNamespace(folder=str(folder), policy=policy)


def plain_logits(policy, ids):
    """Logits of one sequence, as transformers gives them. → [token, vocabulary]"""
    return policy.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def assert_greedy(policy, prompt, response):
    """Each token is the likeliest after all before it, and the response ends where it must."""
    likeliest = plain_logits(policy, [*prompt, *response]).argmax(-1)[len(prompt) - 1:-1].tolist()
    assert response == likeliest
    assert not policy.end_ids.intersection(response[:-1])
    assert len(response) == TOKENS or response[-1] in policy.end_ids


def sampled_rollouts(policy):
    """A few responses with the sampler's logprobs, and advantages of both signs."""
    torch.manual_seed(1)
    rollouts = []
    for place, (ids, logps) in enumerate(Sampler(policy, 4).generate(PROMPTS[:3], 12, copies=2)):
        rollouts.append(Rollout("solve", "deduction", PROMPTS[place // 2], response_ids=ids, logps=logps,
                                advantage=(-1.0, 0.5, 2.0)[place % 3]))
    return rollouts


def naive_logprobs(policy, rollout):
    """Logprobs and entropies of a response, with gradients."""
    logits_TV = plain_logits(policy, [*rollout.prompt_ids, *rollout.response_ids])[len(rollout.prompt_ids) - 1:-1]
    logps_TV = torch.log_softmax(logits_TV.float(), -1)
    return logps_TV.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0], -(logps_TV.exp() * logps_TV).sum(-1)


def test_greedy_sampling_takes_the_argmax_of_a_plain_pass(family, monkeypatch):
    """All rows at once, where copies of a prompt part, and in few rows, where prompts wait and then join."""
    monkeypatch.setattr(sampling, "SEGMENT", 4)
    joined, join = [], sampling._join
    monkeypatch.setattr(sampling, "_join", lambda batch, other: joined.append(batch) or join(batch, other))
    for rows, copies in ((0, 2), (4, 1)):
        responses = [ids for ids, _ in Sampler(family.policy, rows).generate(PROMPTS, TOKENS, copies, temperature=0)]
        for place, response in enumerate(responses):
            assert_greedy(family.policy, PROMPTS[place // copies], response)
    cache = sampling._empty_cache(family.policy.causal.config)
    can_grow = sampling._can_grow(cache)
    assert can_grow == (not any(cache.is_sliding))
    assert can_grow == any(batch is not None for batch in joined)
    if any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):  # no graphs, no mask over several responses
        assert not sampling.attends_to_all(family.policy.causal.config) and not family.policy.shares_prompts


@torch.no_grad()
def test_rows_are_planned_by_what_a_cache_holds(family):
    """The bytes of a row of 40 columns, which follow from two short prompts, are those of a prompt of 40."""
    planned, column = 0, 0
    for fixed, per_column, most in sampling._layer_bytes(family.policy):
        planned += fixed + per_column * min(40, most)
        column += per_column
    cache = DynamicCache(config=family.policy.causal.config)
    family.policy.causal(input_ids=torch.tensor([[*range(40)]]), past_key_values=cache)
    held = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values] if isinstance(layer, CacheLayerMixin) else []
        if isinstance(layer, LinearAttentionLayer):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    # a window of 20 is a cache of 19 columns, and a tensor that holds its width
    slack = column + 8 * len(cache.layers) if any(cache.is_sliding) else 0
    assert held <= planned <= held + slack
    assert sampling.inner_width(family.policy.causal.config.get_text_config()) in (96, 256)


def test_prompts_of_one_token_alone(family):
    for prompts in ([[5]], [[5], [9, 8]]):
        for prompt, (response, _) in zip(prompts, Sampler(family.policy).generate(prompts, TOKENS, temperature=0)):
            assert_greedy(family.policy, prompt, response)


def test_the_update_trains_what_the_sampler_says(family):
    policy = family.policy
    rollouts = sampled_rollouts(policy)
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    loss, expected = 0, []
    for rollout in rollouts:
        logps_N, entropies_N = naive_logprobs(policy, rollout)
        assert torch.allclose(torch.tensor(rollout.logps), logps_N, atol=2e-5)
        loss = loss - (rollout.advantage * logps_N.sum() + 0.1 * entropies_N.sum()) / total
        expected.append(logps_N.detach())
    policy.causal.train()
    logps_N, _ = response_logprobs(policy, [[rollout] for rollout in rollouts])
    policy.causal.eval()
    assert torch.allclose(logps_N, torch.cat(expected), atol=2e-5)

    weights = policy.trainable()
    gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    cfg = SimpleNamespace(clip=0.2, entropy_coef=0.1, max_grad_norm=float("inf"), micro_tokens=80)
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)  # its step is the gradient
    metrics = trr_update(policy, optimizer, rollouts, cfg)
    steps, wanted = [], []
    for (name, weight), gradient in zip(weights.items(), gradients):
        steps.append((before[name] - weight.detach()).flatten())
        wanted.append(torch.zeros_like(steps[-1]) if gradient is None else gradient.flatten())
        weight.data.copy_(before[name])
    steps, wanted = torch.cat(steps), torch.cat(wanted)
    assert float((steps - wanted).norm()) < 1e-4 * float(wanted.norm()) and float(wanted.norm()) > 0
    assert metrics["sampler_gap"] < 2e-5


@torch.no_grad()
def test_the_saved_adapter_acts_on_a_fresh_base(family, tmp_path):
    family.policy.model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(family.folder, attn_implementation="eager")  # Gemma 2 needs it
    ids = [*range(40, 70)]
    own, without = plain_logits(family.policy, ids), base(input_ids=torch.tensor([ids])).logits[0]
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(reloaded(input_ids=torch.tensor([ids])).logits[0], own, atol=2e-5)
    assert not torch.allclose(without, own, atol=1e-2)


def test_a_model_that_throws_its_cache_away_takes_no_rows_in(tmp_path, random_model):
    """Phi-3 with two sets of rotary embeddings replaces its cache where it passes from one to the other."""
    switch = 16
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    policy = make_policy(tmp_path, random_model, "phi3", {"rope_parameters": rope, "original_max_position_embeddings": switch})
    policy.end_ids = frozenset(range(0, 258, 16))
    caches = []
    policy.causal.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"] is None), with_kwargs=True)
    responses = Sampler(policy, 4).generate([[i, i + 1, i + 2] for i in range(24)], 4 * switch)
    assert any(caches)
    assert all(ids and len(ids) == len(logps) for ids, logps in responses)
    assert {ids[-1] in policy.end_ids or len(ids) == 4 * switch for ids, _ in responses} == {True}


def test_a_cache_whose_rows_cannot_be_selected_is_refused(tmp_path, random_model):
    """Qwen4-Exp hangs the positions of its rows on the cache itself."""
    changes = {**DELTA, **EXPERTS, "layer_types": ["linear_attention", "indexed_attention"], "shared_expert_intermediate_size": 48,
               "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
               "hc_lowrank": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}}
    with pytest.raises(UsageError, match="it keeps position_ids beside the layers of its cache"):
        Sampler(make_policy(tmp_path, random_model, "qwen4_exp_text", changes)).generate(PROMPTS, 8)


def test_sparse_attention_is_not_taken_for_dense(tmp_path, random_model):
    """DeepSeek V3.2 selects 4 tokens by an index here, and does so only under transformers' own name for SDPA. Where
    padding and a cache then change what it selects, it is refused."""
    changes = {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
               "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v32", **(COMMON | changes))).eval()
    logits = []
    for name in ("sdpa", "grouped_sdpa"):
        model.set_attn_implementation(name)
        logits.append(model(torch.tensor([[*range(30)]])).logits)
    assert float((logits[0] - logits[1]).abs().max()) > 0.1  # or it is grouped at last
    assert not sampling.has_dense_attention(model.config)
    with pytest.raises(UsageError, match="this model cannot be used"):
        make_policy(tmp_path, random_model, "deepseek_v32", changes)
