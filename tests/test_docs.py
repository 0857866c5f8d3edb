"""What README, notebook and presets say is true: each command parses, each file exists."""

import ast
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from configurator import configure
from experiments.plan import ExperimentsConfig
from pretraining.__main__ import PretrainConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MODEL_CARD = (ROOT / "assets" / "gpt2-mini" / "README.md").read_text("utf-8")
CODES = (ROOT / "docs" / "python-codes.md").read_text("utf-8")
READING = (ROOT / "docs" / "report-mini" / "README.md").read_text("utf-8")
NOTEBOOK = nbformat.read(ROOT / "run_in_colab.ipynb", as_version=4)
CONFIGS = {"train.py": "TrainConfig", "generate.py": "GenerateConfig",
           "pretrain.py": "PretrainConfig", "bench.py": "BenchConfig",
           "experiments.py": "ExperimentsConfig", "analysis.py": "AnalysisConfig"}


def script_lines(text: str) -> list[str]:
    """Every `python SCRIPT.py …` or `torchrun … SCRIPT.py …` of a text."""
    scripts = "|".join(script.removesuffix(".py") for script in CONFIGS)
    pattern = rf"(?:python|torchrun)(?: --\S+)* (?:{scripts})\.py[^`\n|]*"
    return [line.strip() for line in re.findall(pattern, text)]


def notebook_lines() -> list[str]:
    """The notebook's commands, with the values of its parameter cell filled in."""
    cells = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    parameters = {node.targets[0].id: ast.literal_eval(node.value)
                  for node in ast.parse(cells[0]).body}
    lines = script_lines("\n".join(cells))
    return [re.sub(r"\{(\w+)\}", lambda name: str(parameters.get(name[1], name[0])), line)
            for line in lines]


PAGES = README + MODEL_CARD + READING + CODES


@pytest.mark.parametrize("line", script_lines(PAGES) + notebook_lines())
def test_every_documented_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    script = next(word for word in words if word in CONFIGS)
    arguments = [word for word in words[words.index(script) + 1 :] if word != "..."]
    cls = getattr(importlib.import_module(script.removesuffix(".py")), CONFIGS[script])
    if arguments == ["--help"]:
        return
    assert configure(cls, arguments)


def test_documentation_has_commands_to_check() -> None:
    assert len(script_lines(README)) > 10
    assert len(notebook_lines()) >= 8


@pytest.mark.parametrize("preset", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_preset_parses_and_has_an_out_dir_of_its_own(preset: Path) -> None:
    kinds = {"pretrain": PretrainConfig, "experiments": ExperimentsConfig}
    cls = kinds.get(preset.stem.split("_")[0], TrainConfig)
    assert configure(cls, [str(preset)]).out_dir == f"out/{preset.stem}"


def test_homework_defaults_are_the_handouts() -> None:
    config = TrainConfig()
    assert (config.init_from, config.lora_rank, config.lora_alpha) == ("gpt2-medium", 128, 512.0)
    assert (config.lora_dropout, config.dropout, config.learning_rate) == (0.05, 0.0, 2.5e-4)
    assert config.max_iters == 80
    assert config.batch_size * config.gradient_accumulation_steps == 128
    handout = configure(TrainConfig, [str(ROOT / "config/handout.py")])
    assert (handout.batch_size, handout.gradient_accumulation_steps) == (4, 32)
    assert (handout.lora_qkv, handout.lora_targets) == ("shared", "c_attn,attn.c_proj")


def test_settings_table_has_the_defaults_of_the_code() -> None:
    defaults = {field.name: str(field.default) for field in fields(TrainConfig)}
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \| ([^|]+) \|", README, re.MULTILINE)
    checked = 0
    for names, values in rows:
        names, values = re.findall(r"\w+", names), re.findall(r"[\w-]+", values)
        if names[0] in defaults:
            assert [float(v) if v.isdigit() else v for v in values] == [
                float(defaults[n]) if values[0].isdigit() else defaults[n] for n in names]
            checked += 1
    assert checked >= 7


def test_readme_is_short_and_starts_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    first, second = re.findall(r"^```\n(.*)\n```$", README, re.MULTILINE)[:2]
    assert first == "pip install -r requirements.txt && python train.py config/quickstart.py"
    assert second == "pip install -r requirements-dev.txt && pytest"


def test_links_lead_somewhere() -> None:
    pages = [path for folder in ("docs", "assets") for path in (ROOT / folder).rglob("*.md")]
    for page in [ROOT / "README.md", *pages]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_file_map_names_every_module_and_no_other() -> None:
    rows = README.split("## Files")[1]
    assert set(re.findall(r"`(\w+\.py)`", rows)) == {path.name for path in ROOT.glob("*.py")}


def test_each_module_has_its_test_file() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert {path.stem for path in ROOT.glob("*.py")} <= tested


def test_notebook_is_clean_and_leaves_torch_alone() -> None:
    for cell in NOTEBOOK.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    source = "\n".join(cell.source for cell in NOTEBOOK.cells)
    assert "pip install --quiet -r requirements.txt" in source
    assert re.search(r"^torch>=2\.6,<2\.14 ", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


def test_nothing_that_was_saved_is_unpickled_or_executed() -> None:
    calls = [call for path in ROOT.glob("*.py")
             for call in re.findall(r"torch\.load\(.*|\bexec\(.*|\beval\([^)].*|pickle\.loads?\(.*",
                                    path.read_text("utf-8"))]
    assert calls
    assert all("weights_only=True" in call for call in calls)


def test_key_file_is_ignored_by_git() -> None:
    assert "wandb_api.json" in (ROOT / ".gitignore").read_text().splitlines()
