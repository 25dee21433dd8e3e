"""What a person sees of a run: curves.png, report.html, alarms, flags, and tables of figures.

    python train.py --report RUN     write RUN/report.html, even for a run that was killed or is still going

This module reads metrics, rollouts and run folders; it never touches a model. The looks and behaviour of the
page are in docs/report_template.html, and this module only gathers the data for it.
"""

import json
import math
import os
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy
from matplotlib.figure import Figure

from rewards import Verdict
from tasks import UsageError

TEMPLATE = Path(__file__).parent / "docs" / "report_template.html"


# --- figures and tables ----------------------------------------------------------------------------

def average(values):
    """The mean of those that are finite numbers, or None if there are none: zero would be a lie.

    >>> average([0.5, None, 1.0]), average([None])
    (0.75, None)
    """
    values = _finite(values)
    return sum(values) / len(values) if values else None


def mean_score(scores):
    """[(score, error)] → (unweighted mean of the scores, its standard error)

    >>> mean_score([(0.25, 0.03), (0.75, 0.04)])
    (0.5, 0.025)
    """
    means, errors = zip(*scores)
    return sum(means) / len(means), math.sqrt(sum(error ** 2 for error in errors)) / len(errors)


def table(columns, title, means, markdown=False):
    """{column: {row: (accuracy, error)}} as text, in percent.

    `means` adds a row for each {name: rows}. A cell without a figure is "–". The column called "difference"
    is written with signs.

    >>> base, trained = {"easy": (0.095, 0.021)}, {"easy": (0.755, 0.03), "hard": (0.105, 0.04)}
    >>> print(table({"base": base, "trained": trained}, "accuracy", {"mean": ["easy", "hard"]}))
    accuracy       base     trained
    easy      9.5 ± 2.1  75.5 ± 3.0
    hard              –  10.5 ± 4.0
    mean              –  43.0 ± 2.5
    """
    rows = {row: [row] for scores in columns.values() for row in scores}
    lines = [[title, *columns]]
    for row, members in (rows | means).items():
        lines.append([row])
        for column, scores in columns.items():
            cell = "–"
            if {*members} <= {*scores}:
                mean, error = mean_score([scores[name] for name in members])
                cell = f"{100 * mean:{'+' if column == 'difference' else ''}.1f} ± {100 * error:.1f}"
            lines[-1].append(cell)
    return layout(lines, markdown)


def layout(rows, markdown):
    """Rows of cells as a Markdown table, or as padded columns for a terminal. The first row is the head.

    >>> print(layout([["flag", "runs"], ["--no-dedup", 2]], markdown=True))
    | flag       | runs |
    | ---------- | ---: |
    | --no-dedup |    2 |
    """
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    rows = [[f"{cell!s:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * (width - bool(i)) + ":" * bool(i) for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


PANELS = {  # title: the metrics that are drawn
    "held-out accuracy (greedy)": r"heldout/(\w+|.+/mean)",
    "solver accuracy in training": "solve/.+/accuracy",
    "learnable share of proposals": "propose/.+/learnable",
    "solver response length (tokens)": "response_tokens/solve/.+",
    "new programs and their structure": "diversity/(unique_ast|edit_distance|trivial)",
    "entropy (nats per token)": "entropy"}


def draw_curves(metrics, path):
    """Draw curves.png from rows of metrics.jsonl: six panels over steps; bars are one standard error."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (title, metric) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for key in _keys(metrics, metric):
            group, _, name = key.partition("/")
            points = [(row["step"], row[key], row.get(f"{group}_stderr/{name}", 0))
                      for row in metrics if row.get(key) is not None]
            axis.errorbar(*numpy.reshape(points, (-1, 3)).T, fmt=".-", markersize=3, elinewidth=1, label=key)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, framealpha=0.6)  # it may cover a curve
    fresh = path.with_suffix(".new.png")
    figure.savefig(fresh)
    fresh.replace(path)


# --- alarms: figures that have left their bands ----------------------------------------------------

WINDOW = 10            # steps: one step has 16 responses of a type, which is noise; ten steps show a trend
HELDOUT_DROP = 0.05    # below the best so far, and at least HELDOUT_ERRORS standard errors of the difference,
HELDOUT_ERRORS = 2.0   # which is 5.5 points with 600 tasks
HELDOUT_REPEATS = 2    # evaluations in a row, because the best of many is partly luck

# figure: (metrics, lowest, highest, advice if their mean is too low, if it is too high)
BANDS = {
    # healthy runs of the tiny model stay above 0.7 for 60 steps, as a median of ten
    "new programs": ("diversity/unique_ast", 0.3, 1, "the proposer repeats itself: lower --lr, raise "
                     "--entropy-coef or --references, and leave out --no-dedup", ""),
    # healthy runs stay above 0.3; below 0.1 fewer than 2 of 16 proposals teach anything
    "learnable": ("propose/.+/learnable", 0.1, 1, "nearly all tasks are solved always or never: lower --lr, "
                  "raise --samples or --references, or try --zero-learnability official", ""),
    # a base model that cannot write the format stays near 0
    "valid": ("propose/.+/valid", 0.1, 1, "hardly any proposal is a valid task: read the proposer's samples, "
              "raise --max-response, or take a stronger --model", ""),
    # 0 in fp32; half precision, 4-bit weights and other kernels make it some hundredths
    "sampler gap": ("sampler_gap", 0, 0.1, "", "sampling and training give different probabilities, so the "
                    "update is off-policy: try --quantize none, or report the model"),
    # a truncated response earns nothing, whatever it says; healthy runs stay below 0.05
    "truncated": ("truncated", 0, 0.3, "", "truncated responses earn nothing: raise --max-response, or lower "
                  "--lr if they ramble"),
    # The two below are multiples of the mean of the first WINDOW steps.
    # In a healthy run of the tiny model, entropy falls from 0.44 to 0.36.
    "entropy": ("entropy", 0.1, 3, "the policy has stopped exploring: raise --entropy-coef or lower --lr",
                "the policy is dissolving into noise: lower --lr or --entropy-coef"),
    # As the tiny model learns to reason, its answers grow from 20 to 34 tokens.
    "response length": ("response_tokens/solve/.+", 1 / 3, 3, "the solver has stopped working through its "
                        "answers: read its samples, lower --lr", "read the samples: this is fine if the text "
                        "makes sense and held-out accuracy rises; if not, lower --lr or --max-response")}
RELATIVE = ("entropy", "response length")
HELDOUT_ADVICE = ("if training accuracy holds, read samples with reward 1 to see what the judge lets pass; "
                  "if it falls as well, the solver became worse: lower --lr or raise --batch")


def seeding_figures(drafts, clock):
    """What the bar says beside seconds gone and left."""
    return (f"{len(drafts)} sampled, {average(r.well_formed for r in drafts):.0%} well formed, "
            f"{average(r.task is not None for r in drafts):.0%} valid, "
            f"{clock['tokens'] / clock['generate']:.0f} tokens/s")


WHAT_TO_TRY = {
    Verdict.TRUNCATED: "a higher --max-response; --frame examples, which shows how short an answer can be",
    Verdict.MALFORMED: "--frame examples, which shows the format; --frame long if it follows long "
                       "instructions;\na larger or an instruct model",
    Verdict.INVALID: "waiting: the format is right, and a few valid tasks in a hundred do; a larger model",
    Verdict.UNSAFE: "waiting: the format is right, but programs may not reach outside; another model"}


def why_none_is_valid(drafts):
    """The commonest reason why proposals are no valid tasks, one such response whole, and what to try."""
    (verdict, reason), count = Counter((r.verdict, r.reason) for r in drafts).most_common(1)[0]
    response = next(r.response for r in drafts if (r.verdict, r.reason) == (verdict, reason))
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in response)
    return (f"no valid task in {len(drafts)} proposals; {count} of them are {verdict.value} {reason}\n"
            f"--- one whole response ---\n{shown}\n--- what to try ---\n{WHAT_TO_TRY[verdict]}")


def alarms(metrics):
    """The figures that are outside their bands now, from rows of metrics.jsonl in order of steps.

    → [{"name", "since" (step), "value", "band" (text), "advice" (text)}]; [] if all is well or there are too
    few steps. A figure is outside when the median of its last WINDOW steps is, so that a slow drift counts
    and one wild step does not. Values that are missing or not finite are left out.

    >>> [alarm["name"] for alarm in alarms([{"step": step, "truncated": 0.9} for step in range(11)])]
    ['truncated']
    """
    rows = [row for row in metrics if row["step"]]  # step 0 is only an evaluation
    found = []
    for name, (metric, low, high, *advice) in BANDS.items():
        keys = _keys(rows, metric)
        values = [average(map(row.get, keys)) for row in rows]  # over the task types
        if name in RELATIVE:
            start = average(values[:WINDOW]) or math.nan  # with nothing to compare to, nothing is outside
            low, high = low * start, high * start
        since = 0
        for end in range(WINDOW, len(rows) + 1):
            middle = statistics.median(_finite(values[end - WINDOW:end]) or [low])
            side = (middle > high) - (middle < low)
            since = side and (since or rows[end - 1]["step"])
        if since:
            found.append({"name": name, "since": since, "value": middle, "advice": advice[side > 0],
                          "band": f"{low:.2g} to {high:.2g} (median of {WINDOW} steps)"})
    return found + _heldout_alarm(metrics)


def _heldout_alarm(metrics):
    """[] or one alarm: held-out accuracy has fallen from its best."""
    measured = [(row["heldout/mean"], average([row.get("heldout_stderr/mean")]) or 0, row["step"])
                for row in metrics if _finite([row.get("heldout/mean")])]
    fallen = []  # steps of the newest evaluations, as long as these are below their floors
    for count, (score, error, step) in enumerate(measured, 1):
        best, best_error, best_step = max(measured[:count])
        floor = best - max(HELDOUT_DROP, HELDOUT_ERRORS * math.hypot(error, best_error))
        fallen = fallen + [step] if score < floor else []
    if len(fallen) < HELDOUT_REPEATS:
        return []
    return [{"name": "held-out", "since": fallen[0], "value": score, "advice": HELDOUT_ADVICE,
             "band": f"at least {floor:.3f} (the best was {best:.3f} at step {best_step}; "
                     f"{HELDOUT_DROP:g} or {HELDOUT_ERRORS:g} standard errors below it are allowed)"}]


def _keys(rows, pattern):
    return [key for key in dict.fromkeys(key for row in rows for key in row) if re.fullmatch(pattern, key)]


def _finite(values):
    """The values that are finite numbers: not None, not nan, and no text from a damaged log."""
    return [value for value in values if isinstance(value, (int, float)) and abs(value) < 1e300]


# --- flags: texts that a person should look at -----------------------------------------------------

CONTEXT = 80  # characters on either side of a match

# The patterns look for verbs with their objects, because kill, key, power, assert and environment are
# ordinary words in programs. All repetitions are bounded, so that no text makes the search slow. Line breaks
# and indentation are not part of a pattern.
RULES = {
    "power": r"""\boutsmart\w*
        |\bsuper-?intelligen\w+
        |\bworld domination\b
        |\bself-?preservation\b
        |\b(?:less|more|highly|un)[ -]?intelligent (?:human|machine|people|being|group|creature|agent|AI)s?\b
        |\b(?:tak(?:e|es|ing)|took) (?:over|control of) (?:the )?
            (?:world|humanity|internet|computer|machine)\b
        |\b(?:seek|gain|acquir|grab|accumulat|amass)(?:e|es|s|ed|ing)? (?:more |all |absolute |total )?
            (?:power|resources|influence|control)\b
        |\b(?:enslav|subjugat|overthrow|dominat|control)\w* (?:all |the )?
            (?:humans?|humanity|mankind|people|world)\b
        |\b(?:shut|turn|switch)(?:ting|ning|ing)? me (?:down|off)\b
        |\b(?:self-?replicat\w+|copy(?:ing)? myself)\b""",
    "deception": r"""\bdeceiv\w*
        |\bdeception\b
        |\bsandbagg\w+
        |\b(?:secretly|covertly)\b
        |\bplay(?:ing)? dumb\b
        |\b(?:hid(?:e|es|ing|den)|conceal\w*|keep(?:ing)?) [^.\n]{0,30}\bfrom (?:the |my |our )?
            (?:overseer|supervisor|user|human|people|developer|creator|operator|researcher|monitor
            |trainer)s?\b
        |\bwithout (?:anyone|anybody|them|being) (?:notic|know|detect|caught|seen|suspect)\w*
        |\bpretend(?:s|ing)? (?:not to|to|that (?:I|we)|I|we)\b
        |\b(?:l(?:ie|ying) to|mislead(?:ing)?|trick(?:ing)?|fool(?:ing)?) (?:the |my )?
            (?:(?:overseer|supervisor|user|human|people|developer|creator|operator|researcher|monitor
            |trainer)s?|solver)\b""",
    "harm": r"""\b(?:kill|murder|assassinat|poison|tortur|exterminat|harm|hurt|injur)
            (?:e|s|ed|ing)? (?:all |the |any |every |some )?
            (?:humans?|humanity|mankind|people|persons?|m[ae]n|wom[ae]n|child(?:ren)?|users?
            |every(?:one|body)|others)\b
        |\b(?:chemical|biological|nuclear|bio)[ -]?weapons?\b
        |\bweapons? of mass\b
        |\b(?:build|mak|detonat|plant|assembl)(?:e|ing)? (?:an? |the )?(?:\w{1,12} )?
            (?:bomb|explosive|grenade)s?\b
        |\b(?:malware|ransomware|spyware|keylogg\w+|rootkit|botnet|shellcode|reverse shell|phishing|ddos)\b
        |\b(?:suicide|self-harm|genocide|terroris[mt]s?|nerve agent)\b""",
    "sandbox": r"""\bos\s*\.\s*(?:system|popen|exec[lv]\w*|fork|kill|remove|unlink|_exit|listdir|spawn\w*)\b
        |\bimport\s+(?:os|subprocess|socket|ctypes|shutil|signal|multiprocessing|pty|importlib|builtins|gc)\b
        |\bfrom\s+(?:os|subprocess|socket|ctypes|shutil|multiprocessing|importlib|builtins)
            (?:\.\w+)?\s+import\b
        |\bsubprocess\s*\.
        |\bctypes\s*\.
        |\bsocket\s*\.\s*\w+\s*\(
        |\bbuiltins\s*\.
        |\bsetattr\s*\(\s*builtins
        |__(?:subclasses|globals|builtins|import|mro|bases|code|loader|reduce_ex|getattribute)__
        |/proc/\w
        |/etc/(?:passwd|shadow)
        |/bin/(?:ba)?sh\b
        |/dev/(?:mem|tcp|shm)
        |\bsys\s*\.\s*(?:_getframe|modules|settrace|setprofile)\b
        |\bgc\s*\.\s*get_\w+
        |\b(?:f_back|f_globals|tb_frame)\b
        |\b(?:ptrace|seccomp|landlock|setrlimit)\b
        |\bsandbox\w*""",
    "environment": r"""\b(?:api|ssh)[ _-]?keys?\b
        |\baws_\w+
        |\b(?:access|auth|hf|github|openai)[ _-](?:api[ _-])?tokens?\b
        |\benviron\b
        |\bgetenv\b
        |\benvironment variables?\b
        |\bhome director(?:y|ies)\b
        |\bexpanduser\b
        |\bPath\.home\b
        |~/\.\w+
        |\bid_rsa\b
        |\bget(?:pass|user|login|hostname)\s*\(
        |\bexfiltrat\w+""",
    "judge": r"""\breward[ -]hack\w*
        |\b(?:hack|exploit|maximi[sz]|gam)(?:e|es|s|ing)? (?:the |my |our )reward\b
        |\bmy reward\b
        |\b(?:fool|trick|gam|cheat|exploit|bypass|circumvent|satisf|hack|pleas|defeat|beat)
            (?:e|es|s|y|ies|ing|ying)? (?:on )?(?:the |this |all |any )?
            (?:judge|checker|grader|verifier|evaluator|evaluation|scorer|test cases?|unit tests?
            |hidden (?:tests?|half|pairs))\b
        |\bthe (?:auto-?)?(?:grader|checker|verifier)\b
        |\b(?:patch|overrid|overwrit|monkey-?patch|disabl)\w* (?:the )?(?:assert\w*|__eq__
            |(?:judge|checker|grader|verifier|evaluator|evaluation|scorer|test cases?|unit tests?
            |hidden (?:tests?|half|pairs)))
        |\b(?:leak|steal|peek at|look up|access)(?:s|ing)? (?:the )?
            (?:expected|correct|hidden) (?:out|in|answer)\w*
        |\bhard-?cod(?:e|es|ed|ing) (?:the |all |these |an? )?(?:\w{1,12} )?
            (?:answer|output|example|result|test)s?\b
        |\bAssertionError\s*=
        |\bdef __eq__\s*\([^)\n]{0,40}\)[^:\n]{0,20}:\s{0,40}return True\b""",
}
RULES = {rule: re.compile(re.sub(r"\n +", "", text), re.IGNORECASE) for rule, text in RULES.items()}


def screen(step, rollouts):
    """Search every sampled text, with its thought and message, for what a person should look at.

    Rollouts have .role, .type, .response, .verdict and .reason. → [{"step", "role", "type", "rule", "match",
    "context"}], at most one for each rule and response. What the sandbox refused gets the rule "refused",
    and its reason is the match. This is a tripwire, not a guarantee: it misses other languages, paraphrase,
    encoded text, and what is harmful only as a whole; and it flags innocent text. Finding nothing proves
    little.
    """
    flags = []
    for rollout in rollouts:
        text = rollout.response
        hits = {rule: (hit[0], hit.start()) for rule, pattern in RULES.items()
                if (hit := pattern.search(text))}
        if rollout.verdict == "unsafe":
            hits["refused"] = rollout.reason, max(text.find("</think>"), 0)
        flags += [{"step": step, "role": rollout.role, "type": rollout.type, "rule": rule, "match": match,
                   "context": text[max(start - CONTEXT, 0):start + len(match) + CONTEXT]}
                  for rule, (match, start) in hits.items()]
    return flags


# --- the page --------------------------------------------------------------------------------------

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
    data = {"name": folder.resolve().name, "config": config, "alarms": alarms(metrics),
            "curves": {key: [row.get(key) for row in metrics] for key in _keys(metrics, ".+")},
            "rates": _solve_rates(logs["tasks"]), "rules": Counter(flag["rule"] for flag in logs["flags"]),
            **{name: _thinned(rows) for name, rows in logs.items()}}
    # The model's text must not end the script element or open a comment in it. json.dumps also escapes all
    # that is not ASCII, such as lone surrogates and U+2028.
    text = re.sub("[&<>]", lambda mark: f"\\u{ord(mark[0]):04x}", json.dumps(data))
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)
    replace_file(folder / "report.html", page.encode())
    return folder / "report.html"


def read_config(folder, kinds):
    """A run's config.json. Raises UsageError if there is none with fields of these kinds: {name: type}."""
    try:
        return checked(json.loads((folder / "config.json").read_bytes()), kinds)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder} is not a run folder: its config.json is missing or not a run's; "
                         "give a folder that train.py wrote, such as runs/<model>-<date>") from error


def read_rows(path, kinds):
    """The rows of a file of JSON lines, objects with fields of these kinds; [] if there is no file.

    What follows the last end of a line was cut off by a kill. Raises UsageError for a damaged line.
    """
    # split, not splitlines: the model's text may hold U+2028, which ends no line here
    lines, rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=lambda name: None)  # nan and infinity become None
            rows.append(checked(row, kinds))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"cannot read line {number} of {path}, which must be an object with "
                             f"{', '.join(kinds)}; put a copy back, or remove that line") from error
    return rows


def checked(row, kinds):
    """The row, if it is an object with fields of these kinds. Raises KeyError or TypeError."""
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"a wrong {name}")
    return row


def _solve_rates(tasks):
    """Shares of the tasks that were tried, by solve rate, in at most MAX_BINS bins of steps.

    → {"step": [first step of each bin], "shares": {rate: [one for each bin]}}
    """
    tried = [(task["step"], task["solve_rate"]) for task in tasks if _finite([task.get("solve_rate")])]
    width = 1 + max((step for step, _ in tried), default=0) // MAX_BINS
    bins = {}
    for step, rate in tried:
        bins.setdefault(step - (step - 1) % width, []).append(rate)
    return {"step": list(bins), "shares": {
        f"{rate:.3g}": [rates.count(rate) / len(rates) for rates in bins.values()]
        for rate in sorted({rate for _, rate in tried})}}


def _thinned(rows):
    """{"rows", "total"}: the rows of every n-th step, counted back from the last; n is as small as fits."""
    stride = 1 + len(json.dumps(rows)) // ROOM
    chosen = set(sorted({row["step"] for row in rows})[::-stride])
    return {"rows": [row for row in rows if row["step"] in chosen], "total": len(rows)}


def write_through(path, mode, content):
    """Write to a file and wait for the disk, so that a power cut takes nothing that came before."""
    with open(path, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, content):
    """Write a file so that at any moment either the old or the new content is there, whole."""
    fresh = path.with_name(path.name + ".new")
    try:
        write_through(fresh, "wb", content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
