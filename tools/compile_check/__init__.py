"""Compiles every launch of the Triton kernels for GPUs that are not there, and reads what came out.

``launches/`` holds one module an op. Its ``launches(dtype)`` yields ``(name, call)``, where ``call`` runs
the op's launcher on tensors of the device ``meta``: what is compiled is what would be launched, with
the configuration that ``presets.json`` gives the target.
"""
