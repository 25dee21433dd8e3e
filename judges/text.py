"""What all answers have in common, whatever they answer."""

import re

TAGS = ("<answer>", "</answer>"), ("[ANSWER]", "[/ANSWER]")  # the second are CRUXEval's own
# The start of the text, or a fence with its tag and what else stands on its line. If that is code, or if the
# closing fence stands there too, it belongs to what follows, and only a well-known tag is taken off.
FENCE = re.compile(r"""\A | (?: `{3,} | ^[ \t>]*~{3,} ) [ \t]* (?:
    (?! [^`\n]*\b(?:def|import|return|print)\b | \w+[ \t]*[(=] ) \{?\.? ([\w+-]*) (?![\w+-]) [^`\n]* (?:\n|\Z)
    | ((?i:python3?|py|input|output|text))\b | )""", re.M | re.X)
QUOTED = re.compile(r"^> ?(?!>)", re.M)  # a line of a quotation, and not of a doctest


def nested(pattern):
    """A pattern in which X stands for the pattern itself, to a depth of ten."""
    whole = "(?!)"
    for _ in range(10):
        whole = pattern.replace("X", whole)
    return whole


def answer_text(response):
    """What stands behind the thought, and inside the answer tags if there are any. The first line keeps its
    indentation, as it may be the first line of a function's body.

    >>> answer_text("2 + 2</think> It is <answer>4 </answer>")
    '4'
    """
    text = response.rpartition("</think>")[2]
    for opening, closing in TAGS:
        if opening in text:
            text = text.rpartition(opening)[2]
        text = text.partition(closing)[0]
    return re.sub(r"\A\s*\n|\s+\Z", "", text)


def pieces(text, reach=1):
    """[(tag, piece)]: what stands before the first fence, and behind each fence up to the next one.

    If all fences are closed, every second piece is a block. reach: with 2 or more, there are also pieces that
    run over up to reach - 1 fences, since a program may have a fence in a string.

    >>> pieces("So:\\n```python title\\nx = 1```\\nDone.")
    [('', 'So:'), ('python', 'x = 1'), ('', 'Done.')]
    """
    fences = list(FENCE.finditer(text))
    ends = [*(fence.start() for fence in fences[1:]), len(text)]
    found = []
    for place, fence in enumerate(fences):
        tag = (fence[1] or fence[2] or "").lower()
        found += [(tag, QUOTED.sub("", text[fence.end():end]).strip("\n")) for end in ends[place:place + reach]]
    return found
