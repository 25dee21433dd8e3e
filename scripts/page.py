"""A run folder as one page: python scripts/page.py RUN

Writes RUN/report.html from the logs alone, also for a run that was killed or is still going. The looks and
behaviour of the page are in docs/report_template.html; this script gathers the data for it.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import alarms, finite, matching_keys, read_config, read_rows, replace_file  # noqa: E402
from tasks import UsageError  # noqa: E402

TEMPLATE = ROOT / "docs" / "report_template.html"
LOGS = {  # the logs on the page, and the fields that must be text in their rows
    "samples": ("role", "type", "verdict", "prompt", "response"),
    "tasks": ("type", "program"),
    "flags": ("role", "type", "rule", "match", "context")}
ROOM = 1_500_000  # characters of each log on the page, about; it so stays near 5 MB: a phone still opens it
MAX_BINS = 30     # columns in the picture of solve rates


def write_page(folder):
    """Write report.html into a run folder: one file that needs no other file and no network. → its path

    Reads config.json and the logs, of which only metrics.jsonl must be there. A last line that was cut off by
    a kill is skipped. The new page replaces the old one in one rename. Raises UsageError if the folder holds
    no run, or a log with a damaged line.
    """
    folder = Path(folder)
    config = read_config(folder, {"model": str, "steps": int})
    metrics = read_rows(folder / "metrics.jsonl", {"step": int})
    if not metrics:
        raise UsageError(f"{folder} has no metrics yet: the run ended before its first measurement; "
                         f"continue it with python train.py --resume {folder}")
    logs = {name: read_rows(folder / f"{name}.jsonl", {"step": int, **dict.fromkeys(texts, str)})
            for name, texts in LOGS.items()}
    curves = {}
    for key in matching_keys(metrics, ".+"):
        curves[key] = [row.get(key) for row in metrics]
    data = {"name": folder.resolve().name, "config": config, "alarms": alarms(metrics), "curves": curves,
            "rates": _solve_rates(logs["tasks"]), "rules": Counter(flag["rule"] for flag in logs["flags"])}
    data |= {name: _thinned(rows) for name, rows in logs.items()}
    # The model's text must not end the script element or open a comment in it. json.dumps also escapes all
    # that is not ASCII, such as lone surrogates and U+2028.
    text = re.sub("[&<>]", lambda mark: f"\\u{ord(mark[0]):04x}", json.dumps(data))
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def _solve_rates(tasks):
    """Shares of the tasks that were tried, by solve rate, in at most MAX_BINS bins of steps.

    → {"step": [first step of each bin], "shares": {rate: [one for each bin]}}
    """
    tried = [task for task in tasks if finite([task.get("solve_rate")])]
    width = 1 + max((task["step"] for task in tried), default=0) // MAX_BINS
    bins = {}
    for task in tried:
        first = task["step"] - (task["step"] - 1) % width
        bins.setdefault(first, []).append(task["solve_rate"])
    shares = {}
    for rate in sorted({task["solve_rate"] for task in tried}):
        shares[f"{rate:.3g}"] = [rates.count(rate) / len(rates) for rates in bins.values()]
    return {"step": list(bins), "shares": shares}


def _thinned(rows):
    """{"rows", "total"}: the rows of every n-th step, counted back from the last; n is as small as fits."""
    stride = 1 + len(json.dumps(rows)) // ROOM
    chosen = set(sorted({row["step"] for row in rows})[::-stride])
    return {"rows": [row for row in rows if row["step"] in chosen], "total": len(rows)}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_page(arguments[0]))
        return 0
    except UsageError as error:
        print(f"page.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"page.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
