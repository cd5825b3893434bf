"""Merges of base and experts made on the fly, one tensor at a time; a method a file."""
