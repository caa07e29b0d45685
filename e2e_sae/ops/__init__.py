"""Arithmetic. Each fast path stands beside its plain twin, under the same signature."""
