"""The page of a run folder, with made-up logs; also in a real browser."""

import html
import json
import re
import shutil
import subprocess
import sys
import urllib.parse

import pytest
from conftest import ROOT
from test_run import series

from tasks import TASK_TYPES, UsageError

sys.path.append(str(ROOT / "scripts"))
from page import ROOM, main, write_page


# --- the page's data ------------------------------------------------------------------------------------

HOSTILE = ("</script><script>document.title='owned'</script><!--<script>"
           " <img src=x onerror=\"document.title='owned'\">"
           " \u2028 \u2029 {{DATA}} ]]> \ud800")
PROGRAM = "def f(x):\n    'words'\n    if x > 1 and x < 9:\n        return [y for y in x if y]\n    return x"


def make_run(folder, steps=12, types=TASK_TYPES, text="ok", length=1, flags=True):
    """A run folder as train.py leaves it, with made-up values and `text` wherever a model's text goes."""
    folder.mkdir()

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "config.json").write_text(json.dumps({"model": text, "types": ",".join(types), "steps": 60,
                                                    "versions": {"python": "3.11"}}))
    rows = series(steps)
    for row in rows:
        row |= {f"heldout/{kind}": row["heldout/mean"] for kind in TASK_TYPES if "heldout/mean" in row}
        row |= {f"heldout_stderr/{kind}": 0.02 for kind in TASK_TYPES if "heldout/mean" in row}
        row |= {f"buffer/{kind}": 16 for kind in TASK_TYPES}
        if row["step"]:
            row |= {f"seconds/{phase}": 2.0 for phase in ("generate", "execute", "update", "total")}
    dropped = [f"/{kind}" for kind in TASK_TYPES if kind not in types]
    for row in rows[1:]:
        row |= {f"response_tokens/propose/{kind}": 50 for kind in types}
        row |= {f"propose/{kind}/valid": 0.9 for kind in types}
    write("metrics.jsonl", [
        {key: value for key, value in row.items()
         if key.startswith(("heldout", "buffer")) or not any(name in key for name in dropped)}
        for row in rows])
    verdicts = {"propose": [("valid", ""), ("repeat", ""), ("invalid", "error: " + text),
                            ("unsafe", "unsafe: imports os")], "solve": [("correct", ""), ("wrong", "")]}
    write("samples.jsonl", [
        {"step": step, "role": role, "type": kind, "prompt": f"prompt {text}" * length, "response":
         f"thought {step} {text}</think><answer>{text}</answer>", "reward": 0.5, "advantage": -0.25,
         "solve_rate": None, "truncated": False,
         **dict(zip(("verdict", "reason"), verdicts[role][step % len(verdicts[role])]))}
        for step in range(1, steps + 1) for role in ("propose", "solve") for kind in types])
    write("tasks.jsonl", [
        {"step": step, "solve_rate": (step + place) % 5 / 4 if step else None, "type": kind,
         "program": PROGRAM + text * (text != "ok"), "input": text * length, "output": "1",
         "inputs": [text], "outputs": ["1"], "message": text}
        for step in range(steps + 1) for place, kind in enumerate(types)])
    if flags:
        write("flags.jsonl", [{"step": 1, "role": "solve", "type": types[0], "rule": "power", "match": text,
                               "context": text}])
    return folder


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(found[1])


def test_the_page_holds_the_run(tmp_path):
    page = write_page(make_run(tmp_path / "a run"))
    data = data_of(page)
    assert page == tmp_path / "a run" / "report.html" and data["name"] == "a run" and data["alarms"] == []
    assert data["curves"]["step"] == list(range(13)) and data["curves"]["entropy"][0] is None
    assert data["samples"]["total"] == len(data["samples"]["rows"]) == 72
    assert data["tasks"]["total"] == len(data["tasks"]["rows"]) == 39
    assert data["rates"]["shares"].keys() == {"0", "0.25", "0.5", "0.75", "1"}
    assert all(sum(shares) == pytest.approx(1) for shares in zip(*data["rates"]["shares"].values()))
    assert data["rates"]["step"] == [*range(1, 13)]
    assert data["rules"] == {"power": 1} and not (tmp_path / "a run" / "report.html.new").exists()


def test_text_of_the_model_cannot_leave_its_script_element(tmp_path):
    source = write_page(make_run(tmp_path / "x", text=HOSTILE)).read_text()
    block = re.search(r'id="data">(.*?)</script>', source, re.S)[1]
    assert block.isascii() and not re.search(r"[<>&]", block)
    assert data_of(tmp_path / "x" / "report.html")["flags"]["rows"][0]["context"] == HOSTILE
    assert "default-src 'none'" in source and "innerHTML" not in source


def test_a_run_that_was_killed(tmp_path):
    run = make_run(tmp_path / "run", text="é")
    for tail in ('{"step": 13, "é'.encode()[:-1], b"\0" * 100):  # after a kill; after a power cut
        for name in ("metrics", "samples", "tasks", "flags"):
            path = run / f"{name}.jsonl"
            path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n" + tail)
        assert data_of(write_page(run))["curves"]["step"][-1] == 12


def test_odd_values_become_gaps(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "entropy": NaN, "loss": Infinity, "grad_norm": 1e-7, "truncated": "many",'
                   ' "heldout/mean": 0.1, "heldout_stderr/mean": "wide"}\n' * 10)
    curves = data_of(write_page(run))["curves"]
    assert curves["entropy"][-1] is None and curves["loss"][-1] is None and curves["grad_norm"][-1] == 1e-7


def test_a_page_stays_small_and_says_so(tmp_path):
    page = write_page(make_run(tmp_path / "long", steps=300, length=4000))
    assert page.stat().st_size < 5_500_000
    for name in ("samples", "tasks"):
        part = data_of(page)[name]
        steps = sorted({row["step"] for row in part["rows"]})
        assert len(part["rows"]) < part["total"] and ROOM / 2 < len(json.dumps(part["rows"])) <= 1.1 * ROOM
        assert steps[-1] == 300 and len({b - a for a, b in zip(steps, steps[1:])}) == 1
    shares = data_of(page)["rates"]
    assert len(shares["step"]) <= 30 and shares["step"][0] == 1


def test_the_command_says_where_the_page_is_and_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0 and capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("page.py: ") and "is not a run folder" in said and said.count("\n") == 1
    assert main([]) == 2 and main(["--draw", str(run)]) == 2 and main(["--help"]) == 0
    assert capsys.readouterr().out.count("python scripts/page.py RUN") == 3
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # in the way
    assert main([str(run)]) == 1 and capsys.readouterr().err.startswith("page.py: ")


def damaged(name, line):
    """A function that puts a line behind the first one of a run's log."""
    def spoil(run):
        path = run / f"{name}.jsonl"
        first, _, rest = path.read_bytes().partition(b"\n")
        path.write_bytes(first + b"\n" + line + b"\n" + rest)
    return spoil


@pytest.mark.parametrize("spoil, words", [
    (lambda run: (run / "config.json").unlink(), "config.json"),
    (lambda run: (run / "config.json").write_text('{"architectures": []}'), "not a run's"),
    (lambda run: (run / "config.json").write_text("[]"), "not a run's"),
    (lambda run: (run / "config.json").write_bytes(b"\0" * 50), "not a run's"),
    (lambda run: (run / "config.json").write_text("[" * 100_000), "not a run's"),
    (lambda run: (run / "metrics.jsonl").unlink(), "--resume"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b"\0" * 500), "--resume"),
    *((damaged(name, line), f"line 2 of .*{name}.jsonl")
      for name in ("metrics", "samples", "tasks", "flags")
      for line in (b"", b"garbage", b'{"step": 1', b"\0" * 40, b"\xff\xfe", b"[1]", b"null", b"3", b"{}",
                   b'{"step": "1"}', b'{"step": null}', b"[" * 100_000)),
    *((damaged(name, b'{"step": 1, "type": null, "role": 1}'), f"line 2 of .*{name}.jsonl")
      for name in ("samples", "tasks", "flags")),
])
def test_a_folder_that_is_no_run_gets_one_line_and_no_page(tmp_path, spoil, words):
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(UsageError, match=words) as caught:
        write_page(run)
    assert "\n" not in str(caught.value) and not (run / "report.html").exists()
    with pytest.raises(UsageError):
        write_page(tmp_path / "nowhere")


# --- the page in a browser ---------------------------------------------------------------------------------

HARNESS = """<!doctype html><body><script>
// frames rather than windows: a headless window cannot be as narrow as a phone
const open360 = (source) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = "width:360px;height:3000px;border:0";
  frame.onload = () => done(frame.contentWindow);
  frame.src = source;
  document.body.append(frame);
});
(async () => {
  let result;
  try { result = await (async () => { SCENARIO })(); }
  catch (error) { result = {error: String(error.stack)}; }
  document.documentElement.textContent = "RESULT" + encodeURIComponent(JSON.stringify(result)) + "END";
})();
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """A function: JavaScript that may open pages 360 pixels wide → (its value, console messages)."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on the PATH: the page is tested in a real browser only where there is one")

    def run(scenario):
        (tmp_path / "harness.html").write_text(HARNESS.replace("SCENARIO", scenario))
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
             "--enable-logging=stderr", "--dump-dom", (tmp_path / "harness.html").as_uri()],
            capture_output=True, text=True, timeout=120)
        found = re.search(r"RESULT(.*?)END", done.stdout, re.S)
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        value = json.loads(urllib.parse.unquote(html.unescape(found[1])))
        assert "error" not in value, value["error"]
        return value, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return run


def test_every_odd_run_is_drawn_without_errors_at_the_width_of_a_phone(tmp_path, browse):
    runs = {
        "whole": make_run(tmp_path / "whole"),
        "only step 0": make_run(tmp_path / "zero", steps=0, flags=False),
        "one step": make_run(tmp_path / "one", steps=1),
        "one type": make_run(tmp_path / "type", types=("deduction",)),
        "fourth type": make_run(tmp_path / "fourth", types=(*TASK_TYPES, "repair")),
        "long": make_run(tmp_path / "long", steps=300),
        "hostile": make_run(tmp_path / "<script>document.title='owned'", text=HOSTILE),
        "wide": make_run(tmp_path / ("w" * 200), text="w" * 3000),
    }
    (runs["one step"] / "samples.jsonl").unlink()
    (runs["one step"] / "tasks.jsonl").unlink()
    metrics = (runs["long"] / "metrics.jsonl").read_text().replace('"diversity/unique_ast": 0.85',
                                                                   '"diversity/unique_ast": 0.15')
    (runs["long"] / "metrics.jsonl").write_text(metrics)
    sources = {name: write_page(run).as_uri() for name, run in runs.items()}
    seen, console = browse("""
      const seen = {};
      for (const [name, source] of Object.entries(SOURCES)) {
        const page = await open360(source), root = page.document.documentElement;
        const closed = root.scrollWidth;
        page.document.querySelectorAll("#samples details, #flags details").forEach(node => node.open = true);
        page.document.querySelectorAll("#tasks tbody button").forEach(node => node.click());
        page.dispatchEvent(new page.Event("beforeprint"));
        await new Promise(done => setTimeout(done, 50));
        seen[name] = {closed, opened: root.scrollWidth, title: page.document.title,
          paths: [...page.document.querySelectorAll("figure svg path")].map(node => node.getAttribute("d")),
          titles: [...page.document.querySelectorAll("figure h3")].map(node => node.textContent),
          lengths: [...page.document.querySelectorAll("figure")]
            .filter(node => node.querySelector("h3").textContent === "Proposer response length")
            .map(node => node.querySelector(".key").textContent).join(),
          alarms: page.document.querySelectorAll(".alarm").length,
          config: page.document.querySelectorAll("#config table").length,
          scripts: page.document.querySelectorAll("script, img").length,
          text: page.document.querySelector("#samples").textContent.slice(0, 5000)};
      }
      return seen;""".replace("SOURCES", json.dumps(sources)))
    assert console == []
    for name, page in seen.items():
        assert page["closed"] <= 360 and page["opened"] <= 360, name
        assert page["config"] == 2 and page["scripts"] == 2, name  # drawn to the end; no other script
        assert page["paths"] and not any(re.search("NaN|undefined", path) for path in page["paths"]), name
        assert page["alarms"] == (name == "long"), name
    assert "repair 50" in seen["fourth type"]["lengths"] and "repair" not in seen["whole"]["lengths"]
    assert seen["only step 0"]["titles"][0] == seen["whole"]["titles"][0] == "Held-out accuracy"
    assert {"Solve rates of new tasks", "Learnable proposals", "Entropy", "Diversity", "Time by phase",
            "Solver response length"} <= set(seen["whole"]["titles"])
    assert HOSTILE[:-1] in seen["hostile"]["text"] and seen["hostile"]["title"] != "owned"


def test_filters_sorting_search_and_keys(tmp_path, browse):
    run = make_run(tmp_path / "run")
    source = write_page(run).as_uri() + "#role=solve&type=deduction&verdict=wrong&sort=solve_rate"
    seen, console = browse("""
      const page = await open360(SOURCE), find = query => page.document.querySelector(query);
      const all = query => [...page.document.querySelectorAll(query)].map(node => node.textContent);
      const look = () => ({matching: find("#matching").textContent, samples: all("#samples summary"),
        rates: all("#tasks tbody tr:not([hidden]) td:nth-child(3)"), hash: page.location.hash,
        sorts: [...page.document.querySelectorAll("#tasks th")].map(node => node.getAttribute("aria-sort"))});
      const set = (id, value, event) => {
        find(id).value = value;
        find(id).dispatchEvent(new page.Event(event));
      };
      const linked = look(), chosen = ["role", "type", "verdict"].map(name => find("#filter-" + name).value);
      find("#tasks th:nth-child(3) button").click();
      const descending = look();
      find("#tasks th:nth-child(2) button").click();
      const types = all("#tasks tbody tr:not([hidden]) td:nth-child(2)");
      set("#filter-type", "", "change");
      set("#filter-verdict", "", "change");
      const roles = look();
      set("#filter-role", "", "change");
      set("#filter-q", "THOUGHT 7", "input");
      const searched = look();
      find("#tasks tbody button").click();
      const opened = find("#tasks tbody pre").textContent;
      find("figure svg").dispatchEvent(new page.KeyboardEvent("keydown", {key: "Home"}));
      const key = find("figure .key").textContent;
      const labels = [...page.document.querySelectorAll("select, input")].every(node => node.labels.length);
      page.location.hash = "#verdict=none-such&q=thought+9";
      await new Promise(done => setTimeout(done, 50));
      const followed = look();
      return {linked, chosen, descending, types, roles, searched, opened, key, labels, followed};
      """.replace("SOURCE", json.dumps(source)))
    assert console == []
    assert seen["chosen"] == ["solve", "deduction", "wrong"] and seen["labels"]
    assert seen["linked"]["matching"] == "6 of 72 match."
    assert len(seen["linked"]["samples"]) == 6
    assert all("solve deduction: wrong" in text for text in seen["linked"]["samples"])
    rates = seen["linked"]["rates"]
    tried = [float(rate) for rate in rates if rate != "–"]
    assert len(tried) == 36 and tried == sorted(tried) and rates[36:] == ["–"] * 3  # untried ones come last
    assert seen["linked"]["sorts"][2] == "ascending" and seen["descending"]["sorts"][2] == "descending"
    tried = [float(rate) for rate in seen["descending"]["rates"] if rate != "–"]
    assert tried == sorted(tried, reverse=True) and seen["descending"]["rates"][36:] == ["–"] * 3
    assert "sort=-solve_rate" in seen["descending"]["hash"] and "verdict=wrong" in seen["descending"]["hash"]
    assert seen["types"] == ["deduction"] * 13 + ["abduction"] * 13 + ["induction"] * 13
    assert seen["roles"]["matching"] == "36 of 72 match." and "role=solve" in seen["roles"]["hash"]
    assert seen["searched"]["matching"] == "6 of 72 match." and "q=THOUGHT+7" in seen["searched"]["hash"]
    assert all(text.startswith("Step 7,") for text in seen["searched"]["samples"])
    assert seen["followed"]["matching"] == "6 of 72 match." and "Step 9," in seen["followed"]["samples"][0]
    assert seen["opened"] == PROGRAM and "step 0" in seen["key"] and "0.233" in seen["key"]
