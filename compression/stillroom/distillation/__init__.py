"""Distillation from a cached teacher: run it once, train students from what it said."""
