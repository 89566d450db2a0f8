import torch
from comfyui_mend.engine.blend import MAX_SHIFT, match_ring, paste


def picture(seed=0, height=120, width=160):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def square(height=120, width=160):
    mask = torch.zeros(1, height, width)
    mask[:, 40:80, 50:110] = 1
    return mask


def test_a_uniform_tone_shift_is_taken_off():
    original, mask = picture(), square()
    shift = torch.tensor([0.02, -0.03, 0.01])
    assert torch.allclose(match_ring(original + shift, original, mask), original, atol=1e-5)


def test_what_is_inside_the_mask_does_not_move_the_measure():
    original, mask = picture(), square()
    painted = torch.where(mask[..., None] == 1, torch.tensor(0.9), original + 0.02)
    matched = match_ring(painted, original, mask)
    assert torch.allclose(matched[mask == 1], torch.tensor(0.88), atol=1e-5)


def test_a_large_difference_is_content_and_is_not_followed():
    original, mask = picture(), square()
    matched = match_ring(original + 0.2, original, mask)
    assert torch.allclose(matched, original + 0.2 - MAX_SHIFT, atol=1e-5)


def test_a_full_mask_leaves_nothing_to_compare():
    original = picture()
    painted = original + 0.02
    assert torch.equal(match_ring(painted, original, torch.ones(1, 120, 160)), painted)


def test_each_picture_of_a_batch_has_its_own_measure():
    original = torch.cat([picture(0), picture(1)])
    masks = square().expand(2, -1, -1)
    shift = torch.tensor([0.02, -0.02]).reshape(2, 1, 1, 1)
    assert torch.allclose(match_ring(original + shift, original, masks), original, atol=1e-5)


def test_paste_is_exact_at_both_ends_and_linear_between():
    original, painted = picture(0), picture(1)
    mask = square()
    mask[:, 60, :] = 0.25
    pasted = paste(original, painted, mask)
    assert torch.equal(pasted[mask == 0], original[mask == 0])
    assert torch.equal(pasted[mask == 1], painted[mask == 1])
    assert torch.allclose(pasted[mask == 0.25], (0.75 * original + 0.25 * painted)[mask == 0.25], atol=1e-6)


def test_paste_keeps_even_invalid_numbers_out():
    original, mask = picture(), square()
    painted = torch.where(mask[..., None] == 1, picture(1), torch.tensor(float("nan")))
    assert torch.isfinite(paste(original, painted, mask)).all()
