"""Quantizers compared on the same tensors, the same text and the same measure."""
