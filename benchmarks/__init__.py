"""How fast a training step is: ours beside the plain way, in one process. `python -m benchmarks --help`."""
