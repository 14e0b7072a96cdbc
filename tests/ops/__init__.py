"""Tests of the ops: a folder an op, with a file a backend."""

import pytest

# Assertions outside test files explain themselves too.
_HELPERS = ("bad_rows", "contract", "harness", "shared")
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in _HELPERS))
