import json
import random
import time
from dataclasses import asdict, replace

import pytest

from rewards import is_correct
from tasks import (
    EXAMPLES,
    FRAME,
    KINDS,
    LIMITS,
    PROBLEM,
    RESPONSE,
    SHOTS,
    SOLVED,
    TASK_TYPES,
    ZERO_TRIPLET,
    Task,
    TaskBuffer,
    edit_distance,
    fenced_blocks,
    final_answer,
    fingerprint,
    parse_answer,
    parse_proposal,
    propose_prompt,
    solve_prompt,
    split_pairs,
    within_limits,
)

PROGRAM = "def f(a, b={'k': 1}):\n    return {**b, 'a': a}"
INDUCTION = Task("induction", PROGRAM, inputs=("1", "2", "3", "4"), outputs=("A", "B", "C", "D"),
                 message="look {program} \\1 here")


def program(n):
    return f"def f(x):\n    return x + {n}"


def say(answer, thought="hm"):
    return f" {thought}</think>\n<answer>\n{answer}\n</answer>"


# --- prompts

@pytest.mark.parametrize("kind", TASK_TYPES)
def test_solver_is_shown_all_but_what_it_must_find(kind):
    task = replace(INDUCTION, type=kind, input="'in put'", output="'out put'")
    prompt = solve_prompt(task)
    sees = {"deduction": (PROGRAM, "'in put'"), "abduction": (PROGRAM, "'out put'"),
            "induction": (task.message, "```input\n1\n```\n```output\nA\n```", "```input\n2\n```")}
    hidden = {"deduction": ("'out put'",), "abduction": ("'in put'",), "induction": (PROGRAM, "\nC\n", "\nD\n", "\n3\n")}
    assert all(text in prompt for text in sees[kind])
    assert not any(text in prompt for text in hidden[kind])


def test_contents_with_braces_and_backslashes_are_inserted_as_they_are():
    nasty = Task("deduction", "def f(x):\n    return '{input} {pairs} \\g<0> {{}}'", "'{program}'", "''")
    prompt = solve_prompt(nasty)
    assert nasty.program in prompt and nasty.input in prompt


def test_proposer_sees_references_and_the_limit_that_is_enforced():
    prompt = propose_prompt("deduction", [ZERO_TRIPLET, INDUCTION])
    assert prompt.count("Reference task:") == 2 and ZERO_TRIPLET.program in prompt
    assert "Reference task:" not in propose_prompt("abduction")
    assert f"at most {LIMITS['output']} characters" in prompt
    assert "7 inputs" in propose_prompt("induction", program=PROGRAM, count=7)
    assert PROGRAM in propose_prompt("induction", program=PROGRAM)
    assert propose_prompt("deduction") != propose_prompt("abduction")


def test_no_placeholder_is_left_in_any_prompt():
    for kind in TASK_TYPES:
        for prompt in (propose_prompt(kind, [ZERO_TRIPLET], "P", 5), solve_prompt(replace(INDUCTION, type=kind, message="m", program="P"))):
            assert not any("{" + name + "}" in prompt for name in ("program", "input", "output", "pairs", "message", "references", "count", "what_the_solver_does"))


# --- the frame of worked examples

def responses(prompt):
    """The earlier responses of a prompt, and its question."""
    *earlier, question = (FRAME.replace("{question}", prompt).removesuffix(RESPONSE)).split(PROBLEM)[1:]
    return [text.partition(RESPONSE)[2] for text in earlier], question


def shots(kind):
    return SHOTS if KINDS[kind].own_program else len(EXAMPLES)


@pytest.mark.parametrize("frame", ["examples", "brief"])
@pytest.mark.parametrize("kind", TASK_TYPES)
def test_examples_are_right_in_every_part(kind, frame, executor):
    entry, examples = KINDS[kind], [replace(task, type=kind) for task in EXAMPLES]
    for example in examples:
        done = entry.complete(example, executor.validate(entry.runs(example)))
        assert (done.output, done.outputs) == (example.output, example.outputs) and not within_limits(done)
    said, _ = responses(propose_prompt(kind, program=PROGRAM, frame=frame))
    assert len(said) == shots(kind)
    given = [parse_proposal(kind, text, example.program) for text, example in zip(said, examples)]
    assert [(task.program, task.input or task.inputs) for task in given] == [
        (task.program, task.input if entry.own_program else task.inputs) for task in examples[:shots(kind)]]
    said, _ = responses(solve_prompt(replace(INDUCTION, type=kind), frame))
    solved = [replace(task, type=kind) for task in SOLVED]
    assert is_correct(solved, [parse_answer(kind, text) for text in said], executor) == [True] * len(SOLVED)
    assert len(entry.remarks) == len(EXAMPLES) and len(entry.thoughts) == len(SOLVED)


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_thoughts_are_brief_in_the_brief_frame(kind):
    task = replace(INDUCTION, type=kind, input="1", output="2")
    for frame, brief in (("examples", False), ("brief", True)):
        said, _ = responses(propose_prompt(kind, [task], PROGRAM, frame=frame))
        assert {text.partition("</think>")[0] == "New." for text in said} == {brief}
        said, _ = responses(solve_prompt(task, frame))
        assert (said[1].partition("</think>")[0] == "f(13) is 'adult', as 13 < 13 is false.") is brief


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_references_are_earlier_responses_and_replace_the_examples(kind):
    task = replace(INDUCTION, type=kind, input="'in put'", output="'out put'")
    for count in range(len(EXAMPLES) + 2):
        said, question = responses(propose_prompt(kind, [task] * count, PROGRAM, frame="examples"))
        assert len(said) == max(shots(kind), count)
        assert [task.message in text or task.input in text for text in said].count(True) == count
        assert "{" not in question.replace(PROGRAM, "")
    said, _ = responses(propose_prompt(kind, [ZERO_TRIPLET], PROGRAM, frame="examples"))
    assert len(said) == shots(kind) and not any("Hello" in text for text in said)  # the identity shows nothing


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_solver_of_examples_is_shown_all_but_what_it_must_find(kind):
    task = replace(INDUCTION, type=kind, input="'in put'", output="'out put'")
    _, question = responses(solve_prompt(task, "examples"))
    shown = {"deduction": (PROGRAM, "'in put'"), "abduction": (PROGRAM, "'out put'"), "induction": ("f(2)", "B", task.message)}
    hidden = {"deduction": ["'out put'"], "abduction": ["'in put'"], "induction": [PROGRAM, "f(3)", "C"]}
    assert all(text in question for text in shown[kind]) and not any(text in question for text in hidden[kind])


def test_a_type_without_examples_has_its_long_question_in_both_frames(monkeypatch):
    monkeypatch.setitem(KINDS, "induction", replace(KINDS["induction"], propose_example="", solve_example=""))
    assert solve_prompt(INDUCTION, "examples") == solve_prompt(INDUCTION) != ""
    assert propose_prompt("induction", (), PROGRAM, 5, "examples") == propose_prompt("induction", (), PROGRAM, 5)


def test_a_copy_of_an_example_is_no_new_task():
    buffer = TaskBuffer(10, random.Random(0))
    assert all(map(buffer.is_repeat, EXAMPLES)) and not buffer.is_repeat(Task("deduction", program(1), "5", "6"))


# --- parsing

@pytest.mark.parametrize("response, answer", [
    ("think</think><answer>4</answer>", "4"),
    ("think</think>\n\n <answer>\n4\n</answer>\n", "4"),
    ("</think><answer></answer>", ""),
    ("think <answer>4</answer>", None),                      # the thought never ended
    ("think</think><answer>4", None),                        # cut off
    ("think</think>4", None),
    ("think</think> so <answer>4</answer>", None),           # talks outside
    ("think</think><answer>4</answer> there", None),
    ("think</think><answer>4</answer><answer>5</answer>", None),
    ("think</think><answer><answer>4</answer></answer>", None),
    ("think</think><answer>", None),
    ("think</think></answer><answer>", None),
    ("think</think><answer>4</think><answer>5</answer>", None),
    ("", None),
])
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_fenced_blocks_by_tag():
    text = "```python\na = 1\n```\ntext\n```input\n1\n```\n  ```input  \n2\n\n```\n```\n3\n```"
    assert fenced_blocks(text, "python") == ["a = 1"]
    assert fenced_blocks(text, "input") == ["1", "2"]
    assert fenced_blocks("```input\n1", "input") == []       # never closed
    assert fenced_blocks("```inputs\n1\n```", "input") == []


def test_a_long_response_of_fences_is_parsed_in_linear_time():
    started = time.perf_counter()
    assert fenced_blocks("```input\n" * 20000, "input") == []
    assert time.perf_counter() - started < 1  # quadratic, it took 20 seconds


def test_proposals():
    good = f"```python\n{PROGRAM}\n```\n```input\n 3, b={{}} \n```"
    assert parse_proposal("deduction", say(good)) == Task("deduction", PROGRAM, "3, b={}")
    for bad in (f"```python\n{PROGRAM}\n```", "```input\n3\n```", good + "\n```input\n4\n```", good + good, "```python\n\n```\n```input\n3\n```"):
        assert parse_proposal("abduction", say(bad)) is None
    assert parse_proposal("deduction", good) is None         # right blocks, no tags


def test_induction_proposals_keep_different_inputs_up_to_the_count():
    blocks = "".join(f"```input\n{i}\n```\n" for i in (1, 2, 2, 3, 4)) + "```message\n add one \n```"
    task = parse_proposal("induction", say(blocks), PROGRAM, count=3)
    assert task == Task("induction", PROGRAM, inputs=("1", "2", "3"), message="add one")
    lines = say("```input\n1, [2]\n 3 \n1, [2]\n```\n```message\nm\n```")
    assert parse_proposal("induction", lines, PROGRAM).inputs == ("1, [2]", "3")  # a single block: line by line
    assert parse_proposal("induction", say("```input\n1\n```\n```input\n1\n```\n```message\nm\n```"), PROGRAM) is None
    assert parse_proposal("induction", say("```input\n1\n```\n```input\n2\n```"), PROGRAM) is None


def test_answers():
    assert parse_answer("deduction", say("```output\n[1]\n```")) == "[1]"
    assert parse_answer("deduction", say("```output\n1\n```\n```output\n2\n```")) == "2"
    assert parse_answer("deduction", say("[1]")) == "[1]"    # a bare value says the same
    assert parse_answer("deduction", say("```input\n1\n```")) is None
    assert parse_answer("deduction", say("")) is None
    assert parse_answer("induction", say(f"```python\n{PROGRAM}\n```")) == PROGRAM
    assert parse_answer("induction", "no tags") is None


def test_split_pairs_hides_half():
    assert split_pairs(INDUCTION) == ([("1", "A"), ("2", "B")], [("3", "C"), ("4", "D")])
    one = replace(INDUCTION, inputs=("1",), outputs=("A",))
    assert split_pairs(one) == ([("1", "A")], [])            # nothing hidden: invalid, not free
    for n in range(2, 12):
        shown, hidden = split_pairs(replace(INDUCTION, inputs=("1",) * n, outputs=("1",) * n))
        assert len(shown) + len(hidden) == n and 0 <= len(shown) - len(hidden) <= 1


def test_limits_reject_and_say_what():
    task = Task("deduction", "p", "1", "x" * LIMITS["output"])
    assert within_limits(task) == ""
    assert "output has 401" in within_limits(replace(task, output="x" * 401))
    assert "output" in within_limits(replace(INDUCTION, outputs=("x" * 401,)))
    for name in ("program", "input", "message"):
        assert name in within_limits(replace(task, **{name: "x" * 5000}))


def test_tasks_survive_json():
    for task in (ZERO_TRIPLET, INDUCTION):
        assert Task.from_dict(json.loads(json.dumps(asdict(task)))) == task


# --- syntax trees

def test_fingerprint_sees_structure_only():
    base = fingerprint("def f(x):\n    return x + 1")
    assert base == fingerprint("def f( x ):\n    # comment\n    return (x+1)")
    assert base == fingerprint('def f(x):\n    """doc"""\n    0\n    return x + 1')
    assert base != fingerprint("def f(x):\n    return x + 2")
    assert base != fingerprint("def f(y):\n    return y + 1")


KNOWN = {                       # written under Python 3.11; each later version has added fields to the tree
    "def f(x):\n    return x + 1": "f5c19f81edec82fa",
    "def f(a, *b, c=None, **d) -> int:\n    \"doc\"\n    return f\"{a!r:>{c}}\" + \"\u00e9\" * 2 if b else {**d, 1: 0, 2: False, 3: \"\"}":
        "f04bc08da4ffd40c",
    "class A(object):\n    x: int = 0\n\nasync def g():\n    async with a as b, c:\n        yield 0j\n\ndef f(x):\n    match x:\n"
    "        case [1, *_] | {\"a\": None}:\n            return lambda: (yield)\n        case None | False:\n            global y\n"
    "            from . import z\n            return [i async for i in x if i]": "020cb9048a2eb998",
}


@pytest.mark.parametrize("program", KNOWN)
def test_fingerprints_are_the_same_under_every_version_of_python(program):
    assert fingerprint(program) == KNOWN[program]


def test_fingerprints_tell_constants_and_fields_apart():
    """What is empty is left out of them, and these differ in something that is empty, or looks alike."""
    values = ["0", "0.0", "0j", "False", "None", "''", "b''", "1", "True", "1.0", "'1'", "...", "()", "[]", "{}", "f''", "u''", "'x=0'"]
    programs = [f"def f(x):\n    return {value}" for value in values] + [
        "def f(x):\n    return", "def f(x):\n    yield", "def f(x):\n    yield None", "def f(*x):\n    return", "def f(**x):\n    return",
        "def f(x, /):\n    return", "def f(*, x):\n    return", "def f(x=None):\n    return", "def f(*, x=None):\n    return",
        "async def f(x):\n    return", "from a import x", "from .a import x", "from . import x", "import x", "import x as a", "global x",
        "x: a", "(x): a", "x: a = None", "{**x}", "{x: x}", "{x}", "[x for x in x]", "[x for x in x if x]",
        "match x:\n    case None: a", "match x:\n    case False: a", "match x:\n    case 0: a", "match x:\n    case _: a", "match x:\n    case a: a"]
    assert len({fingerprint(program) for program in programs}) == len(programs)


def test_a_restored_buffer_knows_its_programs_whoever_wrote_it():
    """Earlier versions of this code had fingerprints that were others under each version of Python."""
    buffer = TaskBuffer(5, random.Random(3))
    for n in range(3):
        buffer.add(Task("deduction", program(n), "1", "1"))
    state = json.loads(json.dumps(buffer.state())) | {"seen": ["0123456789abcdef"]}
    twin = TaskBuffer(5, random.Random(0))
    twin.restore(state)
    assert twin.seen == buffer.seen | {"0123456789abcdef"}
    assert all(twin.is_repeat(Task("abduction", program(n) + "  # again", "2")) for n in range(3))
    assert not twin.is_repeat(Task("abduction", program(4), "2"))


@pytest.mark.parametrize("inputs", [("5", "5, 2"), ("5", "5, y=2"), ("5, 2", "y=2, x=5"), ("5", "x=int('5')")])
@pytest.mark.parametrize("head", ["from functools import lru_cache\n@lru_cache\ndef f(x, y=2):\n    return x ** y",
                                  "from functools import wraps\ndef w(g):\n    @wraps(g)\n    def h(*a, **k):\n        return g(*a, **k)\n    return h\n"
                                  "@w\ndef f(x, y=2):\n    return x ** y"])
def test_an_induction_task_does_not_hide_a_call_that_it_shows(executor, head, inputs):
    task = Task("induction", head, inputs=inputs, message="m")
    assert KINDS["induction"].complete(task, executor.run(KINDS["induction"].runs(task))) is None
    more = replace(task, inputs=(*inputs, "3"))
    assert KINDS["induction"].complete(more, executor.run(KINDS["induction"].runs(more))).inputs == (inputs[0], "3")


def test_edit_distance_orders_programs_as_a_person_would():
    base = "def f(x):\n    return x + 1"
    assert edit_distance(base, base) == 0
    near, far = "def f(x):\n    return x + y", "def f(x):\n    s = []\n    for a in x:\n        if a > 2:\n            s.append(a)\n    return s"
    assert 0 < edit_distance(base, near) < edit_distance(base, far) <= 1


# --- the buffer

def test_answer_share_is_of_the_type_and_its_answer():
    buffer = TaskBuffer(10, random.Random(0))  # with the zero triplet
    task = Task("deduction", program(1), "5", "6")
    assert buffer.answer_share(task) == 0.0
    buffer.add(replace(task, program=program(2), input="7"))
    assert buffer.answer_share(task) == 0.5 and buffer.answer_share(replace(task, output="9")) == 0.0
    assert buffer.answer_share(replace(task, type="abduction")) == 0.0
    assert buffer.answer_share(Task("induction", program(1), outputs=("1", "2"))) == 0.0


def test_buffer_starts_with_the_identity_and_keeps_it_when_full():
    buffer = TaskBuffer(4, random.Random(0))
    for n in range(200):
        buffer.add(Task("deduction", program(n), "1", "1"))
    kept = buffer.tasks["deduction"]
    assert len(kept) == 4 and kept[0].program == ZERO_TRIPLET.program
    assert buffer.tasks["abduction"] == [replace(ZERO_TRIPLET, type="abduction")]
    assert all(buffer.is_repeat(Task("deduction", program(n))) for n in range(200))
    assert not buffer.is_repeat(Task("deduction", program(200)))


def test_eviction_is_random_not_oldest_first():
    survivors = set()
    for seed in range(40):
        buffer = TaskBuffer(10, random.Random(seed))
        for n in range(30):
            buffer.add(Task("induction", program(n), inputs=("1", "2"), outputs=("1", "2")))
        survivors |= {task.program for task in buffer.tasks["induction"]}
    assert program(0) in survivors and program(29) in survivors


def test_references_are_different_and_from_both_buffers():
    buffer = TaskBuffer(100, random.Random(0))
    for n in range(5):
        buffer.add(Task("deduction", program(n), "1", "1"))
        buffer.add(Task("abduction", program(n), "1", "1"))
        buffer.add(Task("abduction", program(100 + n), "1", "1"))
    seen = set()
    for _ in range(100):
        chosen = buffer.references(6)
        assert len({task.program for task in chosen}) == 6
        seen |= {task.program for task in chosen}
    assert seen == {program(n) for n in (0, 1, 2, 3, 4, 100, 101, 102, 103, 104)} | {ZERO_TRIPLET.program}
    buffer.add(Task("deduction", program(7), "1", "1"))  # a task that came later is drawn as well
    assert program(7) in {task.program for _ in range(50) for task in buffer.references(6)}
    assert buffer.references(0) == [] and len(TaskBuffer(9, random.Random(0)).references(6)) == 1


def test_given_programs_are_those_of_both_triplet_buffers_and_references_those_of_a_kind():
    buffer = TaskBuffer(100, random.Random(0))
    for n in range(3):
        buffer.add(Task("deduction", program(n), "1", "1"))
        buffer.add(Task("abduction", program(9 + n), "1", "1"))
    buffer.add(replace(INDUCTION, program=program(50)))
    assert {buffer.program() for _ in range(200)} == {ZERO_TRIPLET.program, *map(program, (0, 1, 2, 9, 10, 11))}
    assert buffer.references(9, "induction") == [replace(INDUCTION, program=program(50))]


def test_fill_draws_the_rest_from_the_whole_buffer():
    buffer = TaskBuffer(100, random.Random(0))
    for n in range(6):
        buffer.add(Task("induction", program(n)))
    assert {task for _ in range(100) for task in buffer.fill("induction", [], 2)} == set(buffer.tasks["induction"])


def test_fill_puts_new_tasks_first_and_is_never_short():
    buffer = TaskBuffer(100, random.Random(0))
    old = [Task("deduction", program(n), "1", "1") for n in range(5)]
    new = [Task("deduction", program(n), "1", "1") for n in range(50, 53)]
    for task in old + new:
        buffer.add(task)
    batch = buffer.fill("deduction", new, 6)
    assert batch[:3] == new and len(set(batch)) == 6
    assert len(buffer.fill("deduction", new, 30)) == 30      # more than there are: some twice
    assert buffer.fill("deduction", new, 2) == new[:2]
    assert buffer.fill("induction", [], 4) == []


def test_buffer_state_restores_tasks_choices_and_memory():
    buffer = TaskBuffer(5, random.Random(3))
    for n in range(9):
        buffer.add(Task("deduction", program(n), "1", "1"))
    state = json.loads(json.dumps(buffer.state()))
    twin = TaskBuffer(5, random.Random(0))
    twin.restore(state)
    twin.rng.setstate(buffer.rng.getstate())
    assert twin.tasks == buffer.tasks and twin.seen == buffer.seen
    assert [twin.references(3) for _ in range(5)] == [buffer.references(3) for _ in range(5)]


HOSTILE = ["-" * 2920 + "x", "(" * 90 + ")" * 90, "[" * 3000, "x." * 1400 + "x", "lambda:" * 400 + "0", "not " * 700 + "1",
           "f(" * 190 + ")" * 190, "x if x else " * 240 + "x", "\0", "\ud800", "def f(x", "if x:\n" * 99, "a+" * 1499 + "a"]


@pytest.mark.parametrize("program", HOSTILE)
def test_no_program_raises_however_deep_the_caller_stands(program):
    def below(frames):
        if frames:
            return below(frames - 1)
        return within_limits(Task("deduction", program)), fingerprint(program)

    problem, mark = below(600)
    assert isinstance(problem, str) and len(mark) == 16
    assert 0.0 <= edit_distance(program, PROGRAM) <= 1.0 and edit_distance(program, program) in (0.0, 1.0)


@pytest.mark.parametrize("programs", [("x;" * 1480, "x;~x;" * 590), ("a+" * 1499 + "a", "[x]\n" * 750)])
def test_all_measures_of_two_programs_at_the_limit_take_under_50_ms(programs):
    import tasks as module
    spent = []
    for _ in range(5):
        module._anatomy.cache_clear()
        start = time.process_time()
        edit_distance(*programs)
        for text in programs:
            within_limits(Task("deduction", text)), fingerprint(text)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.05
