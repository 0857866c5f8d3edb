"""A page in the browser that shows what LoRA did to a model, on the runs of the reader."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
