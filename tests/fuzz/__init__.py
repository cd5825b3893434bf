"""Random damage to what is read; see README.md."""
