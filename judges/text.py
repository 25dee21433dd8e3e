"""Thoughts, answer tags and fences: parts of a response that all benchmarks have in common."""

import re

# A run of backticks, or of tildes at the start of a line
TICKS = r"(?: (?<!`)`{3,}(?!`) | ^[ \t]*~{3,}(?!~) )"
# A fence with its tag and the rest of its line. If the rest is code, or if the closing fence is on the same
# line, the rest belongs to the block, and only a well-known tag is removed.
FENCE = TICKS + r"""[ \t]* (?:
    (?! [^`\n]*\b(?:def|import|return|print)\b | \w+[ \t]*[(=] ) \{?\.? ([\w+-]*) (?![\w+-]) [^`\n]* (?:\n|\Z)
    | (?: (?i:python3?|py|input|output|text)\b )? )"""


def nested(pattern):
    """A pattern in which X stands for the pattern itself, to a depth of ten."""
    whole = "(?!)"
    for _ in range(10):
        whole = pattern.replace("X", whole)
    return whole


def answer_text(response):
    """The text after the thought, and inside the answer tags if there are any (those in brackets are
    CRUXEval's). The first line keeps its indentation, because it may start a function's body.

    >>> answer_text("2 + 2</think> It is <answer>4 </answer>")
    '4'
    """
    text = re.sub(r"(?s)\A.*(?:</think>|<answer>|\[ANSWER\])", "", response)
    return re.sub(r"(?s)\A\s*\n|\s*(?:</answer>.*|\[/ANSWER\].*)?\Z", "", text)


def pieces(text, more=0):
    """[(tag, piece)]: the text before the first fence, and after each fence up to the next one, or to the one
    that comes `more` fences later. If all fences are closed, every second piece is a block.

    >>> pieces("So:\\n```python title\\nx = 1```\\nDone.")
    [('', 'So:'), ('python', 'x = 1'), ('', 'Done.')]
    """
    piece = rf"(?: .*?{TICKS} ){{{more}}} .*?"
    return re.findall(rf"(?smx)(?= (?: \A | {FENCE} ) \n* ( {piece} ) \s* (?: {TICKS} | \Z ) )", "\n" + text)
