"""Settings: their order, their types, their errors, and that a config file is never run."""

import os
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import configurator
from configurator import Bounds, configure, run_script
from train import TrainConfig


@dataclass(frozen=True)
class Settings:
    lora_rank: Annotated[int, "rank of A and B", Bounds(0)] = 8
    lora_alpha: Annotated[float, "numerator of the scaling"] = 16.0
    learning_rate: Annotated[float, "size of a step", Bounds(0, 1)] = 1e-3
    out_dir: Annotated[str, "where results go"] = "out"
    compile: Annotated[bool, "worth it for long runs"] = False
    dtype: Annotated[Literal["auto", "float32"], "compute precision"] = "auto"


@dataclass(frozen=True)
class WithoutAdapters:
    out_dir: Annotated[str, "where results go"] = "out"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and command line of each test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


def changed(*arguments: str) -> dict[str, Any]:
    """Return the settings that `arguments` make different from the defaults."""
    result, defaults = asdict(configure(Settings, list(arguments))), asdict(Settings())
    return {name: value for name, value in result.items() if value != defaults[name]}


def write(source: str | bytes, name: str = "small.py") -> str:
    Path(name).write_bytes(source.encode() if isinstance(source, str) else source)
    return name


def error_of(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the message
        configure(Settings, list(arguments))
    return str(caught.value)


# --- order and spelling ----------------------------------------------------------------------


def test_no_arguments_give_the_defaults() -> None:
    assert configure(Settings, []) == Settings()


def test_arguments_are_read_from_left_to_right() -> None:
    assert changed("lora_rank=2", "lora_rank=4") == {"lora_rank": 4}


def test_arguments_override_the_defaults_a_caller_gives() -> None:
    settings = configure(Settings, ["rank=2"], {"lora_rank": 4, "out_dir": "mine"})
    assert settings == Settings(lora_rank=2, out_dir="mine")


def test_config_file_and_overrides_apply_in_the_order_given() -> None:
    path = write('"""A small run."""\n\nlora_rank = 2  # enough\nout_dir = "small"\n')
    assert changed(path) == {"lora_rank": 2, "out_dir": "small"}
    assert changed(path, "rank=4") == {"lora_rank": 4, "out_dir": "small"}
    assert changed("rank=4", path) == {"lora_rank": 2, "out_dir": "small"}
    assert changed(path, write("rank = 3", "other.py")) == {"lora_rank": 3, "out_dir": "small"}


@pytest.mark.parametrize("key", ["lora_rank", "--lora_rank", "--lora-rank", "rank", "--rank"])
def test_every_spelling_of_a_name_sets_it(key: str) -> None:
    assert changed(f"{key}=3") == {"lora_rank": 3}


@pytest.mark.parametrize(("alias", "name"), configurator.ALIASES.items())
def test_aliases_work_on_the_command_line_and_in_files(alias: str, name: str) -> None:
    assert changed(f"{alias}=1") == changed(write(f"{alias} = 1")) == {name: 1}


def test_result_is_frozen() -> None:
    settings = configure(Settings, ["rank=1"])
    with pytest.raises(FrozenInstanceError):
        settings.lora_rank = 2  # type: ignore[misc]


# --- types -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("out_dir", "2024", "2024"),
        ("out_dir", "True", "True"),
        ("lora_alpha", "1", 1.0),
        ("lora_alpha", "-2.5e1", -25.0),
        ("lora_rank", "0", 0),
        ("learning_rate", "0", 0.0),
        ("learning_rate", "1", 1.0),
        ("compile", "True", True),
        ("compile", "False", False),
    ],
)
def test_declared_type_decides_what_a_literal_means(name: str, text: str, value: Any) -> None:
    for argument in (f"{name}={text}", write(f"{name} = {text}")):
        result = getattr(configure(Settings, [argument]), name)
        assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize("text", ["a=b", "", "-x", "--x=1", "a b", "'quoted'", "small.py"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert changed(f"out_dir={text}") == {"out_dir": text}


# --- error messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora_rank=1.5", "command line: lora_rank='1.5' must be an integer"),
        ("lora_rank=True", "command line: lora_rank='True' must be an integer"),
        ("lora_rank=", "command line: lora_rank='' must be an integer"),
        ("rank=x", "command line: lora_rank='x' must be an integer"),
        ("lora_alpha=True", "command line: lora_alpha='True' must be a finite number"),
        ("lora_alpha=nan", "command line: lora_alpha='nan' must be a finite number"),
        ("lora_alpha=-inf", "command line: lora_alpha='-inf' must be a finite number"),
        ("lora_alpha=1e999", "command line: lora_alpha='1e999' must be a finite number"),
        ("compile=1", "command line: compile='1' must be True or False"),
        ("compile=T", "command line: compile='T' must be True or False"),
        ("dtype=int8", "command line: dtype='int8' must be one of auto, float32"),
        ("lora_rank=-1", "command line: lora_rank='-1' must be at least 0"),
        ("lr=1.5", "command line: learning_rate='1.5' must be at most 1"),
        ("lora_rnak=1", "command line: unknown setting 'lora_rnak'; did you mean 'lora_rank'?"),
        ("--out-dri=x", "command line: unknown setting 'out_dri'; did you mean 'out_dir'?"),
        ("zzz=1", "command line: unknown setting 'zzz'"),
        ("=1", "command line: unknown setting ''"),
        ("--compile", "command line: --compile needs a value, as in --compile=..."),
        ("smal.py", "config file 'smal.py' not found; did you mean 'small.py'?; "
                    "settings are key=value"),
        ("presets/x.py", "config file 'presets/x.py' not found; settings are key=value"),
    ],
)
def test_bad_argument_is_named_with_what_is_allowed(argument: str, message: str) -> None:
    write("")
    assert error_of(argument) == message


def test_suggestion_is_a_name_that_this_script_has() -> None:
    with pytest.raises(ValueError, match=r"^command line: unknown setting 'rnk'$"):
        configure(WithoutAdapters, ["rnk=1"])


def test_suggestion_for_a_file_is_a_file() -> None:
    assert error_of("lora_rank") == "config file 'lora_rank' not found; settings are key=value"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("lora_rank = 1.5", "lora_rank='1.5' must be an integer"),
        ("lr = 1e999", "learning_rate='1e999' must be a finite number"),
        ("compile = 1", "compile='1' must be True or False"),
        ("lora_rank = -1", "lora_rank='-1' must be at least 0"),
        ("lora_rnak = 1", "unknown setting 'lora_rnak'; did you mean 'lora_rank'?"),
    ],
)
def test_bad_value_in_a_file_is_named_with_its_line(line: str, reason: str) -> None:
    assert error_of(write(f"# why\nout_dir = 'x'\n{line}\n")) == f"small.py:3: {reason}"


@pytest.mark.parametrize(
    "line",
    [
        "open('trace', 'w')",
        "lora_rank = [open('trace', 'w'), 1][1]",
        "out_dir = f'{open(\"trace\", \"w\")}'",
        "lora_rank = 1 if open('trace', 'w') else 2",
        "__import__('pathlib').Path('trace').touch()",
        "import os",
        "class lora_rank: open('trace', 'w')",
        "lora_rank = 2 + 2",
        "lora_rank = lora_alpha",
        "lora_rank = lora_alpha = 2",
        "lora_rank: int = 2",
        "lora_rank += 2",
        "out_dir = None",
        "out_dir = ['a']",
        "out_dir = b'a'",
        "lora_alpha = 1j",
        "3",
    ],
)
def test_config_file_is_read_but_never_run(folder: Path, line: str) -> None:
    path = write(f"lora_rank = 4\n{line}\n")
    assert error_of(path) == "small.py:2: only `name = text, number, True or False` is allowed"
    assert os.listdir(folder) == ["small.py"]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"lora_rank = 4\nout_dir = \n", 2),
        (b"lora_rank 4\n", 1),
        (b"out_dir = 'a\x00b'\n", 1),
        (b"out_dir = '\xff'\n", 1),
        (b"\x89PNG\r\n\x1a\n", 1),
        (b"lora_rank = " + b"(" * 10_000, 1),
        (b"lora_rank = " + b"-" * 100_000 + b"1", 1),
        (b"lora_rank = " + b"+".join([b"1"] * 100_000), 1),
        (b"lora_rank = " + b"9" * 5_000, 1),
    ],
    ids=["value", "syntax", "null", "utf8", "png", "parentheses", "signs", "sums", "digits"],
)
def test_file_that_does_not_parse_is_refused_with_line_and_reason(source: bytes, line: int) -> None:
    place, reason = error_of(write(source)).split(": ", 1)
    assert place == f"small.py:{line}"
    assert reason.split(":")[-1].strip()


def test_number_too_long_to_print_is_refused_with_its_line() -> None:
    assert error_of(write("lora_rank = 0x" + "f" * 5_000)).startswith("small.py:1: ")


# --- help and scripts ------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_each_setting_with_default_and_reason(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        configure(Settings, ["rank=1", flag])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith(str(__doc__))
    for field in fields(Settings):
        reason = Settings.__annotations__[field.name].__metadata__[0]
        assert f"\n  {field.name}={field.default}\n      {reason}" in printed
    assert "compute precision (one of auto, float32)\n" in printed
    assert "\nAliases: rank = lora_rank, alpha = lora_alpha, lr = learning_rate\n" in printed


def run_failing_with(error: BaseException) -> None:
    def main(settings: Settings) -> None:
        raise error

    run_script(main, Settings)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a bad value"), 2, "error: a bad value\n"),
        (ValueError("three\n  lines\r\nof text\n"), 2, "error: three lines of text\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (FloatingPointError("loss is nan"), 2, "error: loss is nan\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_user_error_ends_in_one_line_and_interrupt_in_none(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_failing_with(error)
    assert (stop.value.code, *capsys.readouterr()) == (code, "", line)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError])
def test_bug_is_not_swallowed(error: type[Exception]) -> None:
    with pytest.raises(error, match="a bug"):
        run_failing_with(error("a bug"))


def test_script_reads_its_command_line_and_reports_in_one_line() -> None:
    script = write(
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n"
        "from configurator import run_script\n"
        "@dataclass(frozen=True)\n"
        "class Settings:\n"
        "    rank: Annotated[int, 'rank'] = 1\n"
        "    out_dir: Annotated[str, 'folder'] = 'out'\n"
        "run_script(print, Settings)\n"
    )
    home = {**os.environ, "PYTHONPATH": str(Path(configurator.__file__).parent)}

    def run(argument: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, script, argument], env=home, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run("out_dir=a=b") == (0, "Settings(rank=1, out_dir='a=b')\n", "")
    assert run("out_dri=x\ny") == (
        2, "", "error: command line: unknown setting 'out_dri'; did you mean 'out_dir'?\n"
    )


# --- anything at all -------------------------------------------------------------------------

NAMES = [*asdict(Settings()), *configurator.ALIASES]
PIECES = [
    *NAMES, "--", "-1", "1.5", "1e999", "nan", "True", "auto", "None", "lambda: ", "x" * 300,
    *"=-=1'\"([{\\#\n\t ./:*\x00\x1b\u2028é𝟙٣",
]


def outcome_of(argument: str) -> Settings | Exception:
    try:
        return configure(Settings, [argument])
    except (ValueError, OSError) as error:
        return error


def test_random_input_gives_typed_settings_or_a_clear_error() -> None:
    dice, accepted = random.Random(0), []
    types = [type(value) for value in asdict(Settings()).values()]
    for _ in range(600):
        start = f"{dice.choice(NAMES)}=" if dice.random() < 0.5 else ""
        text = start + "".join(dice.choices(PIECES, k=dice.randint(1, 4)))
        for argument, place in (text, ""), (write(text, "random.py"), "random.py:"):
            outcome = outcome_of(argument)
            if isinstance(outcome, Settings):
                accepted.append(argument)
                assert [type(value) for value in asdict(outcome).values()] == types
            else:
                assert len(str(outcome)) > len(place)
                assert str(outcome).startswith(place)
    assert 50 < len(accepted) < 600, "the input must be neither all bad nor all good"


def test_home_folder_is_expanded_in_paths_alone() -> None:
    config = configure(TrainConfig, ["--out_dir=~/x", "init_from=~/base", "wandb_project=~/y"])
    assert config.out_dir == os.path.expanduser("~/x") != "~/x"
    assert config.init_from == os.path.expanduser("~/base")
    assert config.wandb_project == "~/y"


@pytest.mark.parametrize("name", ["out_dir", "init_from", "dataset"])
@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_path_that_names_nothing_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"command line: {name}='.*' must be a name or a path"):
        configure(TrainConfig, [f"{name}={text}"])


def test_line_end_in_a_prompt_is_written_as_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.py"
    path.write_text(r'prompt = "Review:\n{text}\nLabel:"')
    configs = [configure(TrainConfig, [argument]) for argument in
               (str(path), r"prompt=Review:\n{text}\nLabel:", "prompt=Review:\n{text}\nLabel:")]
    assert {config.prompt for config in configs} == {"Review:\n{text}\nLabel:"}
