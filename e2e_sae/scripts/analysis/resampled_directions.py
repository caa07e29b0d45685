"""KL of the clean model when a principal direction is resampled (fig. 23b).

python -m e2e_sae.scripts.analysis.resampled_directions RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("resampled_directions")
