"""Trains MLPs on images, sparsifiers on their layers, and collects what their dictionary elements react to."""
