"""Adapters side by side: every method on a full and on a quantized base."""
