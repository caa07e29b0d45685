"""Auto-interpretation: what latents stand for, in words, and how well the words predict where they are active.

examples.py            contexts of each latent, from one pass over evaluation rows
questions.py           what is asked of a language model, and how its answers are read
client.py, answers.py  any OpenAI-compatible endpoint; every answer is kept, and no question is asked twice
judge.py, scores.py    explanations; detection, fuzzing and simulation scores
token_statistics.py    an explainer and a scorer without a language model
compare.py             differences between SAEs, with the paper's tests and violins (arXiv 2405.12241, Table 4, Fig. 9)
run.py                 `e2e-sae interpret`, from runs to files
"""
