"""How fast a training step is, and how much memory it takes: ours beside the plain way. `python -m benchmarks --help`.

An installed library has it as `e2e-sae bench`, this package then being `e2e_sae.benchmarks`: hence relative imports.
"""
