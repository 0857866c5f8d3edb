"""A page in the browser that shows what LoRA did to a model, on the runs of the reader."""
