"""The layout of the page: what a visitor sees, and which function fills which part."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from configurator import ROOT, configure
from demo import tabs
from experiments.escaping import plain
from experiments.finished_runs import find_runs, load_run
from experiments.jobs import SharedJob, job_of
from train import TrainConfig

HEAD = """# What did LoRA do?
Type a film review and look at it in each tab. Every answer is the one that `generate.py` gives."""
TRAIN = """### There is no finished run yet
The quickstart trains a small GPT-2 on film reviews, offline, in about two minutes on two cores."""
EXAMPLES = ["a gorgeous , witty , seductive movie .", "dull , lifeless and far too long .",
            "it is not without charm , but i was bored ."]
ABOUT = {
    "Ask": "The model before training beside the chosen runs: the answer, the probability of each "
           "label, the time. An answer without exactly one label word is garbage.",
    "The strength of LoRA": "LoRA adds an update ΔW to the weights. The slider multiplies it by s: "
                            "0 is the model before training, 1 the trained one.",
    "Inside": "What moved the answer, and how large ΔW is in each layer.",
    "Curves": "How the chosen runs learned, their scores on the test split, and their commands.",
    "Prompts": "A training example as the model reads it, token by token. All examples share a "
               "prefix; training learns only the supervised tokens.",
}


class Filled(NamedTuple):
    """A tab, the function that fills it, the components it reads, and where its HTML goes."""

    tab: gr.Tab
    fill: Callable[..., str]
    inputs: Sequence[Any]
    output: gr.HTML


def build(root: Path, *settings: str) -> gr.Blocks:
    """Return the page on the runs under `root`; `settings` change the quickstart that it offers."""
    with gr.Blocks(title="What did LoRA do?", analytics_enabled=False) as page:
        gr.Markdown(HEAD)
        text = gr.Textbox(EXAMPLES[0], lines=2, max_lines=6, submit_btn="Ask", label="Your review",
                          elem_id="text")
        gr.Examples(EXAMPLES, text, label="Or one of these", api_visibility="private")
        runs, run, notes, offer = listed = listing(root)
        with gr.Row():
            runs.render()
            run.render()
        notes.render()
        offer.render()
        with offer:
            trained = offer_training(root, settings)
        with gr.Tabs():
            filled = add_tabs(text, runs, run)
        connect(filled, [text.submit, run.input, runs.input])
        for started in (page.load, trained):
            started(lambda: listing(root), None, listed, api_visibility="private").then(
                tabs.ask, [text, runs], filled[0].output, api_visibility="private")
    return page


def listing(root: Path) -> list[Any]:
    """Return what depends on the runs under `root`: the choices, a note, the offer to train one."""
    finished, unfinished = find_runs(root)
    names = list(map(str, finished))
    lora = [name for name in names if load_run(Path(name)).config.trained == "lora"]
    notes = "; ".join(map(plain, unfinished))
    return [
        gr.CheckboxGroup(names, value=names[:3], label="Runs to compare in Ask and Curves",
                         elem_id="runs", render=False),
        gr.Dropdown(names, value=next(iter(lora + names), None), elem_id="run", render=False,
                    label="Run to look into in the other tabs"),
        gr.Markdown(notes and f"Not shown: {notes}.", elem_id="notes", render=False),
        gr.Column(visible=not names, render=False),
    ]


def offer_training(root: Path, settings: Sequence[str]) -> Callable[..., Any]:
    """Add the offer to train the quickstart; return what waits for its end."""
    config = configure(TrainConfig, [str(ROOT / "config" / "quickstart.py"),
                                     "wandb_mode=disabled", *settings])
    job = SharedJob(job_of(root / "quickstart", config))
    gr.Markdown(TRAIN)
    button = gr.Button("Train the quickstart", variant="primary")
    printed = gr.Textbox(label="What it prints", lines=8, max_lines=14, elem_id="printed")
    return button.click(job.follow, None, printed, concurrency_limit=None, api_name="train").then


def add_tabs(text: gr.Textbox, runs: gr.CheckboxGroup, run: gr.Dropdown) -> list[Filled]:
    """Add the five tabs, each with its own controls above its HTML."""
    factor = gr.Slider(0, 2, 1, step=0.1, label="s, the factor of ΔW", render=False)
    number = gr.Slider(1, 100, 1, step=1, label="Which training example", render=False)
    shots = gr.Slider(0, 8, 0, step=1, label="k, examples before it", render=False)
    fills = ((tabs.ask, text, runs), (tabs.strength, text, run, factor), (tabs.inside, text, run),
             (tabs.curves, runs), (tabs.prompt, run, number, shots))
    found = [add_tab(name, *each) for name, each in zip(ABOUT, fills, strict=True)]
    with found[1].tab:
        button = gr.Button(f"Measure the accuracy over s on {tabs.REVIEWS} validation reviews")
        button.click(measure, run, gr.HTML(elem_id="accuracy"), api_name="accuracy")
    return found


def measure(run: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return tabs.accuracy(run, progress.tqdm)


def add_tab(name: str, fill: Callable[..., str], *inputs: Any) -> Filled:
    """Add a tab that is filled when it opens and when one of its own controls moves."""
    with gr.Tab(name) as tab:
        gr.Markdown(ABOUT[name])
        own = [each for each in inputs if not each.is_rendered]
        for each in own:
            each.render()
        output = gr.HTML(elem_id=fill.__name__)
    gr.on([tab.select, *(each.change for each in own)], fill, inputs, output,
          api_name=fill.__name__, trigger_mode="always_last")
    return Filled(tab, fill, inputs, output)


def connect(filled: Sequence[Filled], events: Sequence[Any]) -> None:
    """Fill the open tab again after each of `events`."""
    opened = gr.State("Ask")
    for each in filled:
        each.tab.select(lambda name=each.tab.label: name, None, opened, api_visibility="private")

    def refresh(values: Mapping[Any, Any]) -> dict[Any, str]:
        tab = next(each for each in filled if each.tab.label == values[opened])
        return {tab.output: tab.fill(*(values[component] for component in tab.inputs))}

    gr.on(events, refresh, {opened, *(each for tab in filled for each in tab.inputs)},
          [each.output for each in filled], api_visibility="private", trigger_mode="always_last")
