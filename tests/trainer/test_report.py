"""Reports of runs: the HTML page, report.md and curves.png."""

import html
import json
import re

import pytest
from transformers import PreTrainedTokenizerBase

from opd_trainer.__main__ import main
from opd_trainer.run.report import before_after, plot_curves, write_report
from tests.browser import needs_browser, open_page
from tests.tiny_run import write_recipe

MARKUP = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"> & $x$"
)
LOG = [
    {"step": 0, "epoch": 0.0, "eval_reverse_kl": 4.25, "eval_score": 0.125},
    {"step": 1, "loss": 0.5, "grad_norm": 1.5, "learning_rate": 2e-5, "skipped_steps": 0.0},
    {"step": 2, "loss": 0.375, "grad_norm": 1.25, "learning_rate": 1e-5, "skipped_steps": 0.0},
    {"step": 2, "epoch": 1.0, "eval_reverse_kl": 1.75, "eval_score": 0.875},
]


def write_run(folder, log=LOG, samples=None, config=None):
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for step, rows in (samples or {}).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        text = text.replace(r"\u2028", "\u2028")  # ends a line for Python, not for JSON
        (folder / f"samples/step-{step}.jsonl").write_text(text, encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def report(*runs):
    """Return the page, its panels as (texts of the marks, last values) and its cells."""
    page = runs[0].parent / "report.html"
    write_report(list(runs), page)
    text = page.read_text(encoding="utf-8")
    panels = {
        html.unescape(re.search("<h3>(.*?)</h3>", x)[1]): (
            re.findall("<title>(.*?)</title>", x),
            re.findall("<b>(.*?)</b>", x),
        )
        for x in re.findall("<figure.*?</figure>", text, re.S)
    }
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th>(.*?)</tr>", text, re.S)
    cells = {name: re.findall("<td>(.*?)</td>", row, re.S) for name, row in rows}
    return text, panels, cells


def test_digits_and_markup_survive_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *_, **__: "007")
    main(["distill", str(write_recipe(tmp_path, max_steps=1))])
    run = tmp_path / "run"
    assert "- after: 007" in (run / "report.md").read_text()
    _, panels, cells = report(run)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (line["loss"] for line in log if "loss" in line)
    kl = [line["eval_reverse_kl"] for line in log if "eval_reverse_kl" in line]
    assert panels["loss per token (nats)"] == ([f"step 1: {loss:.6g}"], [f"{loss:.4g}"])
    assert cells["held-out reverse KL"] == [f"{kl[0]:.4g} → {kl[1]:.4g}"]


def test_curves_and_table_hold_the_figures_of_each_run(tmp_path):
    longer = [*LOG[:-1], {"step": 7, "loss": 0.0625}, {"step": 9, "eval_reverse_kl": 0.5}]
    text, panels, cells = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", longer))
    assert cells["held-out reverse KL"] == ["4.25 → 1.75", "4.25 → 0.5"]
    assert cells["held-out score"] == ["0.125 → 0.875", "0.125"]
    assert cells["epoch"] == ["0 → 1", "0"]
    steps = ["step 1: 0.5", "step 2: 0.375"]
    assert panels["loss per token (nats)"] == (
        [*steps, *steps, "step 7: 0.0625"],
        ["0.375", "0.0625"],
    )
    marks = ["step 0: 4.25", "step 2: 1.75", "step 0: 4.25", "step 9: 0.5"]
    assert panels["held-out reverse KL (nats per token)"] == (marks, ["1.75", "0.5"])
    assert len({*re.findall('<i style="background: (#.{6})"', text)}) == 2
    assert "epoch" not in panels
    assert "No alarms." in text


def test_an_unknown_figure_has_a_panel_and_two_of_one_panel_do_not_mix(tmp_path):
    log = [
        {"step": 1, "overlap": 0.25, "new_figure": 8, "text": "no", "flag": True, "none": None},
        {"step": 2, "eval_overlap": 0.75, "eval_other": 3.5},
    ]
    _, panels, _ = report(write_run(tmp_path / "a", log))
    assert panels["new figure"] == (["step 1: 8"], ["8"])
    assert panels["held-out other"] == (["step 2: 3.5"], ["3.5"])
    marks = ["step 1: 0.25", "step 2: 0.75"]
    assert panels["top-K overlap with the teacher"] == (marks, ["0.25", "0.75"])
    assert len(panels) == 3


def test_figures_are_shown_with_their_like(tmp_path):
    log = [{"step": 0, "eval_truncated": 0.5}, {"step": 1, "truncated": 0.25}]
    log += [{"step": 2} | {f"teacher_nll_from_{i}": i for i in (0, 16, 64, 256, 1024)}]
    _, panels, _ = report(write_run(tmp_path / "a", log))
    assert panels["truncated"] == (["step 0: 0.5", "step 1: 0.25"], ["0.5", "0.25"])
    marks = ["step 2: 0", "step 2: 16", "step 2: 64", "step 2: 256", "step 2: 1024"]
    assert panels["teacher nll by position"] == (marks, ["0", "16", "64", "256", "1024"])
    assert len(panels) == 2


def test_figures_that_are_not_finite_leave_a_gap_and_an_alarm(tmp_path):
    values = [1.0, float("nan"), 3.0, float("inf"), None, 6.0]
    log = [{"step": i, "loss": x} for i, x in enumerate(values)]
    log.append({"step": 4, "alarm": f"mass fell {MARKUP}", "student_mass": 0.5})
    text, panels, _ = report(write_run(tmp_path / "a", log))
    marks = ["step 0: 1", "step 2: 3", "step 5: 6"]
    assert panels["loss per token (nats)"] == (marks, ["6"])
    alarms = re.findall(r'<div class="text">(.*?)<small>step (.*?)</small>', text, re.S)
    assert [(html.unescape(what), steps) for what, steps in alarms] == [
        ("loss is nan", "1"),
        ("loss is inf", "3"),
        (f"mass fell {MARKUP}", "4"),
    ]


def test_a_long_run_is_drawn_whole_and_marked_thinly(tmp_path):
    log = [{"step": i, "loss": float("nan") if 40 < i < 50 else i / 7} for i in range(1001)]
    _, panels, _ = report(write_run(tmp_path / "a", log))
    marks, last = panels["loss per token (nats)"]
    expected = [i for i in range(0, 1001, 11) if not 40 < i < 50]
    assert marks == [f"step {i}: {i / 7:.6g}" for i in expected]
    assert last == ["142.9"]


def test_completions_are_text_and_none_is_cut(tmp_path):
    long = "a very long line. " * 100 + "THE END"
    before = [{"prompt": MARKUP, "student": MARKUP}, {"prompt": "p", "student": ""}]
    after = [
        {"prompt": MARKUP, "student": long, "teacher": f"yes\u2028{MARKUP}", "score": 1 / 3},
        {"prompt": "p", "student": "\ud800", "teacher": None, "score": None},
    ]
    text, *_ = report(write_run(tmp_path / "a", samples={0: before, 2: after}))
    assert "<script" not in text
    assert "<img" not in text
    assert text.count(str(html.escape(MARKUP, quote=False)).partition("=")[0]) == 3
    assert "THE END</details>" in text
    assert f"{len(long)} characters" in text
    titles = re.findall(r'<div class="text" dir="auto"><small>(.*?)</small>', text)
    assert titles == [
        *("before (step 0)", "after (step 2), score 0.3333", "teacher"),
        *("before (step 0)", "after (step 2)"),
    ]


def test_recipes_are_side_by_side_and_what_differs_is_marked_and_first(tmp_path):
    configs = {"k": 8, "objective": "reverse_kl", "lr": 1e-5}, {"k": 8, "objective": MARKUP}, None
    runs = [write_run(tmp_path / str(i), config=x) for i, x in enumerate(configs)]
    text, _, cells = report(*runs)
    assert re.findall('<tr class="differs"><th>(.*?)</th>', text) == ["objective", "lr"]
    assert [*cells][-3:] == ["objective", "lr", "k"]
    assert [html.unescape(x) for x in cells["objective"]] == ["reverse_kl", MARKUP]
    assert cells["lr"] == ["1e-05", "–"]
    assert cells["k"] == ["8", "8"]


@pytest.mark.parametrize("log", [[], LOG[1:2], LOG[:1], LOG[1:3]], ids=str)
def test_a_run_with_little_in_it(tmp_path, log):
    run = write_run(tmp_path / "a", log)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # not written to its end
    text, panels, cells = report(run)
    plot_curves(run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    has_loss, is_evaluated = any("loss" in x for x in log), log == LOG[:1]
    assert ("loss per token (nats)" in panels) == has_loss
    table = before_after(run)
    assert table == (run / "report.md").read_text().rstrip("\n")
    if is_evaluated:
        assert "| reverse KL | 4.250 | 4.250 |" in table
        assert cells["held-out reverse KL"] == ["4.25"]
    else:
        assert table == "No held-out evaluation was logged."
    assert "None were kept." in text
    assert "No run kept its config.json." in text


def test_before_after_goes_without_a_teacher(tmp_path):
    rows = {0: [{"prompt": "p", "student": "a\nb"}], 2: [{"prompt": "p", "student": "c" * 300}]}
    assert before_after(write_run(tmp_path / "a", samples=rows)).splitlines() == [
        "| held-out | before | after |",
        "|---|---|---|",
        "| reverse KL | 4.250 | 1.750 |",
        "| score | 0.125 | 0.875 |",
        *("", "**p**", "- before: a b", f"- after: {'c' * 240}"),
    ]


def test_a_directory_of_no_run_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ValueError, match=r"other: expected a recipe's output_dir; it has no metrics"
    ):
        write_report([write_run(tmp_path / "a"), tmp_path / "other"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_a_browser_shows_all_of_it_and_runs_and_fetches_nothing(tmp_path, width, dark):
    rows = [{"prompt": MARKUP, "student": MARKUP + " word" * 100, "teacher": MARKUP, "score": 1}]
    samples, alarm = {0: rows, 2: rows}, {"step": 2, "alarm": MARKUP}
    runs = [
        write_run(tmp_path / "a", [*LOG, alarm], samples, {"note": MARKUP, "k": 8}),
        write_run(
            tmp_path / "b", [*LOG, {"step": 3, MARKUP: 5.0}], samples, {"note": "no", "k": 8}
        ),
    ]
    _, panels, _ = report(*runs)
    size = "(x => [x.getBoundingClientRect().width, x.getBoundingClientRect().height])"
    script = f"""{{
        page: [document.documentElement.scrollWidth, innerWidth],
        panels: [...document.querySelectorAll("figure svg")].map({size}),
        markup: document.querySelectorAll("script, img, iframe, link").length,
        marks: document.querySelectorAll("svg use title").length,
        background: getComputedStyle(document.body).backgroundColor,
        completion: document.querySelector(".text[dir] details").textContent,
    }}"""
    picture = tmp_path / "page.png"
    seen = open_page(tmp_path / "report.html", picture, width, dark, script)
    assert seen["title"] == f"Report: {runs[0]}, {runs[1]}"
    assert (seen["errors"], seen["requests"]) == ([], [])
    assert seen["value"]["page"] == [width, width]
    assert len(seen["value"]["panels"]) == len(panels) == 7
    assert all(300 < wide <= width and tall > 100 for wide, tall in seen["value"]["panels"])
    assert seen["value"]["markup"] == 0
    assert seen["value"]["marks"] == sum(len(marks) for marks, _ in panels.values())
    assert seen["value"]["background"] == ("rgb(20, 23, 26)" if dark else "rgb(245, 246, 248)")
    assert seen["value"]["completion"].endswith(rows[0]["student"])
    assert seen["text"].count(MARKUP) >= 5
    assert "4.25 → 1.75" in seen["text"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_browser
def test_the_browser_would_tell(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        f"<title>quiet</title>{MARKUP}<img src='http://localhost:9/x.png'><script>no()</script>"
    )
    seen = open_page(page, tmp_path / "page.png")
    assert seen["title"] == "pwned"
    assert "http://localhost:9/x.png" in seen["requests"]
    assert ["no is not defined" in error for error in seen["errors"]].count(True) == 1
