"""Crop and stitch on the real server, with ComfyUI's own nodes between them: what is not masked keeps its bytes."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from workspace import PromptRejectedError

WIDTH, HEIGHT = 141, 109
PHOTO = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
LEFT_SPOT, RIGHT_SPOT = (slice(30, 50), slice(20, 40)), (slice(60, 90), slice(110, 141))


def masked(*spots):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for spot in spots:
        mask[spot] = True
    return mask


def inverted(picture, original):
    # Save Image rounds down
    return np.abs(255 - original.astype(int) - picture).max() <= 1


@pytest.fixture
def graph(client):
    """API prompts around a photo and its mask; the painters are nodes between the crop and the stitch."""

    def upload(name, pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return client.upload_image(name, buffer.getvalue())

    def prompt(mask, *painters, photo=PHOTO, stitch=None, **inputs):
        nodes = {
            "photo": ("LoadImage", {"image": upload("photo.png", photo)}),
            "mask": ("LoadImageMask", {"image": upload("mask.png", np.uint8(mask) * 255), "channel": "red"}),
            "crop": (
                "MendCropToMask",
                {
                    "image": ["photo", 0],
                    "mask": ["mask", 0],
                    "context_factor": 1.5,
                    "size": "megapixels",
                    "megapixels": 0.04,
                    "width": 128,
                    "height": 128,
                    "min_size": 0,
                    **inputs,
                },
            ),
        }
        image = ["crop", 0]
        for number, (kind, settings) in enumerate(painters):
            name = f"painter {number}"
            nodes[name] = (kind, {"image": image, **settings})
            image = [name, 0]
        nodes["stitch"] = ("MendStitch", {"image": image, "crop": ["crop", 2], **(stitch or {})})
        nodes["result"] = ("SaveImage", {"images": ["stitch", 0], "filename_prefix": "mend"})
        nodes["crops"] = ("SaveImage", {"images": ["crop", 0], "filename_prefix": "crops"})
        nodes["info"] = ("PreviewAny", {"source": ["crop", 3]})
        nodes["report"] = ("PreviewAny", {"source": ["stitch", 1]})
        return {name: {"class_type": kind, "inputs": settings} for name, (kind, settings) in nodes.items()}

    return prompt


INVERT = ("ImageInvert", {})
BLUR = ("ImageBlur", {"blur_radius": 3, "sigma": 2.0})


def twice(method="bicubic"):
    return ("ImageScaleBy", {"upscale_method": method, "scale_by": 2.0})


@pytest.fixture
def run(client):
    def run(prompt):
        done = client.run(prompt)
        assert done.status == "success", done.error
        files = [client.image(reference) for reference in done.outputs["result"]["images"]]
        return done, [np.asarray(Image.open(io.BytesIO(file))) for file in files]

    return run


@pytest.mark.parametrize("size", ["own", "exact", "megapixels", "sdxl"])
def test_an_untouched_crop_changes_no_byte(graph, run, size):
    mask = masked(LEFT_SPOT)
    done, (picture,) = run(graph(mask, size=size))
    assert np.array_equal(picture, PHOTO)
    assert "came back as it was cut" in done.outputs["report"]["text"][0]


@pytest.mark.parametrize("painters", [(INVERT,), (BLUR,), (twice(), INVERT), (twice("lanczos"),)])
@pytest.mark.parametrize("blend", ["linear", "auto"])
def test_what_is_not_masked_keeps_its_bytes(graph, run, painters, blend):
    mask = masked(LEFT_SPOT, RIGHT_SPOT)
    _, (picture,) = run(graph(mask, *painters, stitch={"blend": blend}))
    assert np.array_equal(picture[~mask], PHOTO[~mask])
    assert (picture[mask] != PHOTO[mask]).any(axis=-1).mean() > 0.9


def test_each_region_goes_through_the_painter_alone(graph, run):
    mask = masked(LEFT_SPOT, RIGHT_SPOT)
    settings = {"blend": "linear", "color_match": 0.0}
    done, (picture,) = run(
        graph(mask, INVERT, size="own", regions="each", context_factor=1.0, context_pixels=4, stitch=settings)
    )
    assert len(done.outputs["crops"]["images"]) == 2
    assert np.array_equal(picture[~mask], PHOTO[~mask])
    assert inverted(picture[mask], PHOTO[mask])


def test_a_full_mask_is_replaced_and_an_empty_one_is_not(graph, run):
    settings = {"blend": "linear", "color_match": 0.0}
    _, (picture,) = run(graph(masked((slice(None), slice(None))), INVERT, size="own", stitch=settings))
    assert inverted(picture, PHOTO)
    done, (picture,) = run(graph(masked(), INVERT))
    assert np.array_equal(picture, PHOTO)
    assert "empty mask" in done.outputs["info"]["text"][0]


def test_one_picture_with_several_masks_gives_a_picture_for_each(graph, run):
    prompt = graph(masked(LEFT_SPOT), INVERT, video="union")
    prompt["other"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 0.0, "width": WIDTH, "height": HEIGHT},
    }
    for name, parts in (("images", ("mask image", "other image")), ("mask image", "mask"), ("other image", "other")):
        if name == "images":
            inputs = {"image1": [parts[0], 0], "image2": [parts[1], 0]}
            prompt[name] = {"class_type": "ImageBatch", "inputs": inputs}
        else:
            prompt[name] = {"class_type": "MaskToImage", "inputs": {"mask": [parts, 0]}}
    prompt["masks"] = {"class_type": "ImageToMask", "inputs": {"image": ["images", 0], "channel": "red"}}
    prompt["crop"]["inputs"]["mask"] = ["masks", 0]
    done, pictures = run(prompt)
    assert len(pictures) == 2 == len(done.outputs["crops"]["images"])
    assert np.array_equal(pictures[1], PHOTO)
    assert np.array_equal(pictures[0][~masked(LEFT_SPOT)], PHOTO[~masked(LEFT_SPOT)])


def test_a_transparent_picture_keeps_its_alpha_outside(graph, run):
    photo = np.dstack([PHOTO, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    photo[: HEIGHT // 2, :, 3] = 99
    prompt = graph(masked(RIGHT_SPOT), INVERT, photo=photo)
    # LoadImage splits the alpha off; this puts it back
    prompt["rgba"] = {
        "class_type": "JoinImageWithAlpha",
        "inputs": {"image": ["photo", 0], "alpha": ["photo", 1]},
    }
    prompt["crop"]["inputs"]["image"] = ["rgba", 0]
    _, (picture,) = run(prompt)
    assert picture.shape[-1] == 4
    assert np.array_equal(picture[~masked(RIGHT_SPOT)], photo[~masked(RIGHT_SPOT)])


def test_a_crop_is_saved_and_stitched_in_a_later_run(graph, run, client):
    mask = masked(LEFT_SPOT)
    prompt = graph(mask, INVERT)
    prompt["save"] = {"class_type": "MendSaveCrop", "inputs": {"crop": ["crop", 2], "filename_prefix": "cats/one"}}
    done, (expected,) = run(prompt)
    name = done.outputs["save"]["text"][0]
    assert name == "cats/one_00001_.json [output]"
    later = {key: prompt[key] for key in ("photo", "mask", "crop", "painter 0", "stitch", "result")}
    later["load"] = {"class_type": "MendLoadCrop", "inputs": {"record": name}}
    later["stitch"]["inputs"] |= {"crop": ["load", 0], "original": ["photo", 0]}
    _, (picture,) = run(later)
    assert np.array_equal(picture, expected)
    # once more is another file
    prompt["save"]["inputs"]["filename_prefix"] = "cats/one "
    again = client.run(prompt)
    assert again.outputs["save"]["text"][0] == "cats/one_00002_.json [output]"
    listed = json.dumps(client.object_info()["MendLoadCrop"]["input"]["required"]["record"])
    assert name in listed
    later["other"] = {"class_type": "ImageInvert", "inputs": {"image": ["photo", 0]}}
    later["stitch"]["inputs"]["original"] = ["other", 0]
    assert "not what was cut" in client.run(later).outputs["stitch"]["text"][0]
    del later["stitch"]["inputs"]["original"]
    refused = client.run(later)
    assert "connect the original image" in refused.error["exception_message"]


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../b", "..\\out"])
def test_a_prefix_that_leaves_the_folder_is_refused(graph, client, prefix):
    prompt = graph(masked(LEFT_SPOT))
    prompt["save"] = {"class_type": "MendSaveCrop", "inputs": {"crop": ["crop", 2], "filename_prefix": prefix}}
    assert "leaves the folder" in client.run(prompt).error["exception_message"]


@pytest.mark.parametrize("name", ["../../secret.json [output]", "/etc/passwd", "gone.json [input]", ""])
def test_only_records_of_the_menu_are_opened(client, name):
    prompt = {
        "load": {"class_type": "MendLoadCrop", "inputs": {"record": name}},
        "photo": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "stitch": {"class_type": "MendStitch", "inputs": {"image": ["photo", 0], "crop": ["load", 0]}},
        "result": {"class_type": "SaveImage", "inputs": {"images": ["stitch", 0], "filename_prefix": "mend"}},
    }
    with pytest.raises(PromptRejectedError, match="There is no crop record"):
        client.queue(prompt)


def test_hurried_inputs_get_a_sentence(graph, client):
    with pytest.raises(PromptRejectedError, match="There is no size 'big'; choose one of own, exact"):
        client.queue(graph(masked(LEFT_SPOT), size="big"))
    with pytest.raises(PromptRejectedError, match="There is no blend 'glue'"):
        glued = graph(masked(LEFT_SPOT), stitch={"blend": "glue"})
        # an output that does not need the stitch would run
        client.queue({name: node for name, node in glued.items() if name not in ("crops", "info")})
    prompt = graph(masked(LEFT_SPOT))
    prompt["crop"]["inputs"]["mask"] = ["photo", 1]
    assert "No mask is painted" in client.run(prompt).error["exception_message"]
    squeeze = ("ImageScale", {"upscale_method": "area", "width": 64, "height": 300, "crop": "disabled"})
    refused = client.run(graph(masked(LEFT_SPOT), squeeze)).error["exception_message"]
    assert "another aspect ratio" in refused
