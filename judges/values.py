"""Inputs and outputs of given programs: CRUXEval, LiveCodeBench's execution set, our own held-out tasks.

They are judged as in training: literals of equal types, and for an input any that gives the output.
"""

import re
from dataclasses import dataclass

from rewards import is_correct
from tasks import KINDS, Task, fenced_blocks, parse_answer, solve_prompt

from .text import answer_text


@dataclass(frozen=True)
class ValueProblem:
    """A task of one of the three types. strict: only an answer in the form of training counts."""

    key: str
    question: str
    task: Task
    strict: bool = False
    batch = 256  # problems that are judged together

    def answer_in(self, response):
        """The literal, input or program in a response, in the form of training or (not strict) another."""
        answer, text = parse_answer(self.task.type, response), answer_text(response)
        if self.strict:
            return answer
        if answer is None:
            blocks = (fenced_blocks(text, KINDS[self.task.type].tag) or fenced_blocks(text, r"\w*")
                      or re.findall(r"\[ANSWER\](.*?)\[/ANSWER\]", text, re.S))
            answer = blocks[-1].strip() if blocks else text.strip("` ") if text and "\n" not in text else None
        call = re.fullmatch(r"(?:assert\s+)?f\((.*?)\)\s*(?:==\s*(.*))?", answer or "", re.S)
        said = call and call[1 if self.task.type == "abduction" else 2]  # f(input) == output
        return answer if said is None else said

    @staticmethod
    def judge(problems, answers, executor):
        """[ValueProblem], [answer or None] → one {"correct"} for each, in order."""
        return [{"correct": correct} for correct in is_correct([p.task for p in problems], answers, executor)]


def read_heldout(key, task):
    """A Task of ours → ValueProblem"""
    return ValueProblem(key, solve_prompt(task), task, strict=True)


def read_execution(task_type, key, row):
    """CRUXEval has code, input and output; LiveCodeBench's execution set calls its function by name."""
    code, argument, name = row["code"], row["input"], row.get("function_name", "f")
    if name != "f":
        code, argument = f"{code}\n\n\nf = {name}", argument.strip().removeprefix(name).strip()[1:-1]
    task = Task(task_type, code, "" if task_type == "abduction" else argument, row["output"])
    return ValueProblem(key, solve_prompt(task), task)
