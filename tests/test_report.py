"""The report, from folders that hold what real runs leave; then in a real browser."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from trl_score.records import Store
from trl_score.report import COLORS, find, training_figure, write_report
from trl_score.report.figures import attempts_figure, figures, scaling_figure, smoothed, stage_boundaries, style, svg
from trl_score.report.mathematics import formulas
from trl_score.report.page import browser_data
from trl_score.report.tables import paired_difference, statistics_rows


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7 * 7 }} \u2028 \x00 \ud800"


def save_evaluation(folder, model, verdicts, texts=None, problems=None, **more):
    settings = {
        "model": model, "task": "arithmetic", "split": "test", "temperature": 0.0, "top_p": 1.0, "num_attempts": 2,
        "num_samples": 1, "max_completion_length": 8, **more,
    }  # fmt: skip
    store = Store(folder, settings | {"weights": "1"}, problems or [str(i) for i in range(len(verdicts))])
    store.add(
        [
            {
                "index": i, "sample": 0, "prompt": [{"role": "user", "content": f"problem number {i}"}], "correct": row,
                "attempts": (texts or {}).get(i, [f"first line of {i}\nanswer one", f"first line of {i}\nanswer two"]),
                "rewards": [None if right is None else float(right) for right in row], "answers": ["a", "b"], "changed_answer": True,
                "edit_distance_ratio": [0.1], "num_tokens": [4, 5], "truncated": [False, True], "level": 1 + i % 3,
                **({"feedback": [f"feedback of {i} {HOSTILE}"]} if more.get("self_refine") else {}),
            }
            for i, row in enumerate(verdicts)
        ]
    )  # fmt: skip
    store.all_rollouts()


def save_run(folder, steps=20, stages=None, settings=None, planned=None):
    folder.mkdir(parents=True)
    stages = stages or {step: 1 if step <= steps // 2 else 2 for step in range(1, steps + 1)}
    history = [
        {
            "step": step, "stage": stage, "accuracy_t1": 0.5, "accuracy_t2": 0.5 + step / 100,
            "delta_t1_t2": step / 100, "delta_i_to_c": step / 100, "delta_c_to_i": 0.0, "changed_ratio": None,
            "reward_t1": 0.5, "reward_t2": 0.6, "kl_t1": 0.0, "kl_t2": 0.1,
        }
        for step, stage in stages.items()
    ]  # fmt: skip
    state = {
        "log_history": [{"eval_stage": 1}, *history],
        "global_step": max(stages),
        "max_steps": planned or max(stages),
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if settings is not None:
        (folder / "score_run.json").write_text(json.dumps({"settings": settings}))


@pytest.fixture
def folders(tmp_path):
    save_evaluation(tmp_path / "base", "me/base", [[True, False], [False, False], [True, True], [False, True]])
    save_evaluation(
        tmp_path / "score", "/home/someone/secret/score", [[False, True]] * 4, {1: [HOSTILE, HOSTILE + "!"]}
    )
    save_run(tmp_path / "run")
    save_run(tmp_path / "run" / "_best-stage2")  # a copy of a checkpoint, not a run
    (tmp_path / "scale").mkdir()
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    budgets = [{"budget": b, "parallel": entry, "corrected": entry} for b in (2, 4)]
    (tmp_path / "scale" / "scaling.json").write_text(
        json.dumps({"settings": {"model": "me/base"}, "budgets": budgets})
    )
    return [tmp_path / name for name in ("base", "score", "run", "scale")]


def test_everything_is_found_also_in_the_folder_above(folders, tmp_path):
    for given in (folders, [tmp_path]):
        found = find(given)
        assert (
            found.evaluations.keys() == {"base", "score"} and found.runs.keys() == {"run"} and len(found.scalings) == 1
        )
    assert find([folders[0], folders[0]]).evaluations.keys() == {"base"}
    other = shutil.copytree(folders[0], folders[0].parent / "other")
    assert find([folders[0], other]).evaluations.keys() == {"base", "base (other)"}


def test_page_has_tables_and_figures_and_needs_nothing_else(folders, tmp_path):
    page = write_report(folders, tmp_path / "out" / "report.html", figure_dir=tmp_path / "figures").read_text("utf-8")
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"Accuracy@t2\s+50\.0\s+\[0\.0, 100\.0\]\s+100\.0\s+\[100\.0, 100\.0\]", text)
    assert "by level" in text and "4 × 1" in text and "greedy" in text
    assert page.count("<svg") == 4 and "Stage I | II" in page
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    assert "/home/someone" not in page
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert made == {
        f"{name}.{kind}" for name in ("training", "attempts", "edit-distance", "scaling") for kind in ("png", "svg")
    }
    again = write_report(folders, tmp_path / "again.html", figure_dir=tmp_path / "figures")
    assert again.read_text("utf-8") == page  # the same, every time


def test_model_text_is_data_in_the_page(folders, tmp_path):
    page = write_report(folders, tmp_path / "report.html").read_text("utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page


def test_a_folder_with_nothing_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation \(settings.json\)"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        write_report([tmp_path / "missing"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="`max_rollouts=-1` is negative"):
        write_report([tmp_path / "empty"], tmp_path / "report.html", max_rollouts=-1)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    def open_page(path, width=1280, fragment="", **context):
        page = browser.new_page(viewport={"width": width, "height": 800}, **context)
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on(
            "request", lambda request: page.faults.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto(path.as_uri() + fragment)
        return page

    return open_page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_browser_of_rollouts_filters_and_searches(folders, tmp_path, open_page, width):
    page = open_page(write_report(folders, tmp_path / "report.html"), width)
    count = lambda: page.locator(".rollout").count()  # noqa: E731
    assert count() == 4 and page.faults == []
    for transition, number in (("i→c", 1), ("c→i", 1), ("i→i", 1), ("c→c", 1), ("?", 0), ("", 4)):
        page.select_option("#transition", transition)
        assert count() == number, transition
    page.fill("#search", "NUMBER 2")
    assert count() == 1 and "problem number 2" in page.inner_text(".rollout")
    assert page.locator(".rollout del").inner_text() == "one" and page.locator(".rollout ins").inner_text() == "two"
    page.fill("#search", "nowhere")
    assert count() == 0 and "0 rollouts" in page.inner_text("#where")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out on a phone
    assert page.faults == []


def test_a_hostile_completion_stays_text(folders, tmp_path, open_page):
    page = open_page(write_report(folders, tmp_path / "report.html"))
    page.select_option("#evaluation", "1")
    page.fill("#search", "onerror")
    assert "<script>document.title='owned'</script>" in page.inner_text(
        ".rollout"
    ) and "{{ 7 * 7 }}" in page.inner_text(".rollout")
    assert page.title() == "Self-correction report" and page.locator(".rollout img").count() == 0 and page.faults == []


def test_feedback_stands_between_the_attempts(tmp_path, open_page):
    save_evaluation(tmp_path / "refined", "me/base", [[False, True], [True, True]], self_refine=True)
    page = open_page(write_report([tmp_path / "refined"], tmp_path / "report.html"))
    assert page.locator("#metrics thead th").all_inner_texts() == ["metric", "base, Self-Refine"]
    page.fill("#search", "FEEDBACK OF 1")
    assert page.locator(".rollout").count() == 1
    heads = [text.split(":")[0] for text in page.locator(".rollout h3").all_inner_texts()]
    assert heads == ["attempt 1", "feedback on attempt 1", "attempt 2"]
    assert "<script>document.title='owned'</script>" in page.inner_text(".rollout")
    assert page.title() == "Self-correction report" and page.faults == []


def test_two_thousand_rollouts_stay_responsive(tmp_path, open_page):
    long = {
        i: [f"{i} " + "some words of a long attempt " * 120, f"{i} " + "other words of a long attempt " * 120]
        for i in range(2000)
    }
    save_evaluation(tmp_path / "many", "many", [[False, i % 2 == 0] for i in range(2000)], long)
    page = open_page(write_report([tmp_path / "many"], tmp_path / "report.html"))
    started = time.monotonic()
    page.select_option("#transition", "i→c")
    page.fill("#search", "998 some")
    assert page.locator(".rollout").count() == 2  # 998, 1998
    page.fill("#search", "")
    page.click("#after")
    assert "1000 rollouts, page 2 of 40" in page.inner_text("#where")
    assert time.monotonic() - started < 10 and page.faults == []


def test_a_folder_is_shown_once_and_collections_are_left_out(tmp_path):
    run = tmp_path / "run"
    save_evaluation(run / "evaluation", "me/base", [[False, True], [True, True]])
    save_evaluation(run / "rollouts-1", "me/base", [[False, True], [True, True]])
    settings = run / "rollouts-1" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"token_ids": True}))
    assert list(find([run / "evaluation", run]).evaluations) == ["base"]
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        find([run / "rollouts-1"])


# --- what is found, and how it is named ---


def test_a_running_training_is_shown_from_its_last_whole_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        save_run(run / f"checkpoint-{step}", stages=dict.fromkeys(range(1, step + 1), 1), planned=90)
    (run / "checkpoint-30").mkdir()
    (run / "checkpoint-30" / "trainer_state.json").write_text('{"log_history": [')  # is being written
    (run / "score_run.json").write_text(json.dumps({"settings": {"alpha": "10.0"}}))
    for given in (run, tmp_path, run / "checkpoint-20"):
        (found,) = find([given]).runs.values()
        assert (found.step, found.max_steps, found.settings) == (20, 90, {"alpha": "10.0"})
    assert find([tmp_path]).runs.keys() == {"run"}
    ((title, text, _),) = figures(find([run])).values()
    assert title == "Training: run, 20 of 90 steps" and "From step 1 to 20, accuracy: attempt 1 0.50 to 0.50" in text


def test_an_evaluation_that_still_runs_says_how_far_it_is(tmp_path):
    save_evaluation(tmp_path / "some", "me/base", [[False, True], [True, True]], num_problems=10)
    assert "2 × 1 (2 of 10 so far)" in write_report([tmp_path], tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("text", ['{"editor.tabSize": 4}', "{// a comment\n}"])
def test_settings_of_another_program_are_no_evaluation(tmp_path, text):
    save_evaluation(tmp_path / "base", "me/base", [[False, True]])
    (tmp_path / ".vscode").mkdir()
    (tmp_path / ".vscode" / "settings.json").write_text(text)
    assert find([tmp_path]).evaluations.keys() == {"base"}
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        find([tmp_path / ".vscode"])


def test_a_model_in_the_current_folder_has_a_name(tmp_path):
    save_evaluation(tmp_path / "here", ".", [[False, True]])
    assert find([tmp_path]).evaluations.keys() == {"."}


def test_levels_and_problems_of_any_text_are_shown(tmp_path):
    save_evaluation(tmp_path, "me/base", [[False, True]] * 3)
    file = tmp_path / "rollouts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["level"], rows[1]["level"], rows[2]["level"] = "²", None, "3"
    rows[2]["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([tmp_path], tmp_path / "report.html").read_text("utf-8")
    assert "² (1 problems)" in page and "in parts" in page and "None (" not in page


def test_evaluations_of_one_model_are_told_apart_by_what_differs(tmp_path):
    verdicts = [[False, True], [True, True]]
    for name, settings in {
        "a": {"correction_instruction": "Check it."},
        "b": {"correction_instruction": "Try again."},
        "c": {"correction_instruction": "Try again.", "temperature": 0.7},
    }.items():
        save_evaluation(tmp_path / name, "me/base", verdicts, **settings)
    save_evaluation(tmp_path / "d", "me/run/checkpoint-10", verdicts, correction_instruction="Check it.")
    found = find([tmp_path])
    assert list(found.evaluations) == [
        "base, instruction A, greedy", "base, instruction B, greedy", "base, instruction B, temperature 0.7",
        "run/checkpoint-10",
    ]  # fmt: skip
    assert found.instructions == {"A": "Check it.", "B": "Try again."}
    text = re.sub(r"<[^>]+>", " ", write_report([tmp_path], tmp_path / "report.html").read_text("utf-8"))
    assert re.search(r"correction instruction\s+A\s+B\s+B\s+A", text)
    assert re.search(r"Correction instruction B\s+Try again\.", text)


def test_the_best_checkpoints_of_a_run_have_its_name(tmp_path):
    """A legend leaves out a name that begins with an underscore."""
    save_evaluation(tmp_path / "a", "out/run/_best-stage2", [[False, True]])
    assert list(find([tmp_path]).evaluations) == ["run/_best-stage2"]


def test_an_evaluation_beside_a_scaling_study_is_shown(tmp_path):
    (tmp_path / "scaling.json").write_text(json.dumps({"settings": {"model": "me/base"}, "budgets": []}))
    for name in ("greedy", "corrected", "parallel"):
        save_evaluation(tmp_path / name, f"me/{name}", [[False, True]])
    assert list(find([tmp_path]).evaluations) == list(find([tmp_path / "greedy"]).evaluations) == ["greedy"]


def test_an_evaluation_in_a_folder_named_like_a_checkpoint_is_shown(tmp_path):
    save_evaluation(tmp_path / "checkpoint-10", "me/base", [[False, True]])
    assert list(find([tmp_path]).evaluations) == ["base"]


# --- figures ---


def test_the_boundary_is_at_the_step_where_the_stage_changed():
    """Logs every 10 steps and a Stage I of 24: the third log is the mean of 4 steps of Stage I and 6 of Stage II."""
    logs = [{"step": step, "stage": stage} for step, stage in ((10, 1.0), (20, 1.0), (30, 1.6), (40, 2.0))]
    assert stage_boundaries(logs) == [pytest.approx(24)]
    assert stage_boundaries(logs[2:]) == [pytest.approx(12)]  # of a first log, the interval begins at step 0
    assert stage_boundaries([{"step": 10, "stage": 1.0}, {"step": 20, "stage": 2.0}]) == [10]
    assert stage_boundaries([{"step": 10, "stage": 2.0}, {"step": 20, "stage": 2.0}]) == []
    cycles = [{"step": step, "stage": stage} for step, stage in ((10, 1.0), (20, 2.0), (30, 1.0), (40, 1.5))]
    assert stage_boundaries(cycles) == [10, 20, 35]


def test_curves_are_smoothed_within_a_stage_and_the_values_stay_behind():
    steps, values = np.arange(1, 101), np.r_[np.zeros(50), np.ones(50)] + np.tile([0.1, -0.1], 50)
    curve = smoothed(steps, values, [50])
    assert curve[:50].max() < 0.05 and curve[50:].min() > 0.95  # no step leaks over the boundary
    assert abs(curve[:45]).max() < 0.1 < abs(values[:45]).max() + 1e-9
    assert np.isnan(smoothed([1, 2], np.array([np.nan, 1.0]))[0])
    history = [
        {"step": step, "stage": 1 if step <= 50 else 2, "accuracy_t1": value, "accuracy_t2": value, "reward_t1": value,
         "reward_t2": value, "kl_t1": 0.0, "kl_t2": 0.0, "delta_t1_t2": 0.0, "delta_i_to_c": 0.0, "delta_c_to_i": 0.0}
        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
    ]  # fmt: skip
    raw, smooth = training_figure(history).axes[0].lines[:2]
    assert np.allclose(raw.get_ydata(), values) and raw.get_alpha() < 1 and np.allclose(smooth.get_ydata(), curve)


def test_forty_lines_look_different_and_every_evaluation_has_one(tmp_path):
    looks = {(style(i)["color"], style(i)["linestyle"]) for i in range(40)}
    assert len(looks) == 40 and len(set(COLORS)) == 10
    for i in range(12):
        save_evaluation(tmp_path / f"e{i:02}", f"me/model-{i:02}", [[False, True], [True, True]])
    save_evaluation(tmp_path / "score", "me/my-score", [[False, True], [True, True]])
    found = find([tmp_path])
    figure = attempts_figure(found.evaluations, found.trained)
    widths = {line.get_label(): line.get_linewidth() for line in figure.axes[0].lines}
    assert len(widths) == 13 and widths.pop("my-score") > max(widths.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(found.evaluations)


@pytest.mark.parametrize("name", [r"$\undefined$", "$x_$", "_mine", "a$b"])
def test_names_are_no_formulas_and_are_in_the_legend(tmp_path, name):
    save_evaluation(tmp_path / "one", f"me/{name}", [[False, True]])
    save_evaluation(tmp_path / "two", "me/other", [[False, True]])
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    study = {"settings": {"model": f"me/{name}"}, "budgets": [{"budget": 2, "parallel": entry, "corrected": entry}]}
    (tmp_path / "scaling.json").write_text(json.dumps(study))
    made = figures(find([tmp_path]))
    assert made.keys() == {"attempts", "edit-distance", "scaling"}
    for _, _, figure in made.values():
        drawn = svg(figure)
        assert re.search(rf">\s*{re.escape(name)}", drawn)


def test_every_attempt_of_a_long_rollout_is_drawn(tmp_path):
    store = Store(tmp_path / "twelve", {
        "model": "m", "weights": "1", "task": "t", "split": "test", "temperature": 0.0, "top_p": 1.0, "max_completion_length": 8
    }, ["0"])  # fmt: skip
    row = {
        "index": 0,
        "sample": 0,
        "prompt": "x",
        "attempts": ["a"] * 12,
        "correct": [True] * 12,
        "changed_answer": False,
    }
    store.add([row | {"edit_distance_ratio": [0.0] * 11, "num_tokens": [1] * 12, "truncated": [False] * 12}])
    store.all_rollouts()
    found = find([tmp_path])
    assert len(attempts_figure(found.evaluations).axes[0].lines[0].get_xdata()) == 12
    assert figures(found)["attempts"][1].count("100.0 %") == 12
    log = {"step": 1, "stage": 1, "delta_t1_t12": 0.5} | {f"accuracy_t{k}": 0.5 for k in range(1, 13)}
    accuracy, change, *_ = training_figure([log, log | {"step": 2}]).axes
    assert len(accuracy.get_legend().get_texts()) == 12 and change.lines[1].get_ydata()[0] == 0.5


def test_a_study_without_a_graded_problem_is_drawn_without_a_value():
    nothing = {"value": None, "low": None, "high": None}
    budgets = [{"budget": budget, "parallel": nothing, "corrected": nothing} for budget in (2, 4)]
    assert "samples per problem" in svg(scaling_figure({"model": budgets}))


# --- statistics ---


def test_the_difference_to_the_base_is_paired_by_problem(tmp_path):
    """Both models are right at the same half of the problems but for one: the difference is far surer than either."""
    easy = [[i % 2 == 0] * 2 for i in range(40)]
    save_evaluation(tmp_path / "base", "me/base", easy)
    save_evaluation(tmp_path / "other", "me/other", [[False, True], [False, True], *easy[2:30]])  # 30 of the problems
    base, other = find([tmp_path / "base", tmp_path / "other"]).evaluations.values()
    found, number = paired_difference(base, other)
    assert number == 30
    assert found["accuracy_t2"]["value"] == pytest.approx(1 / 30) and found["accuracy_t1"]["value"] == pytest.approx(
        -1 / 30
    )
    assert found["delta_t1_t2"]["value"] == pytest.approx(2 / 30)
    width = found["accuracy_t2"]["high"] - found["accuracy_t2"]["low"]
    alone = other.summary["metrics"]["accuracy_t2"]
    assert width < 0.4 * (alone["high"] - alone["low"])
    text = re.sub(r"<[^>]+>", " ", write_report([tmp_path], tmp_path / "report.html").read_text("utf-8"))
    assert re.search(r"Difference to base.*Accuracy@t2\s+\+3\.3\s+\[0\.0, 10\.0\]", text, re.S)


def test_a_problem_that_the_data_hold_several_times_counts_as_often_in_every_table(tmp_path):
    """One problem four times and another one once: 0 of 5 are right, then 4 of 5, so the difference is 0.8 and not 0.5."""
    problems = ["p", "p", "p", "p", "q"]
    save_evaluation(tmp_path / "base", "me/base", [[False, False]] * 5, problems=problems)
    save_evaluation(tmp_path / "other", "me/other", [[True, True]] * 4 + [[False, False]], problems=problems)
    evaluations = find([tmp_path]).evaluations
    base, other = evaluations.values()
    found, number = paired_difference(base, other)
    assert number == 5 and found["accuracy_t2"]["value"] == pytest.approx(0.8)
    assert found["accuracy_t2"]["value"] == pytest.approx(other.summary["metrics"]["accuracy_t2"]["value"])
    error = next(row for row in statistics_rows(evaluations) if row.label == "standard error of Accuracy@t2")
    assert [cell for cell, _ in error.cells] == ["0.0", "20.0"]


def test_statistics_have_pass_at_k_clusters_and_the_power(tmp_path):
    save_evaluation(tmp_path / "one", "me/one", [[i % 3 == 0, i % 2 == 0] for i in range(60)])
    evaluations = find([tmp_path / "one"]).evaluations
    for row in evaluations["one"].rollouts:  # a second sample of each problem
        row["sample"] = 0
    evaluations["one"].rollouts += [
        row | {"sample": 1, "correct": [True, True]} for row in evaluations["one"].rollouts
    ]
    evaluations["one"].settings["num_samples"] = 2
    rows = {row.label: row.cells[0][0] for row in statistics_rows(evaluations)}
    assert rows["pass@1, attempt 1"] == "66.7" and rows["pass@2, attempt 1"] == "100.0"
    assert rows["standard error of Accuracy@t2, by level"].endswith("(3 clusters)")
    assert (
        "smallest Δ(t1,t2) that is found" in rows
        and int(rows["problems to find Δ(t1,t2) of 1"].replace(",", "")) > 1000
    )


# --- the page, in a browser ---

AXE = os.environ.get("AXE")  # path of axe.min.js, of the package axe-core of npm
MATHEMATICS = (
    "The half of $\\frac{3}{4}$ is \\(x^2\\), so \\[\\boxed{\\sqrt{5}}\\] It costs $5 or $6. $\\undefinedcommand{2}$ "
    "$\\text{<img src=x onerror=document.title='owned'>}$ $\\href{javascript:document.title='owned'}{y}$"
)


@pytest.fixture
def whole(folders, tmp_path):
    """A page with everything: two evaluations, a run with settings, a study, mathematics."""
    save_run(
        tmp_path / "trained",
        settings={"alpha (bonus), gamma (discount)": "10.0, 0.0", "seed": "42", "date": "2026-01-02"},
    )
    save_evaluation(
        tmp_path / "maths", "me/maths", [[False, True]] * 30, {0: [MATHEMATICS, MATHEMATICS.replace("5", "7")]}
    )
    return write_report([*folders, tmp_path / "trained", tmp_path / "maths"], tmp_path / "report.html")


def test_settings_of_the_training_are_in_the_page(whole):
    text = re.sub(r"<[^>]+>", " ", whole.read_text("utf-8"))
    assert re.search(r"alpha \(bonus\), gamma \(discount\)\s+10\.0, 0\.0", text) and re.search(
        r"date\s+2026-01-02", text
    )


def test_the_same_problem_stands_side_by_side_and_is_linked_to(whole, open_page):
    page = open_page(whole)
    page.select_option("#compare", label="score")
    cards = page.locator(".rollout")
    assert cards.count() == 4 and page.locator(".rollout >> nth=1 >> .model").all_inner_texts() == [
        "base: i→i",
        "score: i→c",
    ]
    page.select_option("#there", "c→i")
    assert cards.count() == 0
    page.select_option("#there", "i→c")
    page.select_option("#transition", "c→i")
    assert cards.count() == 1 and "problem number 0" in cards.inner_text()
    linked = open_page(whole, fragment=page.locator(".rollout a").get_attribute("href"))
    assert linked.evaluate("document.activeElement.dataset.id") == "0"
    assert linked.locator(".rollout >> nth=0 >> .model").all_inner_texts()[1] == "score: i→c"
    later = open_page(whole, fragment="#e=maths&r=29", width=390)
    assert later.locator(".rollout").count() == 6 and "page 4 of 4" in later.inner_text(
        "#where"
    )  # 8 to a page on a phone
    assert later.evaluate("document.activeElement.dataset.id") == "29"
    missing = open_page(whole, fragment="#e=maths&r=99")
    assert "There is no problem 99 here" in missing.inner_text("#where") and missing.locator(".rollout").count() == 25
    assert page.faults == linked.faults == later.faults == missing.faults == []


def test_the_keyboard_moves_between_rollouts(whole, open_page):
    page = open_page(whole, fragment="#e=maths&r=0")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.dataset.id") == "1"
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.dataset.id") == "0"


def test_mathematics_is_rendered_and_only_mathematics(whole, open_page):
    page = open_page(whole, fragment="#e=maths&r=0")
    first = page.locator(".attempt").first
    assert (
        first.locator("math").count() == 4
        and first.locator("mfrac").count() == 1
        and first.locator("msqrt").count() == 1
    )
    assert "It costs $5 or $6." in first.inner_text() and "$\\undefinedcommand{2}$" in first.inner_text()
    assert page.locator(".attempt >> nth=1 >> ins").count() >= 1
    assert (
        page.locator(".attempt img, .attempt a, .attempt script").count() == 0
        and page.title() == "Self-correction report"
    )
    page.uncheck("#mathematics")
    assert page.locator("#list math").count() == 0 and "$\\frac{3}{4}$" in first.inner_text()
    assert page.faults == []


def test_on_a_phone_the_first_column_stays(whole, open_page):
    page = open_page(whole, width=390)
    place = lambda: page.locator("#metrics tbody th").first.bounding_box()["x"]  # noqa: E731
    before = place()
    page.locator("#results .scroll").first.evaluate("element => element.scrollLeft = 100")
    assert (
        page.locator("#results .scroll").first.evaluate("element => element.scrollLeft") == 100 and place() == before
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 820, 390])
def test_the_page_is_accessible(whole, open_page, width, scheme):
    """By axe, in both color schemes and at the widths of a desk, a tablet and a phone."""
    if AXE is None:
        pytest.skip("AXE does not name axe.min.js")
    page = open_page(whole, width=width, color_scheme=scheme, bypass_csp=True)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.select_option("#compare", "all")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate(open(AXE, encoding="utf-8").read())
    violations = page.evaluate(
        "axe.run().then(result => result.violations.map(each => [each.id, each.nodes[0].html]))"
    )
    assert violations == [] and page.evaluate("document.documentElement.scrollWidth") == width


# --- formulas ---


def test_a_model_may_have_a_long_name(tmp_path):
    name = "m" * 300  # of an endpoint; no file can have it
    save_evaluation(tmp_path / "evaluation", name, [[True, True]])
    assert list(find([tmp_path]).evaluations) == [name]


@pytest.mark.parametrize("text", ["\\[ ", "\\( x ", "$x\\", "$$x ", "\\\\[ "])
def test_text_full_of_open_formulas_takes_no_longer(text):
    start = time.process_time()
    assert formulas([text * (48_000 // len(text)) + "$y$"]).keys() <= {"$y$", "$$x $$"}
    assert time.process_time() - start < 2  # it took 5 s and more
    assert len(formulas(["\\[\\begin{matrix}1\\\\[6pt]2\\end{matrix}\\]"])) <= 1


def test_formulas_become_mathml_and_nothing_else():
    half = ["mfrac", {}, ["mrow", {}, ["mn", {}, "1"]], ["mrow", {}, ["mn", {}, "2"]]]
    code = "```\n$\\frac{9}{9}$\n```"
    found = formulas(["It is $\\frac{1}{2}$, not $5 or $6.", code, "\\[x^2\\] and $\\frac{1}{2}$"])
    assert found.keys() == {"$\\frac{1}{2}$", "\\[x^2\\]"}
    assert found["$\\frac{1}{2}$"] == ["math", {}, ["mrow", {}, half]]
    assert found["\\[x^2\\]"][1] == {"display": "block"}


@pytest.mark.parametrize(
    "formula",
    [
        "$\\href{javascript:alert(1)}{x}$",
        "$\\nosuchcommand{x}$",
        "$\\frac$",
        "$" + "x" * 3000 + "$",
        "$" + "{" * 900 + "$",
        "$" + "{" * 900 + "x" + "}" * 900 + "$",
    ],
    ids=["link", "unknown", "incomplete", "long", "deep", "deep and complete"],
)
def test_formulas_that_are_not_taken(formula):
    assert formulas([formula]) == {}


def test_no_style_or_tag_of_a_formula_comes_through():
    tree = formulas(["$\\style{position:fixed}{x} \\color{red}{y} \\text{<script>alert(1)</script>}$"])
    text = json.dumps(tree)
    assert "position" not in text.replace("\\\\style{position:fixed}", "") and '"mathcolor"' not in text
    assert '["mtext", {}, "<script>alert(1)</script>"]' in text and '"script"' not in text


def test_a_problem_with_its_own_instruction_is_shown_with_it(tmp_path):
    save_evaluation(
        tmp_path, "me/base", [[False, True]] * 2, correction_instruction="?", correction_instructions="by row"
    )
    (file,) = tmp_path.glob("rollouts*.jsonl")
    rows = [json.loads(line) | {"correction_instruction": f"again {i}"} for i, line in enumerate(file.open())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find([tmp_path])
    (evaluation,) = browser_data(found, 10)["evaluations"]
    assert [row["instruction"] for row in evaluation["rows"]] == ["again 0", "again 1"]
    assert evaluation["instruction"] == "Each problem has its own, in its column `correction_instruction`."


def test_browser_shows_the_problem_of_a_repair_and_not_its_instruction():
    """The given attempt and the instruction after it are part of the prompt there."""
    texts = [("user", "The problem."), ("assistant", "wrong"), ("user", "Correct it.")]
    row = {"prompt": [{"role": role, "content": text} for role, text in texts], "attempts": ["wrong", "right"]}
    row |= {"correct": [False, True], "index": 0}
    settings = {"num_given_attempts": 1, "correction_instruction": "Correct it.", "self_refine": False}
    evaluation = SimpleNamespace(settings=settings, summary={"num_samples": 1}, rollouts=[row])
    data = browser_data(SimpleNamespace(evaluations={"repair": evaluation}), 10)
    assert data["problems"] == ["The problem."]
