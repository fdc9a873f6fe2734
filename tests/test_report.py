"""The report, from folders that hold what real runs leave; then in a real browser."""

import json
import os
import re
import shutil
import time

import pytest

from trl_score.records import Store
from trl_score.report import find, write_report


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7 * 7 }} \u2028 \x00 \ud800"


def save_evaluation(folder, model, verdicts, texts=None, **more):
    settings = {
        "model": model, "task": "arithmetic", "split": "test", "temperature": 0.0, "top_p": 1.0, "num_attempts": 2,
        "num_samples": 1, "max_completion_length": 8, **more,
    }  # fmt: skip
    store = Store(folder, settings | {"weights": "1"}, [str(i) for i in range(len(verdicts))])
    store.add(
        [
            {
                "index": i, "sample": 0, "prompt": [{"role": "user", "content": f"problem number {i}"}], "correct": row,
                "attempts": (texts or {}).get(i, [f"first line of {i}\nanswer one", f"first line of {i}\nanswer two"]),
                "rewards": [float(right) for right in row], "answers": ["a", "b"], "changed_answer": True,
                "edit_distance_ratio": [0.1], "num_tokens": [4, 5], "truncated": [False, True], "level": 1 + i % 3,
                **({"feedback": [f"feedback of {i} {HOSTILE}"]} if more.get("self_refine") else {}),
            }
            for i, row in enumerate(verdicts)
        ]
    )  # fmt: skip
    store.all_rollouts()


def save_run(folder, steps=20):
    folder.mkdir(parents=True)
    history = [
        {
            "step": step, "stage": 1 if step <= steps // 2 else 2, "accuracy_t1": 0.5, "accuracy_t2": 0.5 + step / 100,
            "delta_t1_t2": step / 100, "delta_i_to_c": step / 100, "delta_c_to_i": 0.0, "changed_ratio": None,
            "reward_t1": 0.5, "reward_t2": 0.6, "kl_t1": 0.0, "kl_t2": 0.1,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"eval_stage": 1}, *history]}))


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
    def open_page(path, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on(
            "request", lambda request: page.faults.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto(path.as_uri())
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
