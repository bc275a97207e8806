"""Stillroom: distil a language model into small, strong ones."""
