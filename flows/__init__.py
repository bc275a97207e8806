"""The order of things: flows, the road they walk, and the command line."""
