import torch
from comfyui_mend.engine.blend import paste


def picture(seed=0, height=120, width=160):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.25


def square(height=120, width=160):
    mask = torch.zeros(1, height, width)
    mask[:, 40:80, 50:110] = 1
    return mask


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
