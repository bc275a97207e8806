"""Adapters: small trainable parts beside a frozen base."""
