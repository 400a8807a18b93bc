"""Which backends the op tests hold against the reference, and in which dtypes: the native CPU kernels, or those that
PYFINETUNE_TEST_BACKENDS names. Triton's kernels run without a GPU under its interpreter:

    TRITON_INTERPRET=1 PYFINETUNE_TEST_BACKENDS=triton pytest tests/test_rms_norm.py
"""

from __future__ import annotations

import os

import pytest
import torch

from pyfinetune.ops._triton import interpreted, triton_dtypes

FAST_BACKENDS = os.environ.get("PYFINETUNE_TEST_BACKENDS", "cpu").split(",")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if dtype in triton_dtypes()]
# In Python every instruction of every program takes its time: tests of large shapes skip.
INTERPRETED = interpreted()
# For a test of the native CPU kernels, which other backends have nothing of.
native_kernels = pytest.mark.skipif("cpu" not in FAST_BACKENDS, reason="it is about the CPU kernels")
