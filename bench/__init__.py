"""Speed and memory, measured beside other ways to do the same."""
