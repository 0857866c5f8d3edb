"""The page's own API gives what its functions give, to two visitors too, and reaches no network."""

import ast
import html
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from gradio_client import Client

from configurator import run_script
from demo import page, tabs
from demo.__main__ import DemoConfig, main

ROOT = Path(__file__).parents[2]
TEXT = "train film 3 is witty"


def without_times(shown: str) -> str:
    return re.sub(r"\d+\.\d\d s", "", shown)


@pytest.fixture(scope="module")
def address(trained: Path) -> Iterator[str]:
    blocks = page.build(trained)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield address
    blocks.close()


def client(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def test_every_tab_has_an_endpoint_that_gives_its_html(address: str, trained: Path) -> None:
    visitor, run = client(address), str(trained / "lora")
    expected = {
        "/ask": (tabs.ask, TEXT, [run]), "/strength": (tabs.strength, TEXT, run, 0.5),
        "/inside": (tabs.inside, TEXT, run), "/curves": (tabs.curves, [run]),
        "/prompt": (tabs.prompt, run, 4, 1), "/accuracy": (tabs.accuracy, run),
    }
    assert visitor.view_api(return_format="dict")["named_endpoints"].keys() == {
        *expected, "/train"}
    for name, (fill, *values) in expected.items():
        assert without_times(visitor.predict(*values, api_name=name)) == without_times(
            fill(*values)), name
    assert "no words" in visitor.predict("", [run], api_name="/ask")


def test_two_visitors_get_their_own_answers(address: str, trained: Path) -> None:
    run, found = str(trained / "lora"), {}

    def visit(factor: float) -> None:
        found[factor] = client(address).predict(TEXT, run, factor, api_name="/strength")

    visits = [threading.Thread(target=visit, args=(factor,)) for factor in (0.0, 2.0)]
    for each in visits:
        each.start()
    for each in visits:
        each.join()
    for factor, shown in found.items():
        assert without_times(shown) == without_times(tabs.strength(TEXT, run, factor))
    assert len(found) == 2


def test_the_page_lists_lora_runs_first_and_says_what_is_missing(
    trained: Path, tmp_path: Path
) -> None:
    runs, run, notes, offer = page.listing(trained)
    names = [str(trained / name) for name in ("lora", "bitfit")]
    assert [value for _, value in runs.choices] == runs.value == names
    assert (run.value, notes.value, offer.visible) == (names[0], "", False)
    (tmp_path / "b*d").mkdir()
    (tmp_path / "b*d" / "config.json").write_text("{")
    runs, run, notes, offer = page.listing(tmp_path)
    assert (runs.value, run.value, offer.visible) == ([], None, True)
    assert notes.value.startswith("Not shown: ")
    assert r"b\*d/config.json" in html.unescape(notes.value)


def test_it_opens_a_local_address_without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Mock()
    monkeypatch.setattr(page, "build", lambda root: blocks)
    main(DemoConfig(out_dir="somewhere"))
    settings = blocks.launch.call_args.kwargs
    assert (settings["server_name"], settings["share"]) == ("127.0.0.1", False)
    assert settings["max_file_size"] == 1
    assert Path(settings["css_paths"]).is_file()
    assert all(isinstance(font, str) for font in settings["theme"]._font)
    main(DemoConfig(share=True, port=8000))
    assert blocks.launch.call_args.kwargs["share"] is True
    assert blocks.launch.call_args.kwargs["server_port"] == 8000


def test_without_gradio_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.setattr("sys.argv", ["demo"])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(main, DemoConfig)
    assert capsys.readouterr().err == (
        "error: gradio is missing: pip install -r requirements-demo.txt\n")


def test_only_the_page_needs_gradio() -> None:
    needing = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*.py")
               if path.parent.name != "tests" and any(
                   isinstance(node, ast.Import) and node.names[0].name == "gradio"
                   for node in ast.walk(ast.parse(path.read_text("utf-8"))))}
    assert needing == {"demo/__main__.py", "demo/page.py"}


def test_the_code_is_short() -> None:
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in (ROOT / "demo").glob("*.py"))
    assert lines <= 300
