"""What README, notebook and presets say is true: each command parses, each file exists."""

import ast
import math
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bench.__main__ import BenchConfig
from bench.gpu_check import CheckConfig
from configurator import configure
from demo.__main__ import DemoConfig
from experiments.anatomy import AnatomyConfig, named
from experiments.dataset_analysis import AnalysisConfig
from experiments.plan import ExperimentsConfig
from generate import GenerateConfig
from lora import LoRALinear
from preferences.plan import PreferencesConfig
from pretraining.__main__ import PretrainConfig
from teaching.__main__ import settings as teaching_settings
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MAP = README.split("## The map")[1].split("\n## ")[0]
TREE, TRIP = MAP.split("```")[1], MAP.split("```")[2]
HOMEWORK = (ROOT / "docs" / "homework.md").read_text("utf-8")
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
# Texts for people; `report.md` and `docs/bench.md` quote commands as they were recorded.
PAGES = [path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"),
                           *(ROOT / "assets").rglob("*.md")] if path.name != "report.md"]
NOTEBOOK = nbformat.read(ROOT / "run_in_colab.ipynb", as_version=4)
# The settings of each command, by what stands between `python` and the arguments.
CONFIGS = {
    "train.py": TrainConfig, "generate.py": GenerateConfig, "-m bench": BenchConfig,
    "-m bench.gpu_check": CheckConfig,
    "-m experiments": ExperimentsConfig, "-m experiments.dataset_analysis": AnalysisConfig,
    "-m experiments.anatomy": AnatomyConfig,
    "-m pretraining": PretrainConfig, "-m preferences": PreferencesConfig,
    "-m teaching": None,  # its first word chooses them
    "-m demo": DemoConfig,
}
COMMAND = re.compile(r"(?:python|torchrun)(?: --\S+)* "
                     r"(train\.py|generate\.py|"
                     r"-m (?:bench|experiments|pretraining|preferences|teaching|demo)[\w.]*)"
                     r"((?: [^`\n|]*)?)")


def commands(text: str) -> list[tuple[str, str]]:
    """Every command of a text: what is started, and its arguments."""
    return [(start.rstrip("."), arguments.strip())
            for start, arguments in COMMAND.findall(text)]


def test_docs_name_no_folder_of_one_machine() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"/(home|root|work|Users)/", path.read_text("utf-8")), path



def notebook_commands() -> list[tuple[str, str]]:
    """The notebook's commands, with the values of its parameter cell filled in."""
    cells = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    parameters = {node.targets[0].id: ast.literal_eval(node.value)
                  for node in ast.parse(cells[0]).body}
    text = re.sub(r"\{(\w+)\}", lambda name: str(parameters.get(name[1], name[0])),
                  "\n".join(cells))
    return commands(text)


DOCUMENTED = [command for page in PAGES for command in commands(page.read_text("utf-8"))]


@pytest.mark.parametrize(("start", "arguments"), DOCUMENTED + notebook_commands())
def test_every_documented_command_parses(
    start: str, arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # presets are found from anywhere
    words = [word for word in shlex.split(arguments) if word not in ("...", "…")]
    if start == "-m experiments.anatomy":  # it takes folders of runs
        for word in words:
            Path(word).mkdir(parents=True)
        words = named(words)
    if start == "-m teaching":
        assert not words or teaching_settings(words)
    elif words != ["--help"]:
        assert configure(CONFIGS[start], words)


def test_documentation_has_commands_to_check() -> None:
    assert len(commands(README)) > 10
    assert len(commands(HOMEWORK)) > 15
    assert len(notebook_commands()) >= 8
    assert {start for start, _ in DOCUMENTED} == CONFIGS.keys()


@pytest.mark.parametrize("preset", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_preset_parses_and_has_an_out_dir_of_its_own(preset: Path) -> None:
    kinds = {"pretrain": PretrainConfig, "experiments": ExperimentsConfig, "dpo": PreferencesConfig}
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
    assert (handout.lora_qkv, handout.lora_targets) == ("shared", "attention")


def test_settings_table_has_the_defaults_of_the_code() -> None:
    defaults = {field.name: str(field.default) for field in fields(TrainConfig)}
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \| ([^|]+) \|", HOMEWORK, re.MULTILINE)
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


def test_map_names_every_module_and_no_other() -> None:
    assert set(re.findall(r"^(\w+\.py) ", TREE, re.MULTILINE)) == {
        path.name for path in ROOT.glob("*.py")}
    lines = dict(re.findall(r"^(\w+)/ +((?:.+\n(?: .*\n)*))", TREE, re.MULTILINE))
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert rooms <= lines.keys()
    for room in rooms:
        for path in (ROOT / room).glob("[!_]*.py"):
            assert re.search(rf"\b{path.stem}\b", lines[room]), f"{room}/{path.name}"


def test_the_trip_is_short_and_every_file_on_it_exists() -> None:
    steps = [line for line in TRIP.splitlines() if re.match(r"\d+\. |   \S", line)]
    assert 8 <= len(steps) <= 15
    files = re.findall(r"`([\w/]+\.py)`", TRIP)
    assert len(set(files)) > 15
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_ten_lines_of_the_readme_are_the_layer() -> None:
    names = {"nn": nn, "torch": torch, "math": math}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)  # noqa: S102
    theirs, ours = names["LoRALinear"](5, 7, 2, 4.0), LoRALinear(5, 7, lora_rank=2, lora_alpha=4.0)
    nn.init.normal_(theirs.lora_B)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    assert_close(theirs(x), ours(x))
    assert [name for name, p in theirs.named_parameters() if p.requires_grad] == [
        "lora_A", "lora_B"]


def pattern(node: ast.AST) -> str:
    """Return a string of the code as a pattern: each placeholder may be anything."""
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    parts = [value.value if isinstance(value, ast.Constant) else None for value in values]
    if not all(isinstance(part, str | None) for part in parts) or len(
            "".join(part or "" for part in parts).strip()) < 11:
        return ""
    return "".join(".+" if part is None else re.escape(part) for part in parts)


@cache
def messages_of_the_code() -> list[re.Pattern[str]]:
    paths = [path for path in ROOT.rglob("*.py") if "tests" not in path.relative_to(ROOT).parts]
    trees = [ast.parse(path.read_text("utf-8")) for path in paths]
    found = {pattern(node) for tree in trees for node in ast.walk(tree)
             if isinstance(node, ast.JoinedStr | ast.Constant)}
    return [re.compile(text) for text in found if text]


QUOTED = re.findall(r"^(?:error|wandb|adapter)\b.*", TROUBLES, re.MULTILINE)


@pytest.mark.parametrize("line", QUOTED)
def test_quoted_messages_are_the_codes(line: str) -> None:
    assert len(QUOTED) > 15
    assert any(message.search(line) for message in messages_of_the_code())


def test_notebook_is_clean_and_leaves_torch_alone() -> None:
    for cell in NOTEBOOK.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    source = "\n".join(cell.source for cell in NOTEBOOK.cells)
    assert "pip install --quiet -r requirements.txt" in source
    assert re.search(r"^torch>=2\.6,<2\.14 ", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


def test_key_file_is_ignored_by_git() -> None:
    assert "wandb_api.json" in (ROOT / ".gitignore").read_text().splitlines()
