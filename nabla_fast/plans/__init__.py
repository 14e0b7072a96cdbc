"""Calls of ops repeated without their launcher's Python: what a call does is recorded, and written out."""
