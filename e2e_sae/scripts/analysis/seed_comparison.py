"""CE increase against L0 and alive elements, by seed (fig. 18).

python -m e2e_sae.scripts.analysis.seed_comparison RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("seed_comparison")
