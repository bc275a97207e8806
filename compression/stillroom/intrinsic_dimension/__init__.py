"""Intrinsic dimension: how few numbers a fine-tuning needs (1804.08838, 2012.13255)."""
