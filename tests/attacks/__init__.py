"""Inputs that are broken, or meant to do harm; each must end in one clear error. See README.md."""
