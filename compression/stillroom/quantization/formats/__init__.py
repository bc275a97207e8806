"""Quantized models as folders and files: ours, and those that others read."""
