"""The one training loop of the library."""
