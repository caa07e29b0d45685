"""MSE from the clean stream at every later layer (figs. 2 and 6).

python -m e2e_sae.scripts.analysis.per_layer_mse RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("per_layer_mse")
