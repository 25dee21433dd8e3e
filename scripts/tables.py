"""Tables for the docs, in Markdown."""


def markdown(rows):
    """Rows of cells as a Markdown table. The first row is the head, and all but the first column are numbers.

    >>> print(markdown([["flag", "runs"], ["--no-dedup", 2]]))
    | flag       | runs |
    | ---------- | ---: |
    | --no-dedup |    2 |
    """
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
