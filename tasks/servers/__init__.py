"""What `make up` starts on one machine, and what servers elsewhere are set up with."""
