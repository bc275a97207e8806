"""The artifact store: immutable files by their hash, and one small manifest per artifact."""
