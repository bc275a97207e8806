"""Distillation: the cache against the teacher online, and the papers' claims in small."""
