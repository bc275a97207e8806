"""Weights as integers: GPTQ and round-to-nearest, their checkpoints, and layers that run them."""
