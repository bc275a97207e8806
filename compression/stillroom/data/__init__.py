"""The data side: text in, rows of tokens out."""
