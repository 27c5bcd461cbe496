"""What several tests of backends set up alike."""

import pytest

from hf_sparse.backends.flex import attention

from . import doubles


@pytest.fixture
def stand_in(monkeypatch):
    """Run the dense stand-in instead of the compiled kernel, with gradients and in float64."""
    monkeypatch.setattr(attention, "run_kernel", doubles.run_kernel)
    monkeypatch.setattr(attention, "_WIDE", ())  # as on CUDA
    attention._block_mask.cache_clear()
    monkeypatch.setattr("hf_sparse.backends.flex.unsupported", lambda *_: [])
    yield
    attention._block_mask.cache_clear()
