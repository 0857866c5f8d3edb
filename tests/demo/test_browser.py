"""The page in a browser: what a visitor reads there is what the scripts print."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import page as layout
from experiments.finished_runs import load_run

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
REVIEW = "dull , but train film 3 is witty"
SETTINGS = ("max_iters=2", "eval_interval=1", "train_size=64", "test_size=16", "device=cpu",
            "dtype=float32", "eval_iters=1")
NUMBER = r"P\(\w+\) =\s*(\d\.\d{4})"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: object, trained: Path) -> Iterator[object]:
    """The page on two finished runs, in a window of 400 pixels."""
    yield from open_page(browser, trained)


def open_page(browser: object, root: Path) -> Iterator[object]:
    blocks = layout.build(root, *SETTINGS)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False,
                                  css_paths=ROOT / "demo" / "style.css")
    window = browser.new_page(viewport={"width": 400, "height": 900})
    window.set_default_timeout(120_000)
    window.asked, window.errors = [], []
    window.on("request", lambda request: window.asked.append(request.url))
    window.on("pageerror", lambda error: window.errors.append(str(error)))
    window.goto(address)
    yield window
    assert window.errors == []
    outside = [url for url in window.asked if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    window.close()
    blocks.close()


def ask(window: object, review: str) -> None:
    window.locator("#text textarea").fill(review)
    window.locator("#text textarea").press("Enter")


def open_tab(window: object, name: str) -> None:
    """Open a tab, which a narrow window may have in the menu behind the dots."""
    tab = window.get_by_role("tab", name=name)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        window.locator(".overflow-menu > button").first.click()
        window.locator(".overflow-dropdown button", has_text=name).click()


def wait_for(window: object, selector: str, text: str) -> str:
    """Wait until an element holds `text`; return all that it says."""
    window.locator(selector, has_text=text).first.wait_for()
    return window.locator(selector).first.inner_text()


def generated(*settings: str) -> list[str]:
    """The probabilities that generate.py prints for the review."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), f"text={REVIEW}", "device=cpu",
         "dtype=float32", *settings], capture_output=True, text=True, check=True)
    return re.findall(NUMBER, done.stdout)


def test_answers_and_strengths_are_those_of_generate(
    opened: object, trained: Path, reviews: str
) -> None:
    wait_for(opened, "#ask", "s")  # the first example is answered by itself
    ask(opened, REVIEW)
    base = generated(f"init_from={trained / 'base'}", f"dataset={reviews}")
    lora = generated(f"out_dir={trained / 'lora'}")
    bitfit = generated(f"out_dir={trained / 'bitfit'}")
    opened.locator("#ask article", has_text=lora[1]).wait_for()
    assert re.findall(NUMBER, opened.locator("#ask").inner_text()) == [*base, *lora, *bitfit]

    open_tab(opened, "The strength of LoRA")
    answer = "#strength article"
    assert re.findall(NUMBER, wait_for(opened, answer, "ΔW × 1")) == lora
    slider = opened.get_by_label("range slider for s")
    slider.press("Home")
    assert re.findall(NUMBER, wait_for(opened, answer, "ΔW × 0")) == base
    slider.press("ArrowRight")
    assert re.findall(NUMBER, wait_for(opened, answer, "ΔW × 0.1")) != base
    row = opened.locator("#strength tr", has_text="P(positive)").inner_text().split()
    assert (row[1], row[11]) == (base[1], lora[1])
    assert opened.locator("#strength img").get_attribute("alt").startswith("P(positive) over s")


def test_every_tab_fits_the_narrow_window_and_answers_anew(opened: object) -> None:
    wait_for(opened, "#ask", "s")
    for name, selector, text in (
            ("Inside", "#inside", "singular values"), ("Curves", "#curves", "python train.py"),
            ("Prompts", "#prompt", "supervised: 2 tokens")):
        open_tab(opened, name)
        wait_for(opened, selector, text)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 400
    open_tab(opened, "Inside")
    ask(opened, "<b>odd</b> ${words}")
    assert "<b>odd</b>" in wait_for(opened, "#inside .words", "${words}")
    ask(opened, " ")
    assert "no words" in wait_for(opened, "#inside .sorry", "Type a text")


def test_without_runs_the_page_trains_one_and_shows_it(browser: object, tmp_path: Path) -> None:
    for window in open_page(browser, tmp_path):
        assert "garbage" in wait_for(window, "#ask", "before training")
        window.get_by_role("button", name="Train the quickstart").click()
        printed = window.locator("#printed textarea")
        window.wait_for_function("document.querySelector('#printed textarea').value"
                                 ".includes('The run is finished.')")
        assert "score it again:" in printed.input_value()
        wait_for(window, "#ask", str(tmp_path / "quickstart"))
        assert load_run(tmp_path / "quickstart").config.max_iters == 2
        assert not window.get_by_role("button", name="Train the quickstart").is_visible()
