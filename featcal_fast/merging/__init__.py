"""Upstream mergers that stream."""
