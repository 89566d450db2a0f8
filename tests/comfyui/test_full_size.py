"""The real Stable Diffusion 1.5 inpainting architecture, where MEND_FULL_SIZE is set: it takes 9 GB and minutes."""

import os

import pytest
from workspace import run_inside


@pytest.mark.skipif(not os.environ.get("MEND_FULL_SIZE"), reason="set MEND_FULL_SIZE=1 to run it (9 GB, minutes)")
def test_a_full_checkpoint_paints_the_same_natively_and_in_the_engine(workspace, tmp_path):
    found = run_inside(workspace, "inside_full_size.py", tmp_path / "full.safetensors", timeout=1800)
    assert 2.0 < found["gigabytes"] < 2.3
    assert found["difference"] < 1e-3 and found["painted"] > 0.01 and found["outside"] == 0
