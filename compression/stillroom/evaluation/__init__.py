"""Measure what a model is worth, what it costs, where it lost, and whether it may go out."""
