"""Adapters measured: what they cost and what they reach."""
