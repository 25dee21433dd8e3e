"""The three task types of the Absolute Zero Reasoner: what the model is asked, and what it answered.

A task is made of a program p (a Python function `f`), an input i and the output o = p(i). The three
types hide one of the three (paper, section 3):

    deduction   given p and i, find o          deduction  = running code in the head
    abduction   given p and o, find some i     abduction  = searching backwards
    induction   given pairs (i, o), find p     induction  = writing the program

This module knows prompts, parsing, `Task` and `TaskBuffer`. It runs no program and imports only the
standard library; `executor.py` runs programs, `rewards.py` judges answers. All texts that a model
reads are in PROMPTS below, and the three types share one path: a fourth type is a fourth entry.
"""

import ast
import difflib
import hashlib
import re
from dataclasses import asdict, dataclass, replace

TASK_TYPES = ("deduction", "abduction", "induction")
ROLES = ("propose", "solve")

OUTPUT_LIMIT = 400    # characters of an output; longer ones make the task invalid, they are never cut
INPUT_LIMIT = 400     # characters of an input
PROGRAM_LIMIT = 3000  # characters of a program
MESSAGE_LIMIT = 1000  # characters of an induction message
NESTING_LIMIT = 100   # levels of a program's syntax tree: `ast` recurses over it here, in the trainer


class UsageError(ValueError):
    """Something the user can put right; the command lines print it as one line and exit with 2."""


@dataclass(frozen=True)
class Task:
    """One problem. Deduction and abduction use input/output, induction inputs/outputs and message.

    `input` is what stands between the parentheses of a call f(…); `output` is a Python literal.
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


# The one task that exists before the model has said anything: the identity, as in the paper.
ZERO_TRIPLET = Task("deduction", "def f(x):\n    return x", "'Hello World'", "'Hello World'")


def split_pairs(task):
    """Induction: (shown pairs, hidden pairs), half and half in the order proposed.

    Pairs are (input, output) texts. An odd pair is shown, so that a single pair leaves nothing
    hidden, and such a task is invalid: it could be solved by copying.
    """
    pairs = list(zip(task.inputs, task.outputs))
    half = (len(pairs) + 1) // 2
    return pairs[:half], pairs[half:]


# --- what the model reads -----------------------------------------------------------------------

# For base models; models with a chat template get the same two passages as one user turn instead.
INSTRUCTION = """\
Below is a problem about Python programs. Reason about it step by step between <think> and </think>. \
Then write the final answer between <answer> and </answer>, in the format that the problem asks for, \
and stop."""
FRAME = INSTRUCTION + "\n\n### Problem\n{question}\n\n### Response\n<think>"
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

_REFERENCE = "Reference task:\n```python\n{program}\n```\n```input\n{input}\n```\n```output\n{output}\n```\n\n"

PROMPTS = {
    ("propose", "deduction"): _PROPOSE.replace("{what_the_solver_does}", """\
The solver will see the function and the input, and has to predict what the function returns."""),
    ("propose", "abduction"): _PROPOSE.replace("{what_the_solver_does}", """\
The solver will see the function and the value that it returned, and has to find an input that gives \
this value."""),
    ("propose", "induction"): """\
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
    ("solve", "deduction"): """\
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
    ("solve", "abduction"): """\
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
    ("solve", "induction"): """\
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
}

_PAIR = "Example:\n```input\n{input}\n```\n```output\n{output}\n```\n\n"


def propose_prompt(type, references=(), program="", count=10):
    """The proposer's question: K references for deduction and abduction, one program for induction."""
    fields = {"references": "".join(_fill(_REFERENCE, asdict(task)) for task in references),
              "program": program, "count": str(count)}
    return _fill(PROMPTS["propose", type], fields)


def solve_prompt(task):
    """The solver's question. Of an induction task it shows the message and the shown half only."""
    shown, _ = split_pairs(task)
    pairs = "".join(_fill(_PAIR, {"input": i, "output": o}) for i, o in shown)
    return _fill(PROMPTS["solve", task.type], asdict(task) | {"pairs": pairs})


def _fill(template, fields):
    # not str.format: the templates hold Python code, whose braces would have to be doubled
    return re.sub(r"\{([a-z]+)\}", lambda match: fields[match[1]], template)


# --- what the model wrote -------------------------------------------------------------------------

def final_answer(response):
    """The text between <answer> and </answer>, or None if the response is not well formed.

    Well formed: a thought, `</think>`, then one answer and nothing behind it. The opening
    `<think>` is part of the prompt.

    >>> final_answer("2 + 2 = 4</think> <answer>4</answer>")
    '4'
    """
    _, closed, rest = response.partition("</think>")
    rest = rest.strip()
    inner = rest[len("<answer>"):-len("</answer>")]
    if not (closed and rest.startswith("<answer>") and rest.endswith("</answer>")
            and len(rest) >= len("<answer></answer>") and "answer>" not in inner):
        return None
    return inner.strip()


def fenced_blocks(text, tag):
    """The contents of all fenced blocks of `text` that are tagged `tag`, in order."""
    blocks = re.findall(rf"^[ \t]*```{tag}[ \t]*\n(.*?)^[ \t]*```[ \t]*$", text, re.M | re.S)
    return [block.strip("\n").rstrip() for block in blocks]


def parse_proposal(type, response, program="", count=10):
    """A proposer's response → the proposed Task, not yet run (no outputs), or None if malformed.

    Deduction and abduction need one `python` and one `input` block; induction keeps the given
    `program` and needs two to `count` different `input` blocks and a `message`. More inputs than
    `count` are ignored.
    """
    answer = final_answer(response)
    if answer is None:
        return None
    inputs, messages = fenced_blocks(answer, "input"), fenced_blocks(answer, "message")
    inputs = [text.strip() for text in inputs]
    if type == "induction":
        distinct = tuple(dict.fromkeys(inputs))[:count]
        if len(distinct) < 2 or len(messages) != 1 or not messages[0].strip():
            return None
        return Task(type, program, inputs=distinct, message=messages[0].strip())
    programs = fenced_blocks(answer, "python")
    if len(programs) != 1 or len(inputs) != 1 or not programs[0].strip():
        return None
    return Task(type, programs[0], input=inputs[0])


ANSWER_TAG = {"deduction": "output", "abduction": "input", "induction": "python"}


def parse_answer(type, response):
    """A solver's response → the text of its answer, or None if malformed.

    The answer is the last block with the type's tag. An answer without any fence is taken whole:
    base models often write the bare value, which says the same (the paper's code does so too).
    """
    answer = final_answer(response)
    if answer is None:
        return None
    blocks = fenced_blocks(answer, ANSWER_TAG[type])
    if blocks:
        return blocks[-1]
    return answer if answer and "```" not in answer else None


def within_limits(task):
    """'' if the task is short enough to be shown to a solver, else one line that says what is not."""
    for name, texts, limit in (("program", [task.program], PROGRAM_LIMIT),
                               ("input", [task.input, *task.inputs], INPUT_LIMIT),
                               ("output", [task.output, *task.outputs], OUTPUT_LIMIT),
                               ("message", [task.message], MESSAGE_LIMIT)):
        longest = max(map(len, texts))
        if longest > limit:
            return f"the {name} has {longest} characters, at most {limit} are allowed"
    if _depth(task.program) > NESTING_LIMIT:
        return f"the program is nested more than {NESTING_LIMIT} levels deep"
    return ""


def _depth(program):
    level, depth = [ast.parse(program)], 0  # level by level, since a recursion is what must be avoided
    while level:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return depth


# --- what programs have in common -----------------------------------------------------------------

def _nodes(program):
    """The syntax tree's nodes, without docstrings and other bare constants, which do nothing."""
    # only programs that the sandbox has parsed and run come here, so the parse itself is harmless
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))]
    return tree


def fingerprint(program):
    """A hash of the syntax tree: blind to layout, comments and docstrings, not to names or numbers."""
    return hashlib.sha256(ast.dump(_nodes(program)).encode()).hexdigest()[:16]


def edit_distance(program, other):
    """How different two programs are in structure: 0.0 same sequence of node types … 1.0 nothing shared.

    A cheap stand-in for the tree edit distance of the paper: the sequences of node
    types in tree order are compared as strings would be.
    """
    ours, theirs = ([type(node).__name__ for node in ast.walk(_nodes(p))] for p in (program, other))
    return 1.0 - difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


def complexity(program):
    """Cyclomatic complexity, after McCabe: 1 + the number of places where the program can branch.

    >>> complexity("def f(xs):\\n    return [x for x in xs if x or not xs]")
    4
    """
    branches = 0
    for node in ast.walk(ast.parse(program)):
        branches += isinstance(node, (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case))
        branches += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
        branches += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
    return 1 + branches


def shortened(program):
    """The program without one of the top-level assignments or expressions of `f`, for each of them in turn.

    Branches and loops stay: one that this input does not take is no padding. So do docstrings, which do nothing by
    intention.
    """
    found = []
    for position in range(sum(map(len, _bodies(ast.parse(program))))):
        tree = ast.parse(program)
        for body in _bodies(tree):
            if position < len(body):
                statement = body.pop(position)
                idle = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                if body and not idle and isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)):
                    found.append(ast.unparse(tree))
                break
            position -= len(body)
    return found


def _bodies(tree):
    return [node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "f"]


# --- the buffers ------------------------------------------------------------------------------------

class TaskBuffer:
    """All tasks that were proposed and found valid, by type: the proposer's examples, the solver's food.

    At most `capacity` tasks a type. A full buffer throws out a random task (the official code: the
    oldest, so the seeds go first and the references drift with the proposer). The zero triplet stays,
    so that there always is a reference and a program, and so do the seeds once `protect` was called, in at
    most half of the places.
    `rng` (random.Random) makes all choices.
    """

    def __init__(self, capacity, rng):
        self.capacity, self.rng = capacity, rng
        self.tasks = {type: [] for type in TASK_TYPES}
        self.pool = None  # what `references` draws from, until the next task
        self.kept = dict.fromkeys(TASK_TYPES, 0)  # the first so many tasks of a type are never thrown out
        self.seen = set()  # fingerprints of all programs ever accepted, also of those thrown out since
        for type in ("deduction", "abduction"):
            self.add(replace(ZERO_TRIPLET, type=type))
            self.kept[type] = 1

    def protect(self):
        """From now on keep all tasks that are there, but at most half of the capacity."""
        for type, bucket in self.tasks.items():
            self.kept[type] = max(self.kept[type], min(len(bucket), self.capacity // 2))

    def add(self, task):
        bucket = self.tasks[task.type]
        self.pool = None
        self.seen.add(fingerprint(task.program))
        if len(bucket) < self.capacity:
            bucket.append(task)
        else:
            bucket[self.rng.randrange(self.kept[task.type], len(bucket))] = task

    def is_repeat(self, program):
        """Whether a program with the same syntax tree was accepted before."""
        return fingerprint(program) in self.seen

    def answer_share(self, task):
        """Share of the type's tasks that have the same answer: the output, the input, or all outputs."""
        answer = {"deduction": "output", "abduction": "input", "induction": "outputs"}[task.type]
        bucket = self.tasks[task.type]
        return sum(getattr(other, answer) == getattr(task, answer) for other in bucket) / max(1, len(bucket))

    def references(self, k):
        """At most k different tasks, uniform over deduction ∪ abduction."""
        self.pool = self.pool or list({task.program: task for task in self._programs()}.values())
        return self.rng.sample(self.pool, min(k, len(self.pool)))

    def program(self):
        """One program, uniform over deduction ∪ abduction: what an induction task starts from."""
        return self.rng.choice(self._programs()).program

    def fill(self, type, fresh, size):
        """`size` tasks to solve: this step's `fresh` ones first, the rest uniform from the buffer.

        So a batch is never short; a buffer with too few tasks repeats some.
        Only an empty buffer of the type gives fewer.
        """
        fresh = list(fresh)[:size]
        taken = set(fresh)
        rest = [task for task in self.tasks[type] if task not in taken]
        missing = size - len(fresh)
        if missing <= len(rest):
            return fresh + self.rng.sample(rest, missing)
        pool = self.tasks[type]
        return fresh + rest + [self.rng.choice(pool) for _ in range(missing - len(rest)) if pool]

    def state(self):
        """Everything but `rng` as JSON-ready values; `restore` takes it back."""
        return {"tasks": {type: [asdict(t) for t in ts] for type, ts in self.tasks.items()},
                "kept": self.kept, "seen": sorted(self.seen)}

    def restore(self, state):
        self.tasks = {type: [Task.from_dict(t) for t in ts] for type, ts in state["tasks"].items()}
        self.kept, self.seen, self.pool = dict(state["kept"]), set(state["seen"]), None

    def _programs(self):
        return self.tasks["deduction"] + self.tasks["abduction"]
