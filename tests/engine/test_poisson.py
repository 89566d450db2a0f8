import numpy as np
import pytest
from comfyui_mend.engine.poisson import membrane
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse
from scipy.sparse import linalg

LEVEL = 1 / 255


def grid(size):
    return np.mgrid[:size, :size]


def holes(size):
    rows, columns = grid(size)
    middle = size // 2
    return {
        "box": (abs(rows - middle) < size * 0.35) & (abs(columns - middle) < size * 0.4),
        "disk": (rows - middle) ** 2 + (columns - middle) ** 2 < (size * 0.4) ** 2,
        "stroke": abs(rows - columns) < 6,
        "border": (columns < size * 0.6) & (rows > size * 0.2),
        "scattered": ndimage.gaussian_filter(np.random.default_rng(1).random((size, size)), 3) > 0.5,
    }


def solved_exactly(values, known, domain):
    unknown = domain & ~known
    number = np.full(known.shape, -1)
    number[unknown] = np.arange(unknown.sum())
    matrix = sparse.lil_matrix((unknown.sum(),) * 2)
    right = np.zeros((unknown.sum(), values.shape[2]))
    height, width = known.shape
    for y, x in np.argwhere(unknown):
        for j, i in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= j < height and 0 <= i < width and domain[j, i]:
                matrix[number[y, x], number[y, x]] += 1
                if known[j, i]:
                    right[number[y, x]] += values[j, i]
                else:
                    matrix[number[y, x], number[j, i]] -= 1
    result = values * known[..., None]
    result[unknown] = linalg.splu(matrix.tocsc()).solve(right)
    return result


def around(hole):
    domain = ndimage.distance_transform_edt(~hole) <= 8
    return domain & ~hole, domain


@pytest.mark.parametrize("size", [33, 90])
@pytest.mark.parametrize("shape", ["box", "disk", "stroke", "border", "scattered"])
def test_it_is_the_solution_of_laplaces_equation(size, shape):
    rows, columns = grid(size)
    hole = holes(size)[shape]
    known, domain = around(hole)
    tilt = (columns / size - 0.5) * 12 * LEVEL
    rough = ndimage.gaussian_filter(np.random.default_rng(2).normal(0, 8 * LEVEL, hole.shape), 2)
    values = np.stack([tilt, tilt * rows / size, rough], axis=-1).astype(np.float32)
    found, expected = membrane(values, known, domain), solved_exactly(values, known, domain)
    assert np.abs(found - expected).max() < 0.2 * LEVEL
    assert np.array_equal(found[known], values[known])


def test_a_plane_goes_on_as_a_plane_through_a_large_hole():
    rows, columns = grid(600)
    hole = holes(600)["box"]
    known, domain = around(hole)
    plane = np.stack([columns, rows, rows - columns], axis=-1).astype(np.float32) / 600 * 12 * LEVEL
    assert np.abs(membrane(plane, known, domain) - plane)[domain].max() < 0.1 * LEVEL


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_it_stays_within_what_is_known_and_commutes_with_flips(height, width, seed):
    random = np.random.default_rng(seed)
    values = random.random((height, width, 3)).astype(np.float32)
    domain = random.random((height, width)) < 0.8
    known = domain & (random.random((height, width)) < 0.1)
    found = membrane(values, known, domain)
    if known.any():
        assert found.max() <= values[known].max() + 0.02
        assert found[found != 0].min() >= values[known].min() - 0.02
    assert not found[~domain].any()
    for flip in (np.flipud, np.fliplr, lambda a: a.swapaxes(0, 1)):
        flipped = membrane(flip(values), flip(known), flip(domain))
        assert np.allclose(flipped, flip(found), atol=0.02)


def test_parts_without_a_known_pixel_are_level_and_parts_do_not_touch():
    values = np.full((20, 41, 3), 0.5, np.float32)
    domain = np.ones((20, 41), bool)
    domain[:, 20] = False
    known = np.zeros_like(domain)
    known[:, 0] = True
    found = membrane(values, known, domain)
    assert np.allclose(found[:, :20], 0.5, atol=1e-4)
    assert not found[:, 20:].any()
