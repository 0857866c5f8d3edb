"""The notebook runs from its first cell to its last, offline, on a tiny model."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SHORT = "device=cpu dtype=float32 max_iters=2 eval_interval=1 batch_size=8 train_size=0"


@pytest.fixture(scope="module")
def notebook(
    checkpoint: str, reviews: str, tmp_path_factory: pytest.TempPathFactory
) -> nbformat.NotebookNode:
    """The executed notebook, run on a tiny model beside links to the code."""
    folder = tmp_path_factory.mktemp("colab")
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *packages, ROOT / "assets",
                 ROOT / "config"]:
        (folder / path.name).symlink_to(path)
    notebook = nbformat.read(ROOT / "run_in_colab.ipynb", as_version=4)
    values = {"BASE": checkpoint, "DATASET": reviews, "EXTRA": SHORT,
              "REVIEW": """it's "fun" & costs $5"""}
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in values.items():
        parameters.source, found = re.subn(
            rf'^{name} = ".*?"', f"{name} = {value!r}", parameters.source, flags=re.MULTILINE)
        assert found == 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # what `python` is
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        client = NotebookClient(notebook, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(folder)}})
        return client.execute()


def outputs(notebook: nbformat.NotebookNode, command: str) -> str:
    """What the cell of a `command` printed."""
    (cell,) = (cell for cell in notebook.cells
               if cell.cell_type == "code" and command in cell.source)
    return "".join(output.get("text", "") for output in cell.outputs)


def test_no_cell_failed(notebook: nbformat.NotebookNode) -> None:
    """A shell command that fails does not stop a notebook, so that its words must be read."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert "error:" not in output.get("text", ""), cell.source
            assert "Traceback" not in output.get("text", ""), cell.source


def test_every_claim_has_its_number(notebook: nbformat.NotebookNode) -> None:
    before = outputs(notebook, "generate.py init_from={BASE}")
    assert re.search(r"accuracy 0\.\d{4} \(95 % interval", before)
    trained = outputs(notebook, "config/lora_r128.py")
    assert "training 24,576 of 839,376 parameters (2.93%)" in trained
    table = re.compile(r"^ +best +\d.*\n +last +2 +\d.*", re.MULTILINE)
    assert table.search(outputs(notebook, "quote(PROMPT)"))
    again = outputs(notebook, "train.py init_from=resume")
    assert table.search(again)[0] == table.search(trained)[0]
    assert re.search(r"constrained accuracy 0\.\d{4}, calibrated 0", outputs(notebook, "shots=2"))
    assert "P(positive) = 0." in outputs(notebook, "quote(REVIEW)")


def test_tables_and_curves_stand_in_the_notebook(notebook: nbformat.NotebookNode) -> None:
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ())
             if output.output_type == "execute_result"]
    assert sum("image/png" in data for data in shown) == 1
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 2
    assert "2,359,296 (0.66%)" in pages[0]
    for title in ("before fine-tuning?", "three ranks", "What does α do", "Does the prompt",
                  "What does it cost?"):
        assert title in pages[1]
    assert pages[1].count("data:image/png;base64,") == 3


def test_each_run_is_made_once(notebook: nbformat.NotebookNode) -> None:
    assert outputs(notebook, "only=curves").count(": done") == 4
    assert outputs(notebook, "only=alpha").count(": done") == 1
    assert outputs(notebook, "only=zero_shot,prompts").count(": done") == 4 + 3
