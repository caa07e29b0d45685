"""Explained variance after layer norm as the paper has it, at every later layer (fig. 12b).

python -m e2e_sae.scripts.analysis.per_layer_explained_var_ln RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("per_layer_explained_var_ln")
