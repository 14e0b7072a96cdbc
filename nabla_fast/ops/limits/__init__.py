"""Limits of the backends: which arguments their kernels take, and why they refuse the others."""
