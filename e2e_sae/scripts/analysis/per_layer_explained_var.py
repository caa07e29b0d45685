"""Explained variance as the paper has it, at every later layer (fig. 12a).

python -m e2e_sae.scripts.analysis.per_layer_explained_var RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("per_layer_explained_var")
