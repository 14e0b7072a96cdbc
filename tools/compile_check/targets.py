"""The GPUs that are compiled for, and what they allow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        name: as in ``presets.json``.
        backend, arch, warp_size: as Triton names it.
        shared: bytes of shared memory that a block may have.
        tensor_core: the start of the mnemonic of its matrix instructions.
        warp_tensor_core: of those of a single warp, for tiles that the others do not take.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    tensor_core: str
    warp_tensor_core: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912, "HMMA", "HMMA"),
        Target("sm_90", "cuda", 90, 32, 232_448, "HGMMA", "HMMA"),
        Target("sm_100", "cuda", 100, 32, 232_448, "UTCHMMA", "HMMA"),
        Target("sm_120", "cuda", 120, 32, 101_376, "HMMA", "HMMA"),
        Target("gfx942", "hip", "gfx942", 64, 65_536, "v_mfma", "v_mfma"),
    )
}
