"""Inputs and outputs of given programs: CRUXEval, LiveCodeBench's execution set, our own held-out tasks.

They are judged as in training: literals need equal types, and any input that gives the output is correct.
"""

import re
from collections import namedtuple

from rewards import is_correct
from tasks import KINDS, Task, parse_answer, solve_prompt

from .text import answer_text, pieces

# An answer in the form of a call, f(input) == output
CALLS = {"abduction": r"\A(?:assert\s+)?f\((.*?)\)\s*(?:==.*)?\Z",
         "deduction": r"\A(?:assert\s+)?f\(.*?\)\s*==\s*(.*)\Z"}


class ValueProblem(namedtuple("ValueProblem", "key question task strict", defaults=[False])):
    """A task of one of the three types. strict: only an answer in the form of training counts."""

    batch = 256  # problems that are judged together

    def answer_in(self, response):
        """The literal, input or program in a response, in the form of training or (not strict) another."""
        if self.strict:
            return parse_answer(self.task.type, response)
        text = answer_text(response)
        found = pieces(text)
        blocks = [piece for tag, piece in found if tag == KINDS[self.task.type].tag] or [
            piece for _, piece in found[1::2]]
        if not found[1:] and ("\n" not in text or re.search(r"<answer>|\[ANSWER\]", response)):
            blocks = [text]
        answer = next(filter(None, blocks[::-1]), "")
        return re.sub(CALLS[self.task.type], r"\1", answer.strip("` \n"), flags=re.S) or None

    @staticmethod
    def judge(problems, answers, executor):
        """[ValueProblem], [answer or None] → one {"correct"} for each, in order."""
        return [{"correct": correct} for correct in is_correct(
            [problem.task for problem in problems], answers, executor)]


def read_heldout(key, task):
    """A Task of ours → ValueProblem"""
    return ValueProblem(key, solve_prompt(task), task, strict=True)


def read_execution(task_type, key, row):
    """CRUXEval has code, input and output. LiveCodeBench's execution set calls its function by name."""
    code, argument, name = row["code"], row["input"], row.get("function_name", "f")
    if name != "f":
        code, argument = f"{code}\n\n\nf = {name}", argument.strip().removeprefix(name).strip()[1:-1]
    task = Task(task_type, code, "" if task_type == "abduction" else argument, row["output"])
    return ValueProblem(key, solve_prompt(task), task)
