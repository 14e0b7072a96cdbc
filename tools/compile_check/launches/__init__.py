"""Launches by op, at the shapes that matter."""
