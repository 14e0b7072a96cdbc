"""Everything worth running once on a machine with a GPU: ``make gpu``.

``__main__`` has the parts in their order, ``running`` runs one and keeps what it gave, ``package`` makes
the package usable before it is built, ``calls`` are those that profilers look at, ``others`` the kernels
of other projects.
"""
