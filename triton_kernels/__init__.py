"""Triton kernels, one file per operator: a kernel and its launcher, nothing else.

Installed as ``nabla_fast.triton_kernels``. Import a kernel's module only when its operator is called:
triton is not a dependency of the package, and ``TRITON_INTERPRET`` is read when a kernel is decorated.
"""
