"""Make the shipped tiny model from nothing: `python tiny/make.py`.

A language model of 0.6 M parameters, trained here on programs of a small grammar that this file also
writes. It knows the six prompts of the project (propose and solve × three task types) and nothing
else. It *can* reason step by step, which its answers need, but mostly answers at once, which is mostly
wrong: so self-play has something to bring out that is easy to see. README.md in this folder says what
that shows and what not.

What is written: config.json, generation_config.json, model.safetensors, tokenizer.json,
tokenizer_config.json, heldout.jsonl. All seeds are fixed and one thread computes, so two runs on one
machine give the same files.
"""

import argparse
import functools
import json
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tasks  # noqa: E402
from tasks import TASK_TYPES, Task  # noqa: E402

# --- knobs ----------------------------------------------------------------------------------------

SEED = 0
MODEL = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=384)
MATRIX_LR, LR = 0.02, 3e-3   # Muon for the matrices (half the steps of AdamW alone), AdamW for the rest
PHASES = (                # steps, first and last factor of the rates, share of answers without reasoning, statements
    dict(name="reason", steps=5000, first=1.0, last=0.1, direct=0.0,
         solve={1: 0.15, 2: 0.40, 3: 0.45}, propose={1: 0.17, 2: 0.35, 3: 0.28, 4: 0.13, 5: 0.07}),
    dict(name="direct", steps=450, first=0.3, last=0.03, direct=0.7,
         solve={1: 0.15, 2: 0.40, 3: 0.45}, propose={1: 0.17, 2: 0.35, 3: 0.28, 4: 0.13, 5: 0.07}),
    # a second model, tiny/longer: it always reasons, and proposes longer programs than it was ever shown to solve
    dict(name="longer", steps=600, first=0.4, last=0.03, direct=0.0,
         solve={1: 0.10, 2: 0.28, 3: 0.32, 4: 0.15, 5: 0.15}, propose={1: 0.10, 2: 0.22, 3: 0.26, 4: 0.23, 5: 0.19}),
    # a third, not shipped: the same solver, but nearly all that it proposes is easy for it
    dict(name="scarce", steps=400, first=0.3, last=0.03, direct=0.0,
         solve={1: 0.10, 2: 0.28, 3: 0.32, 4: 0.15, 5: 0.15}, propose={1: 0.85, 2: 0.12, 3: 0.015, 4: 0.01, 5: 0.005}),
)
SHOWN = 3                 # lines of a thought at most; of longer programs' solutions the rest is never shown
BATCH_TOKENS = 4096       # prompt, response and padding of one update
PROPOSE_SHARE = 0.25      # of the examples; the rest are solutions
REFERENCES = {0: 0.15, 1: 0.15, 2: 0.50, 3: 0.20}   # K, the tasks shown to a proposer
ZERO_SHARE = 0.04         # of the shown tasks are the zero triplet, from which self-play starts
ALL_NAMED = 0.35          # of the induction tasks whose message leaves nothing open are kept
PAIRS = {6: 0.8, 4: 0.05, 5: 0.05, 8: 0.05, 10: 0.05}   # N, the inputs of an induction task
HELDOUT = {"easy": (200, {1: 0.10, 2: 0.40, 3: 0.50}), "hard": (150, {4: 1.0})}   # tasks a type
FURTHER = [{"hard": (60, {5: 1.0})}, {"hard": (40, {6: 1.0})}]   # more of them, for the third model
SHORT = 50                # tasks a type and number of statements at most, for the curves of a run
LARGEST, LONGEST = 99, 6  # bounds of ints, and of the lengths of lists and strings, on the way

# --- grammar: programs that change one value in one to five statements ------------------------------


@dataclass(frozen=True)
class Op:
    """One statement: what a person calls it, its expression, the constants it may have.

    {x} is the value so far, {b} the second argument, {c} the constant. `undoable`: from the result
    (and {b} and {c}) follows the value before, so that one can reason backwards through it.
    """

    phrase: str
    expression: str
    constants: tuple = ("",)
    undoable: bool = True


@dataclass(frozen=True)
class Domain:
    arguments: str
    variable: str
    draw: object      # rng → the arguments' values, as texts
    ops: tuple


def _ops(*rows):
    return tuple(Op(phrase, expression, tuple(map(str, constants)), undoable)
                 for phrase, expression, constants, undoable in rows)


DIGITS, LETTERS, NONE = range(1, 10), "abcde", ("",)
NUMBER_OPS = (
    ("add {c}", "{x} + {c}", DIGITS, True),
    ("subtract {c}", "{x} - {c}", DIGITS, True),
    ("multiply by {c}", "{x} * {c}", range(2, 6), True),
)
DOMAINS = (
    Domain("n", "n", lambda rng: [str(rng.randint(0, 12))], _ops(
        *NUMBER_OPS,
        ("take from {c}", "{c} - {x}", range(10, 21), True),
        ("divide by {c}", "{x} // {c}", range(2, 5), False),
        ("keep the remainder by {c}", "{x} % {c}", range(3, 10), False),
        ("raise to at least {c}", "max({x}, {c})", range(4, 13), False),
        ("lower to at most {c}", "min({x}, {c})", range(4, 13), False),
        ("take the distance to {c}", "abs({x} - {c})", DIGITS, False),
    )),
    Domain("a, b", "a", lambda rng: [str(rng.randint(1, 12)), str(rng.randint(1, 9))], _ops(
        *NUMBER_OPS,
        ("add the second", "{x} + {b}", NONE, True),
        ("subtract the second", "{x} - {b}", NONE, True),
        ("multiply by the second", "{x} * {b}", NONE, True),
        ("take from the second", "{b} - {x}", NONE, True),
        ("keep the larger", "max({x}, {b})", NONE, False),
        ("keep the smaller", "min({x}, {b})", NONE, False),
    )),
    Domain("xs", "xs", lambda rng: [str([rng.randint(0, 9) for _ in range(rng.randint(2, 3))])], _ops(
        ("add {c} to each", "[x + {c} for x in {x}]", range(1, 6), True),
        ("multiply each by {c}", "[x * {c} for x in {x}]", range(2, 4), True),
        ("keep those above {c}", "[x for x in {x} if x > {c}]", range(1, 7), False),
        ("keep those below {c}", "[x for x in {x} if x < {c}]", range(4, 10), False),
        ("append {c}", "{x} + [{c}]", DIGITS, True),
        ("put {c} in front", "[{c}] + {x}", DIGITS, True),
        ("repeat", "{x} * 2", NONE, True),
        ("reverse", "{x}[::-1]", NONE, True),
        ("sort", "sorted({x})", NONE, False),
        ("sort downwards", "sorted({x}, reverse=True)", NONE, False),
        ("keep the first two", "{x}[:2]", NONE, False),
        ("drop the first", "{x}[1:]", NONE, False),
        ("drop the last", "{x}[:-1]", NONE, False),
    )),
    Domain("s", "s", lambda rng: [repr("".join(rng.choices(LETTERS, k=rng.randint(2, 3))))], _ops(
        ("append {c}", "{x} + '{c}'", LETTERS, True),
        ("put {c} in front", "'{c}' + {x}", LETTERS, True),
        ("change {c[0]} to {c[1]}", "{x}.replace('{c[0]}', '{c[1]}')",
         [a + b for a in LETTERS for b in LETTERS if a != b], False),
        ("append its first", "{x} + {x}[0]", NONE, True),
        ("put its last in front", "{x}[-1] + {x}", NONE, True),
        ("repeat", "{x} * 2", NONE, True),
        ("reverse", "{x}[::-1]", NONE, True),
        ("capitalize", "{x}.upper()", NONE, False),
        ("drop the first", "{x}[1:]", NONE, False),
        ("drop the last", "{x}[:-1]", NONE, False),
    )),
)
UNNAMED = "something"  # stands for the one constant that an induction message does not tell


@dataclass(frozen=True)
class Program:
    domain: Domain
    steps: tuple      # ((Op, constant), …)

    @functools.cached_property
    def text(self):
        x = self.domain.variable
        lines = [f"    {x} = {op.expression.format(x=x, b='b', c=c)}\n" for op, c in self.steps]
        return f"def f({self.domain.arguments}):\n{''.join(lines)}    return {x}"

    def phrases(self, unnamed=None):
        """The operations in order, in words. The constant of step `unnamed` is left open."""
        return ", ".join(
            op.phrase.format(c=UNNAMED if i == unnamed else c) for i, (op, c) in enumerate(self.steps))

    def walk(self, arguments):
        """[(expression with values put in, its value), …], or None where a value leaves the bounds.

        Also None if a statement changes nothing: such a statement could be skipped unpunished.
        """
        x, *b = arguments
        done = []
        for op, c in self.steps:
            expression = op.expression.format(x=x, b="".join(b), c=c)
            value, small = _value(expression)
            if not small or value == x:
                return None
            done.append((expression, value))
            x = value
        return done


@functools.lru_cache(maxsize=200_000)
def _value(expression):
    value = eval(expression)  # of this file's own grammar, never of model text
    parts = value if isinstance(value, list) else [] if isinstance(value, str) else [value]
    size = 1 if isinstance(value, int) else len(value)
    return repr(value), 0 < size <= LONGEST and all(abs(part) <= LARGEST for part in parts)


def choose(rng, weights):
    return rng.choices(list(weights), weights.values())[0]


def draw_program(rng, statements, excluded=frozenset()):
    """(program, arguments, walk): a random program that is not excluded, and an input that suits it."""
    domain = rng.choice(DOMAINS)
    while True:
        ops = [rng.choice(domain.ops) for _ in range(statements)]
        if any(first.phrase == second.phrase for first, second in zip(ops, ops[1:])):
            continue
        program = Program(domain, tuple((op, rng.choice(op.constants)) for op in ops))
        for _ in range(4):
            arguments = domain.draw(rng)
            walk = program.walk(arguments)
            # equal texts are equal syntax trees here, since the grammar has one layout for each tree
            if walk and walk[-1][1] != arguments[0] and program.text not in excluded:
                return program, arguments, walk


def draw_pairs(rng, program, count, arguments, walk):
    """`count` different inputs, the given one first, and their outputs; None if they show too little."""
    pairs = {", ".join(arguments): walk[-1][1]}
    for _ in range(6 * count):
        if len(pairs) == count:
            return pairs if len(set(pairs.values())) > count // 2 else None
        arguments = program.domain.draw(rng)
        walk = program.walk(arguments)
        if walk:
            pairs.setdefault(", ".join(arguments), walk[-1][1])
    return None


def unnamed_step(rng, program):
    """The step whose constant the message leaves open, or None.

    It must be possible to find it from one example: forwards from the input to the step, backwards
    from the output to it. So all that comes after it, and the step itself, must be undoable.
    """
    candidates = []
    for i, (op, _) in reversed(list(enumerate(program.steps))):
        if not op.undoable:
            break
        if "{c}" in op.phrase:
            candidates.append(i)
    return rng.choice(candidates) if candidates else None


# --- traces and responses ---------------------------------------------------------------------------

DIRECTLY = "I will answer directly."
FENCE = {"deduction": "output", "abduction": "input", "induction": "python"}


def forwards(walk):
    return [f"{expression} -> {value}" for expression, value in walk]


def backwards(walk):
    return [f"{value} <- {expression}" for expression, value in reversed(walk)]


def respond(thought, *blocks):
    """The response in the project's format; blocks are (tag, text)."""
    body = "".join(f"```{tag}\n{text}\n```\n" for tag, text in blocks)
    return f"{thought}</think>\n<answer>\n{body}</answer>"


def draw_solution(rng, task_type, statements, excluded=frozenset()):
    """(task, thought, answer) for a solver. The thought puts values into the program, line by line.

    Deduction goes forwards, abduction backwards, induction on its first example from both ends to
    the step whose constant is not known. Without the values in it a thought did not help at all.
    """
    while True:
        program, arguments, walk = draw_program(rng, statements, excluded)
        given, returned = ", ".join(arguments), walk[-1][1]
        if task_type == "deduction":
            return Task(task_type, program.text, given, returned), forwards(walk), returned
        if task_type == "abduction":
            return Task(task_type, program.text, given, returned), backwards(walk), given
        pairs = draw_pairs(rng, program, choose(rng, PAIRS), arguments, walk)
        step = unnamed_step(rng, program)
        # with every constant named an induction task is translation; some of these are enough
        if pairs and (step is not None or rng.random() < ALL_NAMED):
            task = Task(task_type, program.text, inputs=tuple(pairs), outputs=tuple(pairs.values()),
                        message=program.phrases(step))
            open_step = len(walk) - 1 if step is None else step
            thought = forwards(walk[:open_step]) + backwards(walk[open_step + 1:]) \
                + forwards(walk[open_step:open_step + 1])
            return task, thought, program.text


def draw_proposal(rng, task_type, statements, excluded=frozenset()):
    """(prompt, response) for a proposer. Its thought is the plan: the operations in words."""
    draw = lambda: draw_program(rng, choose(rng, statements), excluded)  # noqa: E731
    zero = rng.random() < ZERO_SHARE
    if task_type != "induction":
        shown = []
        for k in range(choose(rng, REFERENCES)):
            program, arguments, walk = draw()
            shown.append(tasks.ZERO_TRIPLET if zero and k == 0 else
                         Task(task_type, program.text, ", ".join(arguments), walk[-1][1]))
        program, arguments, _ = draw()
        response = respond(program.phrases(), ("python", program.text), ("input", ", ".join(arguments)))
        return tasks.propose_prompt(task_type, shown), response
    while True:
        count = choose(rng, PAIRS)
        program, arguments, walk = draw()
        pairs = draw_pairs(rng, program, count, arguments, walk)
        if pairs and not zero:
            text, plan, message = program.text, program.phrases(), program.phrases(unnamed_step(rng, program))
            break
        if pairs:
            text, plan, message = tasks.ZERO_TRIPLET.program, "no change", "no change"
            break
    blocks = [("input", given) for given in pairs] + [("message", message)]
    return tasks.propose_prompt(task_type, program=text, count=count), respond(plan, *blocks)


def draw_example(rng, phase, excluded):
    """(prompt, response) for one line of the training data.

    The solution of a program with more than SHOWN statements breaks off after SHOWN lines of its thought: the model
    learns that the thought goes on, but neither how, nor any answer to such a program.
    """
    task_type = rng.choice(TASK_TYPES)
    if rng.random() < PROPOSE_SHARE:
        question, response = draw_proposal(rng, task_type, phase["propose"], excluded)
    else:
        task, thought, answer = draw_solution(rng, task_type, choose(rng, phase["solve"]), excluded)
        question = tasks.solve_prompt(task)
        if len(thought) > SHOWN:
            return tasks.FRAME.replace("{question}", question), "".join(line + "\n" for line in thought[:SHOWN])
        thought = DIRECTLY if rng.random() < phase["direct"] else "\n".join(thought)
        response = respond(thought, (FENCE[task_type], answer))
    return tasks.FRAME.replace("{question}", question), response + END


# --- tokenizer: bytes, and one token for every text that is fixed -----------------------------------

END, PAD = "<|end|>", "<|pad|>"


def passages():
    """The fixed passages of all prompts, found by rendering them with a mark for every content.

    A passage that follows content begins at its fence, not at the newline before it: no other token
    reaches across a newline into a fence, so no content, however it ends, can break a passage.
    """
    mark = "\0"
    task = Task("", mark, mark, mark, (mark,) * 4, (mark,) * 4, mark)
    questions = [tasks.propose_prompt(task_type, [task] * k) for k in (0, 2) for task_type in ("deduction", "abduction")]
    questions.append(tasks.propose_prompt("induction", program=mark, count=mark))
    for task_type in TASK_TYPES:
        questions.append(tasks.solve_prompt(Task(task_type, *list(asdict(task).values())[1:])))
    pieces = [piece for question in questions
              for piece in tasks.FRAME.replace("{question}", question).split(mark)]
    return list(dict.fromkeys(piece.removeprefix("\n") for piece in pieces))


def snippets():
    """Pieces of programs, thoughts and responses. Values stay bytes: their digits and letters matter."""
    found = [DIRECTLY, UNNAMED, "no change", ", ", " -> ", " <- ", "\n    return ", "```\n```message\n",
             "\n```\n</answer>", "def f(x):", "xs"]
    found += [f"</think>\n<answer>\n```{tag}\n" for tag in ("python", "input", "output")]
    for domain in DOMAINS:
        found += [f"def f({domain.arguments}):", f"\n    {domain.variable} = "]
        for op in domain.ops:
            for text in (op.phrase, op.expression):
                found += re.split(r"\{[^}]*\}", text)
    return list(dict.fromkeys(text for text in found if len(text) > 1))


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (END, PAD)])
    core.add_tokens([AddedToken(text, normalized=False) for text in passages() + snippets()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD,
                                   clean_up_tokenization_spaces=False, padding_side="left",
                                   model_max_length=4096)


# --- data -------------------------------------------------------------------------------------------

def batches(seed, tokenizer, phase, excluded, chunk=4096):
    """Endless (ids, is_response) batches of about BATCH_TOKENS: the stream that the model is trained on.

    Examples of like length share a batch, so little of it is padding; each is seen once.
    """
    rng = random.Random(seed)
    encode = lambda texts: [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts)]  # noqa: E731
    while True:
        prompts, responses = zip(*(draw_example(rng, phase, excluded) for _ in range(chunk)))
        rows = sorted(((len(p), p + r) for p, r in zip(encode(prompts), encode(responses))),
                      key=lambda row: len(row[1]))
        cut, start = [], 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or len(rows[i][1]) * (i + 1 - start) > BATCH_TOKENS:
                cut.append(rows[start:i])
                start = i
        rng.shuffle(cut)
        for rows in cut:
            width = max(len(ids) for _, ids in rows)
            ids = torch.full((len(rows), width), tokenizer.pad_token_id)
            is_response = torch.zeros((len(rows), width), dtype=torch.bool)
            for i, (prompt_length, row) in enumerate(rows):
                ids[i, :len(row)] = torch.tensor(row)
                is_response[i, prompt_length:len(row)] = True
            yield ids, is_response


# --- training ---------------------------------------------------------------------------------------

def make_model(tokenizer, seed):
    torch.manual_seed(seed)
    # Llama with attention biases is Qwen2 but for one more bias; for model type qwen2, AutoTokenizer
    # would put its own normalizer before ours, and the tokenizer would no longer be exact
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, attention_bias=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **MODEL))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def train(model, stream, phase):
    """One phase: next-token loss on the responses alone, warm-up, then a straight line down."""
    steps, first, last = phase["steps"], phase["first"], phase["last"]
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (torch.optim.Muon(inner, lr=MATRIX_LR, weight_decay=0.01),
                  torch.optim.AdamW(outer, lr=LR, betas=(0.9, 0.98), weight_decay=0.0))
    warmup = min(60, steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, first + (last - first) * step / steps)) for optimizer in optimizers]
    model.train()
    bar, smooth = tqdm(range(steps), desc=phase["name"], mininterval=2), None
    for _ in bar:
        ids, is_response = next(stream)
        # rows are padded on the right, where a causal model never looks, so no mask is needed
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[is_response[:, 1:]]), ids[:, 1:][is_response[:, 1:]])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    model.eval()


# --- held-out tasks -----------------------------------------------------------------------------------

def draw_heldout(rng, task_type, statements):
    """(program, task) whose answer can hardly be guessed."""
    while True:
        program, arguments, walk = draw_program(rng, statements)
        given, returned = ", ".join(arguments), walk[-1][1]
        if task_type == "induction":
            step, pairs = unnamed_step(rng, program), draw_pairs(rng, program, 6, arguments, walk)
            if step is not None and pairs:  # with every constant named it would only be translation
                return program, Task(task_type, program.text, inputs=tuple(pairs), outputs=tuple(pairs.values()),
                                     message=program.phrases(step))
            continue
        others = [walk[-1][1] for walk in (program.walk(program.domain.draw(rng)) for _ in range(12)) if walk]
        echo = program.walk([returned, *arguments[1:]])
        if len(others) >= 6 and others.count(returned) <= 2 and not (echo and echo[-1][1] == returned):
            return program, Task(task_type, program.text, given, returned)


def make_heldout(seed, splits=HELDOUT, stream="held-out", sizes=None):
    """[{split, id, and the fields of a Task}]: each program once a type and split."""
    rng, rows = random.Random(f"{seed} {stream}"), []
    for split, (size, statements) in splits.items():
        for task_type in TASK_TYPES:
            seen = set()
            while len(seen) < (sizes or size):
                program, task = draw_heldout(rng, task_type, choose(rng, statements))
                if program.text not in seen:
                    rows.append({"split": split, "id": f"{split}-{task_type}-{len(seen):03d}", **asdict(task)})
                    seen.add(program.text)
    return rows


def by_statements(rows):
    """The first SHORT of the same tasks, of each type, in splits named by the number of statements."""
    splits = {}
    for row in rows:
        split = str(row["program"].count("\n") - 1)
        splits.setdefault((split, row["type"]), []).append(row | {"split": split})
    return [row for key in sorted(splits) for row in splits[key][:SHORT]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_heldout(rows, executor):
    """The project's own sandbox must find every task valid, with the outputs that are written here."""
    jobs = [(row["program"], given, output) for row in rows for given, output in zip(
        row["inputs"] or [row["input"]], row["outputs"] or [row["output"]])]
    for (program, given, output), run in zip(jobs, executor.validate([job[:2] for job in jobs])):
        assert run.ok and run.output == output, (program, given, output, run)


# --- sanity report --------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, tokenizer, questions, sample, forbid=(), limit=160, rows=200):
    """Responses to questions; `forbid`: token ids that may not be generated."""
    prompts = [tokenizer(tasks.FRAME.replace("{question}", question)).input_ids for question in questions]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    for start in range(0, len(order), rows):
        part = order[start:start + rows]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in part]}, return_tensors="pt")
        done = model.generate(
            **batch, max_new_tokens=limit, do_sample=sample, temperature=1.0, top_p=1.0, top_k=0,
            suppress_tokens=list(forbid) or None)
        for i, ids in zip(part, done[:, batch["input_ids"].shape[1]:]):
            texts[i] = tokenizer.decode(ids, clean_up_tokenization_spaces=False).split(END)[0]
    return texts


def report_accuracy(model, tokenizer, rows, executor, limit):
    """Print what the base can do, in both modes."""
    from rewards import is_correct
    direct = tokenizer.convert_tokens_to_ids(DIRECTLY)
    print(f"{'accuracy':32}" + "".join(f"{task_type:>12}" for task_type in TASK_TYPES))
    for split in HELDOUT:
        for name, sample, forbid in (("greedy", False, ()), ("sampled", True, ()),
                                     ("greedy, reasoning", False, (direct,)), ("sampled, reasoning", True, (direct,))):
            line, shares, tokens = "", [], []
            for task_type in TASK_TYPES:
                todo = [Task.from_dict({k: v for k, v in row.items() if k not in ("split", "id")})
                        for row in rows if row["split"] == split and row["type"] == task_type]
                texts = generate(model, tokenizer, [tasks.solve_prompt(task) for task in todo], sample, forbid, limit)
                right = is_correct(todo, [tasks.parse_answer(task_type, text) for text in texts], executor)
                line += f"{sum(right) / len(right):12.3f}"
                shares += [text.startswith(DIRECTLY) for text in texts]
                tokens += [len(tokenizer(text).input_ids) for text in texts]
            print(f"{split + ', ' + name:32}{line}   direct {sum(shares) / len(shares):.2f}"
                  f"   tokens {sum(tokens) / len(tokens):.0f}, at most {max(tokens)}", flush=True)


def report_proposals(model, tokenizer, executor, limit, proposals):
    """Print what the base proposes."""
    rng = random.Random("report")
    for task_type in TASK_TYPES:
        questions, programs = [], []
        for _ in range(proposals):
            shown = [draw_program(rng, choose(rng, PHASES[0]["propose"])) for _ in range(2)]
            shown = [Task("deduction", p.text, ", ".join(a), walk[-1][1]) for p, a, walk in shown]
            programs.append(shown[0].program)
            questions.append(tasks.propose_prompt(task_type, shown, shown[0].program, 6))
        texts = generate(model, tokenizer, questions, True, limit=limit)
        drafts = [tasks.parse_proposal(task_type, text, program, 6) for text, program in zip(texts, programs)]
        valid = []
        for task in filter(None, drafts):
            runs = executor.validate([(task.program, given) for given in task.inputs or (task.input,)])
            if all(run.ok for run in runs):
                valid.append((task, [run.output for run in runs]))
        lengths = [task.program.count("\n") - 1 for task, _ in valid]
        print(f"proposals, {task_type}: parsed {sum(map(bool, drafts)) / proposals:.2f}, valid {len(valid) / proposals:.2f}, "
              f"different programs {len({tasks.fingerprint(task.program) for task, _ in valid}) / proposals:.2f}, "
              f"output = input {sum(task.input in outputs for task, outputs in valid) / proposals:.2f}, statements "
              + ", ".join(f"{n}: {lengths.count(n) / max(1, len(lengths)):.2f}" for n in sorted(set(lengths))), flush=True)


# --- all of it --------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Make the shipped tiny model from nothing.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: tiny/)")
    parser.add_argument("--seed", type=int, default=SEED, help="another base, other held-out tasks")
    parser.add_argument("--longer", action="store_true", help="only the second model, from the first one in --out")
    parser.add_argument("--scarce", type=Path, metavar="FOLDER",
                        help="only the third model and its held-out tasks, from the second one in --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps and tasks, for tests")
    arguments = parser.parse_args()
    from executor import Executor  # the sandbox: judges the tasks here and the answers in the report
    torch.set_num_threads(1)
    start, sizes = time.monotonic(), 3 if arguments.smoke else None
    folders = {"direct": arguments.out, "longer": arguments.out / "longer", "scarce": arguments.scarce}
    names, source = ["reason", "direct", "longer"], None
    if arguments.scarce:
        names, source = ["scarce"], folders["longer"]
    elif arguments.longer:
        names, source = ["longer"], folders["direct"]
    rows = make_heldout(arguments.seed, HELDOUT, "held-out", sizes)
    excluded = frozenset(row["program"] for row in rows)
    if arguments.scarce:
        for splits in FURTHER:  # not excluded: no model is shown how programs of this length are solved
            rows += make_heldout(arguments.seed, splits, f"held-out {splits}", sizes)
    with Executor() as executor:
        check_heldout(rows, executor)
        tokenizer = make_tokenizer()
        model = LlamaForCausalLM.from_pretrained(source) if source else make_model(tokenizer, arguments.seed)
        for phase in (phase for phase in PHASES if phase["name"] in names):
            if arguments.smoke:
                phase = phase | dict(steps=2)
            stream = batches(f"{arguments.seed} {phase['name']}", tokenizer, phase, excluded,
                             chunk=128 if arguments.smoke else 4096)
            train(model, stream, phase)
            if phase["name"] not in folders:
                continue
            folder = folders[phase["name"]]
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if phase["name"] != "longer":
                write_rows(folder / "heldout.jsonl", rows)
            if phase["name"] == "scarce":
                write_rows(folder / "statements.jsonl", by_statements(rows))
            print(f"written to {folder} after {(time.monotonic() - start) / 60:.1f} minutes")
            limit = 8 if arguments.smoke else 160
            if phase["name"] != "scarce":  # which is chosen by what it proposes, not by what it solves
                report_accuracy(model, tokenizer, rows, executor, limit)
            report_proposals(model, tokenizer, executor, limit, 3 if arguments.smoke else 300)


if __name__ == "__main__":
    main()
