"""CE increase against L0 and alive elements, by dictionary size (fig. 16).

python -m e2e_sae.scripts.analysis.ratio_comparison RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("ratio_comparison")
