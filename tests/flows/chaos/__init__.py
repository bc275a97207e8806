"""kill -9 of each part of the house, in the middle of each long stage."""
