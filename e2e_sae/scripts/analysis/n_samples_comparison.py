"""CE increase against L0 and alive elements, by training samples (fig. 17).

python -m e2e_sae.scripts.analysis.n_samples_comparison RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("n_samples_comparison")
