"""Marks of tests that need what the compiled kernels need."""

from __future__ import annotations

import pytest

from mmrec.model.ops import dispatch
from mmrec.model.ops.native.products import has_tiles

needs_compiler = pytest.mark.skipif(not dispatch.choose_native(), reason="no C compiler")
needs_tiles = pytest.mark.skipif(not has_tiles(), reason="no compiled kernels, or no bfloat16 of this processor")
