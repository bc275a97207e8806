"""One script a peer, run by the peer's own Python; none of them imports this project."""
