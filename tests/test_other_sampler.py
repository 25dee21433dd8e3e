"""Another sampler is one class: plain `generate` of transformers as a worked example, for example for a server."""

import json

import torch

import train
from sampling import AnySampler


class PlainSampler(AnySampler):
    """One padded batch that waits for its longest response."""

    def __init__(self, policy, rows=0):
        self.policy = policy

    @torch.no_grad()
    def generate(self, prompts, max_tokens, copies=1, temperature=1.0):
        policy, prompts = self.policy, [prompt for prompt in prompts for _ in range(copies)]
        width, sampling = max(map(len, prompts)), {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids_BP = torch.tensor([[policy.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_BP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = policy.causal.generate(ids_BP, attention_mask=mask_BP, max_new_tokens=max_tokens, stop_strings=["</answer>"],
                                     tokenizer=policy.tokenizer, output_logits=True, return_dict_in_generate=True,
                                     **(sampling if temperature else {"do_sample": False}))
        new_BN = out.sequences[:, width:]
        logps_BN = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, new_BN[..., None])[..., 0]
        ends = [next((n + 1 for n, i in enumerate(ids) if i in policy.end_ids or i == policy.pad_id), len(ids)) for ids in new_BN.tolist()]
        return [(ids[:end], logps[:end]) for ids, logps, end in zip(new_BN.tolist(), logps_BN.tolist(), ends)]


def test_steps_of_training_through_it(tmp_path, monkeypatch):
    refreshed = []
    monkeypatch.setattr(PlainSampler, "refresh", lambda self, policy: refreshed.append(policy))
    monkeypatch.setattr(train, "Sampler", PlainSampler)
    flags = "--batch 4 --samples 2 --seed-factor 1 --heldout-limit 4 --steps 2 --workers 1 --eval-every 0".split()
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(refreshed) == 2 and any(row["solve/induction/accuracy"] for row in rows[1:])
    assert all(row["sampler_gap"] < 1e-5 for row in rows[1:] if row["loss"] is not None)
