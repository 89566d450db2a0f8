"""LaMa in a real ComfyUI: from its file through both nodes, in whatever memory there is."""

import io

import numpy as np
import pytest
from PIL import Image
from workspace import PromptRejectedError, run_inside

SIZE = (96, 80)


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_fill.py")


def test_a_lama_fill_is_what_the_network_gives_at_the_pictures_own_size(found):
    results = found["results"]
    assert results["difference"] < 1e-5
    assert results["outside"]
    assert results["changed"] > 0.1


def test_batches_run_picture_by_picture_and_alpha_becomes_opaque(found):
    assert found["results"]["batch"]
    assert found["results"]["alpha"]


def test_the_random_generators_of_others_stay_where_they_were(found):
    assert not found["results"]["generator"]
    assert found["files"]["numpy's generator untouched"]


def test_weights_in_half_precision_and_under_other_names_load_as_float32(found):
    assert found["files"]["architectures"] == {"half.safetensors": "LaMa", "checkpoint.safetensors": "LaMa"}
    assert found["files"]["dtype"] == "torch.float32"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown.safetensors", "is not a model that fills holes; supported are LaMa and MAT"),
        ("damaged.safetensors", "weights do not fit together (Error(s) in loading state_dict for LaMa: Missing key"),
        ("upscaler.safetensors", "cannot fill holes; supported are LaMa and MAT"),
        ("mat.safetensors", "spandrel_extra_arches: its code for MAT is licensed for non-commercial use only"),
    ],
)
def test_other_files_are_named_for_what_they_are(found, name, words):
    refusal = found["files"]["refusals"][name]
    assert name in refusal
    # the package of MAT may be there: then this file is too short to be one
    assert words in refusal or (name.startswith("mat") and "do not fit together" in refusal)


@pytest.mark.parametrize(("memory", "least", "most"), [("full", 1.0, 1.0), ("40 %", 0.2, 0.4)])
def test_pictures_are_the_same_however_little_of_the_network_is_loaded(found, memory, least, most):
    row = found["memory"][memory]
    assert row["equal"]
    assert least <= row["loaded"] <= most
    assert row["models"] == 1


def test_stop_is_heard_between_two_tiles(found):
    assert found["interruption"] == {"stopped": True, "painted": 2}


def test_the_folder_is_made_known_when_it_is_needed_and_a_name_is_no_model(found):
    assert found["nodes"]["registered by"][1]
    assert "connect Load Fill Model" in found["nodes"]["not a model"]
    assert "No fill model found: put the file into models/inpaint" in found["nodes"]["unknown"]


# --- the two nodes on the server


def photo_with_hole():
    photo = np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 4), np.uint8)
    photo[..., 3] = 255
    photo[20:40, 30:60, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    return buffer.getvalue(), photo


def workflow(name, method, **options):
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "MendFill", "inputs": {"image": ["1", 0], "mask": ["1", 1], "method": method, **options}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "filled"}},
    }


@pytest.fixture
def picture(client):
    content, photo = photo_with_hole()
    return client.upload_image("fill_hole.png", content), photo


def test_a_method_that_needs_a_network_says_so_in_one_sentence(client, picture):
    name, _ = picture
    run = client.run(workflow(name, "lama"))
    assert run.status == "error"
    assert run.error["exception_type"] == "mend.InputError"
    assert 'The fill method "lama" needs its network: use Fill (Mend) with Load Fill' in run.error["exception_message"]


@pytest.mark.parametrize("method", ["mirror", "noise"])
def test_the_progress_bar_ends_full_and_only_the_hole_changes(client, picture, method):
    name, photo = picture
    run = client.run(workflow(name, method, seed=3))
    assert run.status == "success", run.error
    value, top = run.progress[-1]
    assert value == top
    result = np.asarray(Image.open(io.BytesIO(client.image(run.images[0]))))
    hole = photo[..., 3] == 0
    assert (result[..., :3] == photo[..., :3])[~hole].all()
    assert (result[..., :3] != photo[..., :3]).any(axis=-1)[hole].mean() > 0.9


def test_a_file_that_is_not_there_is_refused_before_anything_runs(client, picture):
    name, _ = picture
    graph = workflow(name, "lama", fill_model=["4", 0])
    graph["4"] = {"class_type": "MendLoadFillModel", "inputs": {"fill_model": "no-such-lama.safetensors"}}
    with pytest.raises(PromptRejectedError, match="models/inpaint"):
        client.run(graph)


def test_a_file_made_while_the_server_runs_is_found_and_a_pickle_tells_the_way_out(client, server, picture):
    name, _ = picture
    folder = server.base / "models" / "inpaint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "big-lama.pt").write_bytes(b"PK\x03\x04")
    graph = workflow(name, "lama", fill_model=["4", 0])
    graph["4"] = {"class_type": "MendLoadFillModel", "inputs": {"fill_model": "big-lama.pt"}}
    run = client.run(graph)
    assert run.status == "error"
    assert run.error["exception_type"] == "mend.ModelFileError"
    assert "`mend models convert`" in run.error["exception_message"]
