"""Gradient norms beside alive elements and CE increase (appendix C).

python -m e2e_sae.scripts.analysis.grad_norms RUNS --out DIR
"""

from e2e_sae.scripts.analysis.analyse import main

if __name__ == "__main__":
    main("grad_norms")
