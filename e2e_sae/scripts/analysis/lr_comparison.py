"""CE increase against L0 and alive elements, by learning rate (figs. 13-15).

python -m e2e_sae.scripts.analysis.lr_comparison RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("lr_comparison")
