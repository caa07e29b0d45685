"""Principal directions of the clean activations and how SAEs keep them (figs. 21 to 23a).

python -m e2e_sae.scripts.analysis.principal_directions RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("principal_directions")
