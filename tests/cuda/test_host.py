"""The host that runs device code on the CPU: every fault that it is to find, planted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).with_name("faults.cu").read_text().splitlines()
SEEDS = range(1, 9)
RACE = r".* race: (reads|writes) byte \d+ of (row|data), which block \d+, thread \d+ has (read|written)"
NOT_WAITED = (
    r".* race: reads byte \d+ of row, which a copy brings at .* that this thread has not waited for"
)

# What is reported of each kernel, whose names are faults.cu's.
FAULTS = {
    "read_after_write": RACE,
    "write_after_read": RACE,
    "across_warps": RACE,
    "shuffle_is_no_barrier": RACE,
    "blocks_write_one_place": RACE,
    "block_overwrites_what_another_reads": RACE,
    "peers_of_a_cluster": RACE,
    "across_a_grid": RACE,
    "peer_that_has_ended": "uses shared memory of a block that has ended",
    "one_thread_ends": "waits at a barrier of its block that not all threads reach .*; thread 5 has ended",
    "one_lane_ends": "waits at a barrier of its warp that not all threads reach .*; thread 5 has ended",
    "block_ends_in_cluster": "waits at a barrier of its cluster that not all threads reach",
    "block_ends_in_grid": "waits at a barrier of its grid that not all threads reach",
    "grid_that_is_not_cooperative": "a barrier of a grid whose launch is not cooperative",
    "warps_wait_apart": "waits at a barrier of its block that not all threads reach .*; thread 32 ",
    "lane_outside_its_mask": "a lane that is not in the mask it names",
    "masks_that_differ": "lanes of a warp meet with different masks or operations",
    "part_of_a_warp_shuffles": "a mask of lanes that are not there",
    "load_at_an_odd_place": "an access of 16 bytes at an address that is no multiple of it",
    "element_at_an_odd_place": "an access of 4 bytes at an address that is no multiple of it",
    "beyond_an_array": "writes 4 bytes at byte 64 of padded, which has 64",
    "four_beyond_an_array": "reads 16 bytes at byte 64 of padded, which has 64",
    "constant_memory": "writes constants, which is constant",
    "memory_of_nobody": "reads memory that is nobody's",
    "beyond_a_shared_variable": "writes 4 bytes at byte 256 of row, which has 256",
    "shared_memory_without_content": "reads byte 0 of row, which nobody has written",
    "dynamic_beyond_its_end": "writes 4 bytes at byte 252 of dynamic shared memory, which has 252",
    "dynamic_without_any": "dynamic shared memory that the launch has not asked for",
    "static_beside_dynamic": "more shared memory than sm_90 has: 232449 bytes of 232448",
    "read_before_its_copy": NOT_WAITED,
    "copy_over_what_is_read": RACE,
    "copies_that_do_not_come": "waits for copies that do not come",
    "copy_of_an_odd_place": "an access of 16 bytes at an address that is no multiple of it",
    "copy_barrier_that_is_not_made": "a barrier of copies that has not been made",
    "own_copies_too_early": NOT_WAITED,
    "peer_of_another_cluster": "shared memory of a block that its cluster does not have",
}
# Launches that are refused before any thread runs, and on which target.
REFUSED = {
    "too_much_dynamic": (120, "more dynamic shared memory than the target has"),
    "cluster_of_2": (80, "a cluster on a target that has none"),
    "cluster_of_17": (90, "a cluster of no blocks, of more than 16"),
    "cluster_that_does_not_divide": (90, "or of a number that does not divide the grid"),
    "too_many_threads": (90, "a block of no threads, or of more than 1024"),
    "too_many_together": (90, "a cooperative grid of more threads than a device holds at once"),
}
SOUND = (
    "read_after_write_sound",
    "write_after_read_sound",
    "within_warps",
    "blocks_write_their_own",
    "peers_of_a_cluster_sound",
    "across_a_grid_sound",
    "copies_sound",
    "odd_lanes_vote",
    "own_copies_sound",
    "dynamic_sound",
    "static_beside_dynamic_sound",
    "cluster_of_2",
)
# Of device code under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED = {
    "beyond_a_local_array": "index 12 out of bounds",
    "heap_behind_its_end": "insufficient space for an object",
    "element_at_an_odd_place": "misaligned address",
}


class Run(NamedTuple):
    end: str  # "done" or "stopped"
    results: str
    reports: list[str]


def run(program: Path, name: str, seed: int = 1, target: int = 90) -> Run:
    words = [program, name, str(seed), str(target)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    end, results, *reports = printed.splitlines()
    return Run(end, results, reports)


def marked(name: str, mark: str) -> set[int]:
    """Numbers of the lines of a kernel that bear a mark."""
    first = next(n for n, line in enumerate(SOURCE) if f"void {name}(" in line)
    end = next(n for n in range(first, len(SOURCE)) if SOURCE[n].endswith("}"))
    return {n + 1 for n in range(first, end + 1) if mark in SOURCE[n].partition("//")[2]}


def places(text: str) -> set[int]:
    return {int(line) for line in re.findall(r"faults\.cu:(\d+)", text)}


@pytest.fixture(scope="module", params=["faults", "faults-ucontext"])
def faults(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Path:
    return built(request.param)


def test_every_kernel_is_tested(built: Callable[[str], Path]):
    listed = subprocess.run([built("faults")], capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) == {*FAULTS, *REFUSED, *SOUND, *SANITIZED, "copy_that_nobody_waits_for"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str, faults: Path):
    kernel = "across_a_grid_sound" if name == "grid_that_is_not_cooperative" else name
    for seed in SEEDS:
        reports = run(faults, name, seed).reports
        found = [line for line in reports if re.search(FAULTS[name], line)]
        assert found, reports
        assert all(re.match(r"kernel, block \d+, thread \d+: ", line) for line in found)
        if shutil.which("addr2line") and kernel == name:
            here, other = marked(kernel, "<-"), marked(kernel, "<=")
            for line in found:
                before, _, last = line.partition("without a barrier between")
                # Either access of a race may come first.
                assert places(last or before) <= here | other
                assert places(line) & here


def test_a_copy_that_nobody_waits_for_is_found(faults: Path):
    reports = run(faults, "copy_that_nobody_waits_for").reports
    assert reports == ["kernel, block 0: ends before a bulk copy that nobody has waited for"]


@pytest.mark.parametrize("name", SOUND)
def test_a_kernel_without_fault_is_not_reported(name: str, faults: Path):
    results = set()
    for seed in SEEDS:
        end, numbers, reports = run(faults, name, seed)
        assert (end, reports) == ("done", [])
        results.add(numbers)
    assert len(results) == 1


@pytest.mark.parametrize("name", ["write_after_read", "blocks_write_one_place", "across_a_grid"])
def test_a_race_changes_results(name: str, faults: Path):
    runs = [run(faults, name, seed) for seed in SEEDS]
    assert {one.end for one in runs} == {"done"}
    assert len({one.results for one in runs}) > 1
    assert run(faults, name, 1) == runs[0]


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_launch_is_refused(name: str, faults: Path):
    target, reason = REFUSED[name]
    end, numbers, reports = run(faults, name, target=target)
    assert end == "stopped"
    assert set(numbers.split()) == {"0"}
    assert len(reports) == 1
    assert reason in reports[0]


@pytest.fixture(scope="module")
def sanitizers(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where g++ comes without the sanitizers' libraries."""
    command = ["g++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o"]
    program = tmp_path_factory.mktemp("empty") / "empty"
    if subprocess.run(
        [*command, program], input=b"int main() {}", capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the libraries of AddressSanitizer and UndefinedBehaviorSanitizer")


def sanitized(program: Path, *names: str) -> subprocess.CompletedProcess[str]:
    # A thread that is stopped keeps what it has.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *names], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.usefixtures("sanitizers")
def test_sanitizers_know_fibers(built: Callable[[str], Path]):
    program = built("faults-sanitized")
    for name in SOUND:
        result = sanitized(program, name)
        assert (result.returncode, result.stderr) == (0, ""), name
    for name, message in SANITIZED.items():
        result = sanitized(program, name)
        assert result.returncode != 0
        assert message in result.stderr


@pytest.mark.usefixtures("sanitizers")
def test_kernels_are_clean_under_sanitizers(built: Callable[[str], Path]):
    result = sanitized(built("calls-sanitized"))
    assert (result.returncode, result.stderr) == (0, "")
