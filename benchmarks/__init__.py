"""The same work done by us and by peers, one benchmark a folder."""
