"""What all answers have in common, whatever they answer."""

import re

# A run of backticks or tildes; tildes count only at the start of a line
TICKS = r"(?: (?<!`)`{3,}(?!`) | ^[ \t]*~{3,}(?!~) )"
# The start of the text, or a fence with its tag and what else stands on its line. If that is code, or if the
# closing fence stands there too, it belongs to what follows, and only a well-known tag is taken off.
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
    """What stands behind the thought, and inside the answer tags if there are any (those in brackets are
    CRUXEval's). The first line keeps its indentation, as it may be the first line of a function's body.

    >>> answer_text("2 + 2</think> It is <answer>4 </answer>")
    '4'
    """
    text = re.sub(r"(?s)\A.*(?:</think>|<answer>|\[ANSWER\])", "", response)
    return re.sub(r"(?s)\A\s*\n|\s*(?:</answer>.*|\[/ANSWER\].*)?\Z", "", text)


def pieces(text, more=0):
    """[(tag, piece)]: what stands before the first fence, and behind each fence up to the next one, or to one
    that comes `more` fences later. If all fences are closed, every second piece is a block.

    >>> pieces("So:\\n```python title\\nx = 1```\\nDone.")
    [('', 'So:'), ('python', 'x = 1'), ('', 'Done.')]
    """
    piece = rf"(?: .*?{TICKS} ){{{more}}} .*?"
    return re.findall(rf"(?smx)(?= (?: \A | {FENCE} ) \n* ( {piece} ) \s* (?: {TICKS} | \Z ) )", "\n" + text)
