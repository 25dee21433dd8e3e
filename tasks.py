"""The task types of the Absolute Zero Reasoner: prompts, parsers of responses, and the task buffer.

A task is made of a program p (a Python function `f`), an input i and the output o = p(i). The three
types hide one of the three (paper, section 3):

    deduction   given p and i, find o          (running code in the head)
    abduction   given p and o, find some i     (searching backwards)
    induction   given pairs (i, o), find p     (writing the program)

KINDS has one entry per type, and training code never asks for a type by its name, so that a fourth type
is just a fourth entry (see tests/test_fourth_type.py). This module runs no program and imports only the
standard library. `executor.py` runs programs, and `rewards.py` judges answers.
"""

import ast
import hashlib
import re
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

TASK_TYPES = ("deduction", "abduction", "induction")  # the paper's
ROLES = ("propose", "solve")

# in characters. A task with a longer part is invalid, because nothing is ever cut
LIMITS = {"program": 3000, "input": 400, "output": 400, "message": 1000}
NESTING_LIMIT = 100  # levels of a program's syntax tree


class UsageError(ValueError):
    """An error that the user can fix. The command lines print it as one line and exit with code 2."""


@dataclass(frozen=True)
class Task:
    """One problem. Deduction and abduction use input/output, induction inputs/outputs and message.

    `input` is the text between the parentheses of a call f(…). `output` is a Python literal.
    """

    type: str
    program: str
    input: str = ""
    output: str = ""
    inputs: tuple = ()
    outputs: tuple = ()
    message: str = ""

    @classmethod
    def from_dict(cls, fields):
        """Rebuild a task from `dataclasses.asdict` after a trip through JSON (lists → tuples)."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


# The only task that does not come from the model: the identity function, as in the paper.
ZERO_TRIPLET = Task("deduction", "def f(x):\n    return x", "'Hello World'", "'Hello World'")


def _example(program, message, calls):
    """A worked example. calls: "input → output; …", of which the first is the one to solve."""
    inputs, outputs = zip(*(call.split(" → ") for call in calls.split("; ")))
    return Task("deduction", program, inputs[0], outputs[0], inputs, outputs, message)


# Worked examples for models that need to see the format. They are our own, and unlike any held-out or public
# task. All functions have one argument, because after functions of two, small models often call f with one.
EXAMPLES = (
    _example("def f(minutes):\n    return minutes // 60, minutes % 60",
             "Hours, and the minutes that are left.",
             "135 → (2, 15); 60 → (1, 0); 5 → (0, 5); 0 → (0, 0); 200 → (3, 20)"),
    _example("def f(age):\n    return 'child' if age < 13 else 'adult'", "Who pays the full price?",
             "13 → 'adult'; 5 → 'child'; 40 → 'adult'; 12 → 'child'; 77 → 'adult'"),
    _example("def f(prices):\n    return max(prices) - min(prices)", "How far the prices lie apart.",
             "[4, 9, 6] → 5; [7] → 0; [1, 2] → 1; [3, 3, 8] → 5; [10, 0] → 10"),
    _example("def f(kilos):\n    price = kilos * 3\n    if price > 20:\n        price -= 2\n"
             "    return price", "Large orders are cheaper.",
             "8 → 22; 2 → 6; 7 → 19; 6 → 18; 20 → 58"),
    _example("def f(scores):\n    return [s for s in scores if s >= 5]", "Who passes?",
             "[3, 8, 5] → [8, 5]; [1] → []; [5, 6] → [5, 6]; [4, 9] → [9]; [] → []"),
    _example("def f(days):\n    coins = 1\n    for day in range(days):\n        coins *= 2\n"
             "    return coins", "Savings that double every day.",
             "3 → 8; 0 → 1; 5 → 32; 1 → 2; 6 → 64"),
    _example("def f(name):\n    return name[0].upper() + '.'", "How a name is cut short.",
             "'ada' → 'A.'; 'bob' → 'B.'; 'carl' → 'C.'; 'Zoe' → 'Z.'; 'eva' → 'E.'"),
    _example("def f(degrees):\n    return 'ice' if min(degrees) < 0 else 'rain'", "Is it cold enough?",
             "[3, -1, 4] → 'ice'; [5] → 'rain'; [-2, 8] → 'ice'; [0, 1] → 'rain'; [-9, -3] → 'ice'"),
    _example("def f(hour):\n    end = hour + 8\n    if end > 24:\n        end -= 24\n    return end",
             "When the night shift is over.", "20 → 4; 9 → 17; 16 → 24; 23 → 7; 0 → 8"),
    _example("def f(bags):\n    load = 0\n    for bag in bags:\n        if load + bag <= 20:\n"
             "            load += bag\n    return load", "The car takes only so much.",
             "[12, 9, 6] → 18; [5] → 5; [20, 1] → 20; [25] → 0; [8, 8, 8] → 16"),
)
SOLVED = EXAMPLES[:3]  # shown to a solver, with Kind.thoughts
# The least number of earlier responses in a proposer's prompt. If the program is given, all EXAMPLES are
# shown, because more of them help with the format. If it has to be written, more of them gave more invalid
# programs.
SHOTS = 6
# In the frame "brief", since a model of some 100 million weights loses the thread in longer thoughts.
BRIEF_REMARK = "New."
BRIEF_THOUGHTS = (
    "f(135) is 135 // 60, 135 % 60.", "f(13) is 'adult', as 13 < 13 is false.", "f([4, 9, 6]) is 9 - 4.")


def split_pairs(task):
    """Induction: (shown pairs, hidden pairs), half and half in the order proposed.

    Pairs are (input, output) texts. If their number is odd, the extra pair is shown. A single pair
    therefore leaves nothing hidden, and such a task is invalid because it could be solved by copying.
    """
    pairs = list(zip(task.inputs, task.outputs))
    half = (len(pairs) + 1) // 2
    return pairs[:half], pairs[half:]


# --- prompts ------------------------------------------------------------------------------------
# str.format fills in questions and examples, so that a literal brace in them has to be doubled.

# For base models. Models with a chat template get the same two passages as one user turn instead.
INSTRUCTION = """\
Below is a problem about Python programs. Reason about it step by step between <think> and </think>. \
Then write the final answer between <answer> and </answer>, in the format that the problem asks for, \
and stop."""
PROBLEM, RESPONSE = "\n\n### Problem\n", "\n\n### Response\n<think>"
FRAME = INSTRUCTION + PROBLEM + "{question}" + RESPONSE
CHAT_FRAME = INSTRUCTION + "\n\n{question}"
THINK = "<think>"  # opened in the prompt, so that every response starts inside its thought

_PROPOSE = """\
Invent one new task for a test of reasoning about code. The task consists of a Python function `f` \
and one input for it. {what_the_solver_does}

Requirements:
- The function that is called must have the name `f`, take at least one argument and return a value. \
Helper functions or classes may stand before it.
- The same input must give the same result every time: no randomness, no clock, no files, no network, \
no printing, no reading of input, nothing remembered between calls.
- The arguments and the result are plain values: None, bool, int, float, complex, str, bytes, or \
tuples, lists, dicts and sets of them. The result takes at most 400 characters to write.
- Import only what computes, such as math, itertools, collections, re or string.
- The answer should be hard to guess and take several steps of reasoning, yet be possible to find \
without running the code.
- The task must differ from the reference tasks, in idea and in structure, not only in names or numbers.

Give exactly two fenced blocks: the program, and the input as it would stand between the parentheses \
of the call f(...):
```python
def f(...):
    ...
    return ...
```
```input
...
```

{references}Now invent the new task."""

_REFERENCE = ("Reference task:\n```python\n{program}\n```\n"
              "```input\n{input}\n```\n```output\n{output}\n```\n\n")

_TRIPLET_SHOT = """\
Write a new function f and an input, so that one has to think to {aim}.

### Response
<think>{remark}
</think>
<answer>
```python
{program}
```
```input
{input}
```
</answer>"""

_TRIPLET_REMARKS = (  # for each of EXAMPLES: the difficulty, and a check of the output
    "Two results from one number, by division and remainder. Checked: 135 // 60 = 2 and 135 % 60 = 15.",
    "The border is the hard part: 13 < 13 is false. Checked: 'adult'.",
    "It takes two passes over the list. Checked: 9 - 4 = 5.",
    "The price changes only above a border. Checked: 8 * 3 = 24, and 24 - 2 = 22.",
    "One has to keep the order of those that pass. Checked: 3 is dropped, [8, 5] stays.",
    "The loop must be followed to its end. Checked: 1, 2, 4, 8.",
    "Only the first letter counts. Checked: 'a' becomes 'A.'.",
    "One cold day in the middle decides. Checked: -1 < 0, so 'ice'.",
    "It wraps around at midnight. Checked: 20 + 8 = 28, and 28 - 24 = 4.",
    "A bag that does not fit is left out, but a later one may fit. Checked: 12, then 12 + 6 = 18.")
_TRIPLET_REMARK = "Checked: f({input}) is {output}."

_PAIR = "Example:\n```input\n{input}\n```\n```output\n{output}\n```\n\n"


def _entry_in(frame, kind):
    """The entry of a type, with its brief thoughts in the frame "brief"."""
    entry = KINDS[kind]
    if frame != "brief":
        return entry
    remarks = (BRIEF_REMARK,) * len(EXAMPLES)
    return replace(entry, remarks=remarks, remark=BRIEF_REMARK, thoughts=BRIEF_THOUGHTS,
                   propose_example=entry.propose_example.replace("\n</think>", "</think>"),
                   solve_example=entry.solve_example.replace("\n</think>", "</think>"))


def propose_prompt(kind, references=(), program="", count=10, frame="long"):
    """The proposer's question, with K references for a type that brings its own program, else one program.

    In the frames "examples" and "brief", references of any type appear as earlier responses. EXAMPLES bring
    their number up to SHOTS or more, and replace the identity, because it shows nothing.
    """
    entry = _entry_in(frame, kind)
    if frame == "long" or not entry.propose_example:
        shown = "".join(_REFERENCE.format(**asdict(task)) for task in references)
        return entry.propose.format(references=shown, program=program, count=count)
    own = [task for task in references if task.program != ZERO_TRIPLET.program]
    shots = SHOTS if entry.own_program else len(EXAMPLES)
    earlier = []
    for example, remark in zip(EXAMPLES[:max(0, shots - len(own))], entry.remarks):
        earlier.append(_slots(example) | {"remark": remark})
    for task in own:
        slots = _slots(task)
        earlier.append(slots | {"remark": entry.remark.format(**slots)})
    return _few_shot(entry.propose_example, earlier, {"program": program})


def solve_prompt(task, frame="long"):
    """The solver's question. For induction: the message and the shown half. Frames as in `propose_prompt`."""
    entry = _entry_in(frame, task.type)
    if frame == "long" or not entry.solve_example:
        return entry.solve.format(**_slots(task))
    earlier = [_slots(example) | {"thought": thought} for example, thought in zip(SOLVED, entry.thoughts)]
    return _few_shot(entry.solve_example, earlier, _slots(task))


def _few_shot(example, earlier, asked):
    """Earlier problems with their responses, then the problem to answer: one question for FRAME."""
    problems = [example.format(**slots) for slots in earlier]
    return PROBLEM.join([*problems, example.partition(RESPONSE)[0].format(**asked)])


def _slots(task):
    pairs, _ = split_pairs(task)
    return asdict(task) | {
        "pairs": "".join(_PAIR.format(input=i, output=o) for i, o in pairs),
        "calls": "".join(f">>> f({i})\n{o}\n" for i, o in pairs),
        "inputs": "\n".join(text.replace("\n", " ") for text in task.inputs)}


# --- responses ------------------------------------------------------------------------------------

def final_answer(response):
    """The text between <answer> and </answer>, or None if the response is not well formed.

    Well formed: a thought, `</think>`, then one answer and nothing after it. The opening
    `<think>` is part of the prompt.

    >>> final_answer("2 + 2 = 4</think> <answer>4</answer>")
    '4'
    """
    _, _, rest = response.partition("</think>")
    match = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", rest, re.S)
    return match[1].strip() if match and "answer>" not in match[1] else None


def fenced_blocks(text, tag):
    """The contents of all fenced blocks of `text` whose tag matches the pattern `tag`, in order."""
    # an unclosed block takes the rest of the text, so that the search stays linear
    block = rf"^[ \t]*```{tag}[ \t]*\n(.*?)(?:^[ \t]*(```)[ \t]*$|\Z)"
    return [content.strip("\n").rstrip()
            for content, closing in re.findall(block, text, re.DOTALL | re.MULTILINE) if closing]


def parse_proposal(kind, response, program="", count=10):
    """A proposer's response → the proposed Task, not yet run (no outputs), or None if malformed.

    program: the one that the proposer was given, if any. count: more inputs than this are ignored.
    """
    answer = final_answer(response)
    fields = answer and KINDS[kind].parse(lambda tag: fenced_blocks(answer, tag), program, count)
    return Task(kind, **fields) if fields else None


def parse_answer(kind, response):
    """A solver's response → the text of its answer, or None if malformed.

    The answer is the last block with the type's tag. An answer without any fence is taken as it is,
    because base models often write the bare value (the paper's code does the same).
    """
    answer = final_answer(response) or ""
    blocks = fenced_blocks(answer, KINDS[kind].tag)
    if blocks or "```" in answer:
        return blocks[-1] if blocks else None
    return answer or None


# --- the three types ------------------------------------------------------------------------------

def parse_triplet(blocks, program, count):
    """One `python` and one `input` block."""
    programs, inputs = blocks("python"), blocks("input")
    if len(programs) == len(inputs) == 1 and programs[0].strip():
        return {"program": programs[0], "input": inputs[0].strip()}


def parse_pairs(blocks, program, count):
    """For the given program: two to `count` different inputs and a `message`.

    Each input has its own `input` block, or all are lines of a single one.
    """
    texts = blocks("input")
    texts = texts[0].split("\n") if len(texts) == 1 else texts
    inputs = tuple(dict.fromkeys(text.strip() for text in texts))[:count]
    messages = blocks("message")
    if len(inputs) >= 2 and len(messages) == 1 and messages[0].strip():
        return {"program": program, "inputs": inputs, "message": messages[0].strip()}


def complete_triplet(task, runs):
    return replace(task, output=runs[0].output) if runs[0].ok else None


def complete_pairs(task, runs):
    """Leave out inputs that fail, and inputs that make the same call as an earlier one.

    The text of a call does not show the order of *args, so calls with different outputs are different.
    """
    good = {}
    for text, run in zip(task.inputs, runs):
        if run.ok:
            good.setdefault((run.call, run.output), (text, run.output))
    if len(good) < 2:  # too few for one to stay hidden
        return None
    inputs, outputs = zip(*good.values())
    return replace(task, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class Kind:
    """A task type: everything that the rest of the code knows about it."""

    propose: str        # the proposer's question, with the slots {references}, {program} and {count}
    solve: str          # the solver's question, with the fields of Task and {pairs} as slots
    tag: str            # of the fenced block that holds the solver's answer
    hidden: str         # the field of Task that holds the answer (see TaskBuffer.answer_share)
    parse: Callable     # (blocks by tag, given program, count) → the fields of a Task, or None
    complete: Callable  # (task, its runs) → the task with its outputs, or None
    judge: Callable     # (task, answer) → [(program, input, output)]: all must hold, and at least one exist.
    #                     If the program is None, the input itself, a literal, must be the output
    runs: Callable = lambda task: [(task.program, text) for text in task.inputs or (task.input,)]
    propose_example: str = ""  # short question, RESPONSE, response, with the slots: fields of Task,
    solve_example: str = ""    # {calls}, {inputs} as lines, {remark} or {thought}. "": the long question
    remarks: tuple = ()        # a proposer's thought in the example of each of EXAMPLES,
    remark: str = ""           # and of a task of its own, with the same slots
    thoughts: tuple = ()       # a solver's in the example of each of SOLVED
    own_program: bool = True   # a proposal brings its own program (if not, it is given one)
    is_triplet: bool = False   # any (p, i, o) is a task of this type. Such types share seeds and references


KINDS = {
    "deduction": Kind(
        remarks=_TRIPLET_REMARKS, remark=_TRIPLET_REMARK,
        propose_example=_TRIPLET_SHOT.replace("{aim}", "predict its output"),
        thoughts=(  # it executes step by step
            "135 // 60 is 2, because 2 * 60 = 120. 135 % 60 is 135 - 120 = 15. So f returns (2, 15).",
            "13 < 13 is false, so f returns 'adult'.",
            "max([4, 9, 6]) is 9. min([4, 9, 6]) is 4. 9 - 4 = 5. So f returns 5."),
        solve_example="""\
```python
{program}
```
What does f({input}) return?

### Response
<think>{thought}
</think>
<answer>{output}</answer>""",
        propose=_PROPOSE.replace("{what_the_solver_does}", """\
The solver will see the function and the input, and has to predict what the function returns."""),
        solve="""\
Here is a Python function and an input. Work out what the call f(...) with this input returns.

```python
{program}
```
```input
{input}
```

Give the returned value as a Python literal in one fenced block:
```output
...
```""",
        tag="output", hidden="output", parse=parse_triplet, complete=complete_triplet, is_triplet=True,
        judge=lambda task, answer: [(None, answer, task.output)]),
    "abduction": Kind(
        remarks=_TRIPLET_REMARKS, remark=_TRIPLET_REMARK,
        propose_example=_TRIPLET_SHOT.replace("{aim}", "find an input from its output"),
        thoughts=(  # it searches, and checks what it has found
            "minutes // 60 is 2 and minutes % 60 is 15, so minutes is 2 * 60 + 15 = 135. "
            "Check f(135): 135 // 60 is 2 and 135 % 60 is 15. That is right.",
            "f returns 'adult' if age < 13 is false, for example with 13. "
            "Check f(13): 13 < 13 is false, so 'adult'. That is right.",
            "max(prices) - min(prices) is 5, for example 9 - 4. "
            "Check f([4, 9, 6]): max is 9, min is 4, and 9 - 4 = 5. That is right."),
        solve_example="""\
```python
{program}
```
Find an input with which f returns {output}.

### Response
<think>{thought}
</think>
<answer>{input}</answer>""",
        propose=_PROPOSE.replace("{what_the_solver_does}", """\
The solver will see the function and the value that it returned, and has to find an input that gives \
this value."""),
        solve="""\
Here is a Python function and a value that it returned. Find an input with which f(...) returns this \
value. Any such input counts.

```python
{program}
```
```output
{output}
```

Give the input, as it would stand between the parentheses of the call f(...), in one fenced block:
```input
...
```""",
        tag="input", hidden="input", parse=parse_triplet, complete=complete_triplet, is_triplet=True,
        judge=lambda task, answer: [(task.program, answer, task.output)]),
    "induction": Kind(
        remarks=(
            "Full hours, less than an hour and nothing should be among them.",
            "The border 13 and both sides of it should be among them.",
            "A single price and equal prices are special.",
            "Prices on both sides of 20 are needed, and 7 is close to it.",
            "All, some and none should pass.",
            "0 shows where it starts, the others how fast it grows.",
            "Small and capital letters, short and long names.",
            "Frost at the beginning, in the middle, at the end, and none.",
            "Hours before and after midnight, and midnight itself.",
            "Too heavy a bag, an exact fit, and a bag that is left out."),
        remark="The inputs differ in what f returns.",
        thoughts=(  # it compares the pairs
            "60 gives (1, 0) and 5 gives (0, 5), so the first is how often 60 fits, and the second what is "
            "left. 135 gives (2, 15), and 135 = 2 * 60 + 15, which fits. So it is // 60 and % 60.",
            "5 gives 'child', and 13 and 40 give 'adult'. So the border is between 5 and 13. 13 itself is "
            "'adult', so it may be < 13.",
            "[1, 2] gives 1 = 2 - 1. [4, 9, 6] gives 5 = 9 - 4, the largest minus the smallest. [7] gives "
            "0 = 7 - 7, which fits."),
        propose_example="""\
```python
{program}
```
Write inputs for f, and a message that helps to find f.

### Response
<think>{remark}
</think>
<answer>
```message
{message}
```
```input
{inputs}
```
</answer>""",
        solve_example="""\
{calls}{message} Write f.

### Response
<think>{thought}
</think>
<answer>
```python
{program}
```
</answer>""",
        propose="""\
Invent one new task for a test of reasoning about code, built around the Python function `f` below. Write \
{count} inputs for it, and a message. The solver will never see the function: from the message and \
half of the pairs of input and output it has to write a function that also fits the other half.

Requirements:
- The inputs differ from each other and together show everything that the function does, also its \
special cases.
- Each input is written as it would stand between the parentheses of the call f(...), with plain \
values only: None, bool, int, float, complex, str, bytes, or tuples, lists, dicts and sets of them.
- The message describes what to look for in a way that makes the task solvable but not trivial. It \
contains no code.

Give one fenced block for each input, then one for the message:
```input
...
```
```message
...
```

The function:
```python
{program}
```

Now invent the inputs and the message.""",
        solve="""\
Write a Python function `f` that fits all examples below, and also further examples that are not \
shown. The inputs are written as they stand between the parentheses of the call f(...).

{pairs}A message from the author of the examples:
```message
{message}
```

Give the whole program in one fenced block:
```python
def f(...):
    ...
    return ...
```""",
        tag="python", hidden="outputs", parse=parse_pairs, complete=complete_pairs, own_program=False,
        judge=lambda task, answer: [(answer, *pair) for pair in split_pairs(task)[1]]),
}


# --- static measures of a program ----------------------------------------------------------------------

def within_limits(task):
    """'' if the task is short enough to be shown to a solver, else one line on the limit that it exceeds."""
    for name, limit in LIMITS.items():
        longest = max(map(len, [getattr(task, name), *getattr(task, name + "s", ())]))
        if longest > limit:
            return f"the {name} has {longest} characters, at most {limit} are allowed"
    if _anatomy(task.program).depth > NESTING_LIMIT:
        return f"the program is nested more than {NESTING_LIMIT} levels deep, or does not parse"
    return ""


Anatomy = namedtuple("Anatomy", "fingerprint depth edges")


def _entry(node):
    """A node's line in the dump of a tree: its type and fields. Empty fields are left out, because each
    version of Python adds some. A child appears as a star, and has its own line on the next level."""
    line = type(node).__name__
    for name, value in ast.iter_fields(node):
        if value or name == "value":  # that of a constant may be 0, '' or None
            items = value if isinstance(value, list) else [value]
            parts = ["*" if isinstance(item, ast.AST) else ascii(item) for item in items]
            line += f" {name}={','.join(parts)}"
    return line + "\n"


@lru_cache(maxsize=4096)
def _anatomy(program):
    """Measures of a program's syntax tree, in linear time. edges: {(node type, child type): count}.

    Docstrings and other bare constants do nothing and are left out. The walk is level by level instead of
    recursive, because model text can be nested deeply by accident. The fingerprint is a hash of the text
    itself if it is nested too deeply or does not parse.
    """
    depth, edges, lines = 0, Counter(), []
    try:
        level = [ast.parse(program)]
        while level:
            for node in level:
                if isinstance(getattr(node, "body", None), list):
                    node.body = [statement for statement in node.body if not (
                        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))]
                if isinstance(node, ast.JoinedStr):  # an f-string, in which Python 3.12 has empty texts
                    node.values = [value for value in node.values if getattr(value, "value", None) != ""]
            lines += map(_entry, level)
            pairs = [(type(node), child) for node in level for child in ast.iter_child_nodes(node)]
            edges.update((parent, type(child)) for parent, child in pairs)
            level, depth = [child for _, child in pairs], depth + 1
        text = "".join(lines) if depth <= NESTING_LIMIT else program
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        text, depth = program, NESTING_LIMIT + 1
    return Anatomy(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16], depth, edges)


def fingerprint(program):
    """A hash of the syntax tree. It ignores layout, comments and docstrings, but not names or numbers. It is
    the same in all Python versions that parse the program, so that a buffer can move between versions."""
    return _anatomy(program).fingerprint


def edit_distance(program, other):
    """How different two programs are in structure, from 0.0 (the same parts) to 1.0 (nothing shared).

    A linear-time stand-in for the tree edit distance of the paper: 1 − Dice's coefficient of the two
    multisets of (type of a node, type of a child).
    """
    ours, theirs = _anatomy(program).edges, _anatomy(other).edges
    return 1.0 - 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


# --- the buffers ------------------------------------------------------------------------------------

class TaskBuffer:
    """Valid tasks by type: references for the proposer, and problems for the solver.

    At most `capacity` tasks per type. A full buffer evicts a random task. The official code evicts the
    oldest, so that the seeds go first and the references drift with the proposer. The zero triplet is never
    evicted, so that there is always a reference and a program. `rng` (random.Random) makes all choices.
    """

    def __init__(self, capacity, rng):
        self.capacity, self.rng = capacity, rng
        self.tasks = {kind: [] for kind in KINDS}
        # fingerprints of EXAMPLES and of all programs ever accepted, including those evicted since
        self.seen = {fingerprint(task.program) for task in EXAMPLES}
        for kind in KINDS:
            if KINDS[kind].is_triplet:
                self.add(replace(ZERO_TRIPLET, type=kind))

    def add(self, task):
        bucket = self.tasks[task.type]
        self.seen.add(fingerprint(task.program))
        if len(bucket) < self.capacity:
            bucket.append(task)
        else:
            zero_triplets = int(KINDS[task.type].is_triplet)
            bucket[self.rng.randrange(zero_triplets, len(bucket))] = task

    def is_repeat(self, task):
        """Whether the task brings its own program, and one with the same syntax tree was accepted before."""
        return KINDS[task.type].own_program and fingerprint(task.program) in self.seen

    def answer_share(self, task):
        """Share of the type's tasks that have the same answer: the output, the input, or all outputs."""
        bucket, name = self.tasks[task.type], KINDS[task.type].hidden
        return sum(getattr(other, name) == getattr(task, name) for other in bucket) / max(1, len(bucket))

    def references(self, k, kind=None):
        """At most k tasks with different programs, uniform over deduction ∪ abduction, or over one type."""
        pool = self.tasks[kind] if kind else self._triplets()
        pool = list({task.program: task for task in pool}.values())
        return self.rng.sample(pool, min(k, len(pool)))

    def program(self):
        """One program for an induction task to start from, uniform over deduction ∪ abduction."""
        return self.rng.choice(self._triplets()).program

    def fill(self, kind, fresh, size):
        """`size` tasks to solve: this step's `fresh` ones first, the rest uniform from the buffer.

        A batch is never short, because a buffer with too few tasks repeats some. Only an empty buffer of the
        type gives fewer.
        """
        bucket, batch = self.tasks[kind], [task for task in fresh if task.type == kind][:size]
        taken = set(batch)
        rest = [task for task in bucket if task not in taken]
        batch += self.rng.sample(rest, min(size - len(batch), len(rest)))
        return batch + self.rng.choices(bucket, k=size - len(batch)) if bucket else batch

    def state(self):
        """Everything but `rng` as JSON-ready values, for `restore`."""
        tasks = {}
        for kind, bucket in self.tasks.items():
            tasks[kind] = [asdict(task) for task in bucket]
        return {"tasks": tasks, "seen": sorted(self.seen)}

    def restore(self, state):
        for kind, rows in state["tasks"].items():
            self.tasks[kind] = [Task.from_dict(row) for row in rows]
        self.seen = set(state["seen"])
        for tasks in (EXAMPLES, *self.tasks.values()):  # earlier versions of this code had other fingerprints
            self.seen.update(fingerprint(task.program) for task in tasks)

    def _triplets(self):
        triplets = []
        for kind, tasks in self.tasks.items():
            if KINDS[kind].is_triplet:
                triplets += tasks
        return triplets
