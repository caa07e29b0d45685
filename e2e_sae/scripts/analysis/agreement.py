"""Subject-verb agreement through SAEs (table 7, fig. 24).

python -m e2e_sae.scripts.analysis.agreement RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("agreement")
