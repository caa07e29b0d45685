"""Explained variance as a ratio of sums, at every later layer.

python -m e2e_sae.scripts.analysis.per_layer_quality RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("per_layer_quality")
