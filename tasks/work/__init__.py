"""What each stage does, in a process of its own: its inputs, one library call, its output."""
