"""What arrives and leaves while the device computes: blocks, hidden states, and the memory they take."""
