"""Open a page in the browser to play with finished runs: what did LoRA do?

pip install -r requirements-demo.txt && python -m demo     the runs under out/
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from checkpoints.files import local_path
from configurator import Bounds, run_script
from runtime.device import set_up_memory
from runtime.processes import treat_as_ctrl_c


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `python -m demo`."""

    out_dir: Annotated[str, "folder in which finished runs are found", local_path] = "out"
    port: Annotated[int, "of the address; 0 is the first free one from 7860", Bounds(0, 65535)] = 0
    share: Annotated[bool, "also ask Gradio for a public link, as Colab needs it"] = False


def main(config: DemoConfig) -> None:
    try:
        import gradio as gr

        from demo.page import build
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install -r requirements-demo.txt") from None
    set_up_memory()
    treat_as_ctrl_c("SIGTERM", "SIGHUP")  # a training that the page started saves its state first
    try:
        build(Path(config.out_dir)).launch(
            server_name="127.0.0.1", server_port=config.port or None, share=config.share,
            css_paths=Path(__file__).with_name("style.css"), footer_links=[], ssr_mode=False,
            max_file_size=1, theme=gr.themes.Default(font=["system-ui"], font_mono=["monospace"]))
    except OSError:
        raise ValueError(f"port={config.port} is in use; port=0 takes a free one") from None


if __name__ == "__main__":
    run_script(main, DemoConfig)
