"""Speed and memory of this package, measured beside other implementations."""
