"""How long runs took, by type (table 6).

python -m e2e_sae.scripts.analysis.training_time RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("training_time")
