"""Trains small language models from scratch, for demos and experiments."""
