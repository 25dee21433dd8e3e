"""Prompts and their ends: chat templates, small ones written for these tests, and tokenizers with habits."""

import datetime

import pytest
import torch
from conftest import make_random_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from model import load_policy, turn_end
from sampling import Sampler

ANY_TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = ANY_TURN + OPENING
SWITCHED = """{% if add_generation_prompt %}<|im_start|>assistant
{% if SWITCH is defined and SWITCH %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"""
TEMPLATES = {  # → what stands behind "assistant\n" in a prompt
    CHATML: "<think>",
    ANY_TURN + SWITCHED.replace("SWITCH", "enable_thinking"): "<think>\n",
    ANY_TURN + SWITCHED.replace("SWITCH", "deep_thought"): "<think>",  # a name that nobody knows
    CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"): "<think>\n",  # opens a thought always
    CHATML.replace("assistant\n{% endif", "assistant\n</think>{% endif"): "<think>",  # closes one that it never opened
    CHATML.replace("assistant\n{% endif", "assistant\n{% if not enable_thinking %}</think>{% endif %}{% endif"): "<think>",
}
CLOSINGS = {  # template → the token that closes an answer
    CHATML: "<|im_end|>",
    CHATML.replace("<|im_end|>\n", " \n<|im_end|> "): "<|im_end|>",
    CHATML.replace("<|im_end|>\n", "<|im_end|><|end|>"): "<|im_end|>",
    CHATML.replace("<|im_end|>", "<|im_end|>|>"): "<|im_end|>|>",  # two of the tokens fit: the longer one
    CHATML.replace("<|im_end|>", "{{ eos_token }}"): "<|end|>",
    CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim | upper }}"): None,  # the answer is not to be found
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}": None,  # ordinary text
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": None,
    "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}{% endfor %}": None,
    None: None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random base model: its files say that it ends with <|end|>, and its tokenizer has chat tokens."""
    folder = make_random_model(tmp_path_factory.mktemp("chat-model"), vocab_size=261)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|im_end|>|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_policy(folder):
    return load_policy(folder, lora_rank=4, device="cpu", date="2031-05-09")


@pytest.mark.parametrize("template", CLOSINGS)
def test_the_token_that_closes_an_answer_is_found_from_the_template(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    expected = CLOSINGS[template]
    assert turn_end(tokenizer) == (expected and tokenizer.convert_tokens_to_ids(expected))


@pytest.mark.parametrize("frame", ("long", "examples"))
def test_a_base_model_stops_where_its_templates_turn_ends(folder, frame):
    policy = load_policy(folder, lora_rank=4, device="cpu", frame=frame)
    closing, end = policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
    assert policy.end_ids == {closing, end}
    torch.manual_seed(0)
    responses = [ids for ids, _ in Sampler(policy).generate([[1, 2, 3]], 200, copies=30)]
    closed = [ids for ids in responses if closing in ids]
    assert len(closed) > 3 and all(ids.index(closing) == len(ids) - 1 for ids in closed)
    assert policy.text(closed[0]) == policy.decode(closed[0][:-1])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_opens_one_thought(chat_policy, template):
    chat_policy.tokenizer.chat_template = template
    text = chat_policy.decode(chat_policy.encode("What is 2 + 2?"))
    assert text.rpartition("<|im_start|>assistant\n")[2] == TEMPLATES[template]
    assert "What is 2 + 2?<|im_end|>" in text and text.count("<|im_start|>") == 2


def test_a_model_may_be_asked_not_to_think(chat_policy):
    chat_policy.tokenizer.chat_template = ANY_TURN + SWITCHED.replace("SWITCH", "enable_thinking")
    assert chat_policy.chat_text("Hi").endswith("assistant\n<think>\n")
    assert chat_policy.chat_text("Hi", thinking=False).endswith("<think>\n\n</think>\n\n")


def test_a_tokenizer_that_appends_its_end_token_does_not_end_a_prompt(chat_policy):
    tokenizer = chat_policy.tokenizer
    end, start = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_start|>"])
    plain = tokenizer("Why?\n").input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|end|>", special_tokens=[("<|end|>", end), ("<|im_start|>", start)])
    assert tokenizer("Why?\n").input_ids == [start, *plain, end]
    assert chat_policy.encode_text("Why?\n") == [start, *plain]
    for chat_policy.chat in (False, True):
        text = chat_policy.decode(chat_policy.encode("Why?"))
        assert text.endswith("<think>") and text.startswith("<|im_start|>") and "Why?" in text


@pytest.mark.parametrize("template, written", [
    ("{{ strftime_now('%Y-%m-%d') }}" + CHATML, "2031-05-09"),
    ("{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
     "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}" + CHATML, "09 May 2031"),
    ("{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}" + CHATML, "26 Jul 2024"),
])
def test_templates_write_the_date_that_was_given(chat_policy, template, written):
    """A date that a template has itself stays: it is the one that the model was trained with."""
    chat_policy.tokenizer.chat_template = template
    assert chat_policy.decode(chat_policy.encode("Why?")).startswith(written + "<|im_start|>user")


def test_without_a_date_it_is_today(folder):
    before = datetime.date.today()
    assert before <= load_policy(folder, lora_rank=4, device="cpu").date <= datetime.date.today()
