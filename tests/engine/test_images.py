import pytest
import torch
from comfyui_mend.engine.images import NEARLY, as_images, as_mask_batch, as_masks, pair, resize, resize_mask
from comfyui_mend.engine.types import InputError, Size


def test_nearly_black_and_nearly_white_settle_and_grey_stays():
    levels = torch.arange(256).reshape(1, 16, 16) / 255
    settled = (as_mask_batch(levels) * 255).round().int().flatten().tolist()
    assert settled[:4] == [0, 0, 0, 0]
    assert settled[4:252] == list(range(4, 252))
    assert settled[252:] == [255, 255, 255, 255]
    assert NEARLY == 4 / 255


@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (1, 1, 8, 6), (1, 8, 6, 1)])
def test_masks_of_every_shape_become_a_batch(shape):
    mask = torch.zeros(shape)
    assert as_mask_batch(mask).shape == (1, 8, 6)


def test_values_a_hair_out_of_range_are_rounding_and_more_is_refused():
    assert float(as_mask_batch(torch.full((1, 4, 4), 1.0005)).max()) == 1
    with pytest.raises(InputError, match="0 to 255"):
        as_mask_batch(torch.tensor([[[0.0, 255.0]]]))


def test_images_keep_their_bits_and_grey_becomes_rgb():
    image = torch.rand(2, 5, 7, 4)
    assert torch.equal(as_images(image), image)
    assert as_images(image[0]).shape == (1, 5, 7, 4)
    assert torch.equal(as_images(image[..., :1]), image[..., :1].expand(-1, -1, -1, 3))


def test_one_picture_serves_several_masks():
    images, masks = pair(torch.rand(1, 8, 8, 3), torch.rand(3, 8, 8))
    assert images.shape[0] == masks.shape[0] == 3


@pytest.mark.parametrize(("size", "fits"), [((100, 80), True), ((50, 40), True), ((99, 80), True), ((80, 100), False)])
def test_a_mask_is_resized_only_when_its_shape_fits(size, fits):
    images = torch.rand(1, 80, 100, 3)
    mask = torch.ones(1, size[1], size[0])
    if fits:
        assert as_masks(mask, images).shape == (1, 80, 100)
    else:
        with pytest.raises(InputError, match="80x100 but the image is 100x80"):
            as_masks(mask, images)


def test_the_placeholder_is_a_mask_when_the_picture_has_its_size():
    assert not as_masks(torch.zeros(1, 64, 64), torch.rand(1, 64, 64, 3)).any()
    assert as_masks(torch.ones(1, 64, 64), torch.rand(1, 100, 100, 3)).all()


def test_resizing_keeps_the_range_and_the_bits_when_nothing_is_to_do():
    images = (torch.rand(1, 20, 30, 3) > 0.5).float()
    enlarged = resize(images, Size(61, 47))
    assert enlarged.shape == (1, 47, 61, 3)
    assert float(enlarged.min()) >= 0 and float(enlarged.max()) <= 1
    assert resize(images, Size(30, 20)) is images


def test_a_thin_stroke_fades_when_a_mask_shrinks_and_does_not_vanish():
    mask = torch.zeros(1, 400, 400)
    mask[:, 201, :] = 1
    assert float(resize_mask(mask, Size(50, 50)).amax(dim=1).min()) > 0.05


def test_an_inverted_placeholder_says_where_it_comes_from():
    with pytest.raises(InputError, match="Load Image gives 64x64 where nothing is painted"):
        as_masks(torch.ones(1, 64, 64), torch.rand(1, 100, 150, 3))
