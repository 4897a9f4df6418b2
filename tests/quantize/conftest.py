"""Fixtures of all tests of kernels."""

import pytest


@pytest.fixture
def any_cpu(monkeypatch):
    """ARK is taken on any CPU."""
    monkeypatch.setattr("moe_precision.quantize.kernels.ark.is_intel", lambda: True)
