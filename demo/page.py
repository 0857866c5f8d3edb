"""The layout of the page: what a visitor sees, and which function fills which part."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from configurator import ROOT, configure
from demo import tabs
from experiments.escaping import plain
from experiments.finished_runs import find_runs, load_run
from experiments.jobs import job_of
from experiments.selected import EXAMPLES
from experiments.shared_job import SharedJob
from train import TrainConfig

HEAD = """# What did LoRA do?
Type a film review and look at it in each tab. Every answer is the one that `generate.py` gives."""
TRAIN = """### There is no finished run yet
The quickstart trains a small GPT-2 on film reviews, offline, in about two minutes on two cores."""
REVIEWS = ["a gorgeous , witty , seductive movie .", "dull , lifeless and far too long .",
           "it is not without charm , but i was bored ."]
ABOUT = {
    "Ask": "What the base model and your runs answer. Without exactly one label it is garbage.",
    "The strength of LoRA": "s multiplies LoRA's update ΔW: 0 is the base, 1 the trained model.",
    "Inside": "Which words moved the answer, and how large ΔW is in each layer.",
    "Curves": "How the chosen runs learned, their scores on the test split, and their commands.",
    "Prompts": "The tokens of a training example: the prefix that all share, the text, the answer.",
}


def build(root: Path, *settings: str) -> gr.Blocks:
    """Return the page on the runs under `root`; `settings` change the quickstart that it offers."""
    with gr.Blocks(title="What did LoRA do?", analytics_enabled=False) as page:
        gr.Markdown(HEAD)
        text = gr.Textbox(REVIEWS[0], lines=1, max_lines=6, submit_btn="Ask", elem_id="text",
                          label="Your review, or a question about programming for a run on code")
        examples = gr.Examples(REVIEWS, text, label="Or one of these", api_visibility="private")
        runs, run, notes, offer = listed = listing(root)
        with gr.Row():
            runs.render(), run.render()
        notes.render(), offer.render()
        with offer:
            trained = offer_training(root, settings)
        events = [text.submit, examples.load_input_event.then, run.input, runs.input]
        asked = add_tabs(text, runs, run, events)
        for started in (page.load, trained):
            started(lambda: listing(root), None, listed, api_visibility="private").then(
                tabs.ask, [text, runs], asked, api_visibility="private")
    return page


def listing(root: Path) -> list[Any]:
    """Return what depends on the runs under `root`: the choices, a note, the offer to train one."""
    finished, unfinished = find_runs(root)
    configs = {str(path): load_run(path).config for path in finished}
    names = sorted(configs, key=lambda name: (  # the first ones are chosen: LoRA on reviews
        configs[name].trained != "lora", configs[name].task != TrainConfig.task))
    notes = "; ".join(map(plain, unfinished))
    return [
        gr.CheckboxGroup(names, value=names[:3], label="Runs to compare in Ask and Curves",
                         elem_id="runs", render=False, min_width=280),
        gr.Dropdown(names, value=names[0] if names else None, elem_id="run", render=False,
                    label="Run to look into in the other tabs", min_width=280),
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
    # Each who follows it holds one of Gradio's 40 threads.
    return button.click(job.follow, None, printed, concurrency_limit=16, api_name="train").then


def add_tabs(text: gr.Textbox, runs: gr.CheckboxGroup, run: gr.Dropdown, events: list) -> gr.HTML:
    """Add the five tabs, each with its own controls; return where the first one's HTML goes."""
    factor = gr.Slider(0, 2, 1, step=0.1, label="s, the factor of ΔW", render=False)
    number = gr.Slider(1, 100, 1, step=1, label="Which training example", render=False)
    shots = gr.Slider(0, 8, 0, step=1, label="k, examples before it", render=False)
    fills = ((tabs.ask, text, runs), (tabs.strength, text, run, factor), (tabs.inside, text, run),
             (tabs.curves, runs), (tabs.prompt, run, number, shots))
    opened = gr.State("Ask")
    with gr.Tabs():
        added = [add_tab(name, opened, events, *each)
                 for name, each in zip(ABOUT, fills, strict=True)]
    with added[1][0]:
        button = gr.Button(f"Measure the accuracy over s on {EXAMPLES} validation reviews")
        button.click(measure, run, gr.HTML(elem_id="accuracy"), api_name="accuracy")
    return added[0][1]


def measure(run: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
    return tabs.accuracy(run, progress.tqdm)


def add_tab(
    name: str, opened: gr.State, events: Sequence[Any], fill: Callable[..., str], *inputs: Any
) -> tuple[gr.Tab, gr.HTML]:
    """Add a tab; fill it when it opens, when its own controls move, when `events` find it open."""
    with gr.Tab(name) as tab:
        gr.Markdown(ABOUT[name])
        own = [each for each in inputs if not each.is_rendered]
        for each in own:
            each.render()
        output = gr.HTML(elem_id=fill.__name__)
    tab.select(lambda: name, None, opened, api_visibility="private")
    gr.on([tab.select, *(each.change for each in own)], fill, inputs, output,
          api_name=fill.__name__, trigger_mode="always_last")
    for event in events:
        event(lambda now, *values: fill(*values) if now == name else gr.skip(),
              [opened, *inputs], output, api_visibility="private", trigger_mode="always_last")
    return tab, output
