"""CE increase against L0 and alive elements, by architecture.

python -m e2e_sae.scripts.analysis.architecture_comparison RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("architecture_comparison")
