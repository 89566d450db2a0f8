"""MendLoadSafetyChecker and MendSafetyCheck in the running server."""

import io
import json

import pytest
from PIL import Image, ImageDraw
from tiny import tiny_safety_checker
from workspace import PromptRejectedError

BUILT_IN = "opennsfw (built in)"


@pytest.fixture(scope="module")
def folder_checker(server):
    """The menu name of a tiny checker in models/diffusers whose thresholds everything passes, and so is flagged."""
    checker = tiny_safety_checker()
    checker.concept_embeds_weights.fill_(-1)
    checker.save_pretrained(server.base / "models" / "diffusers" / "tiny" / "safety_checker", safe_serialization=True)
    return "tiny/safety_checker"


@pytest.fixture
def picture(client):
    image = Image.new("RGB", (96, 64), "seagreen")
    ImageDraw.Draw(image).ellipse((20, 10, 70, 50), fill="gold")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return client.upload_image("safety.png", buffer.getvalue())


def graph(picture, checker=None, **inputs):
    """A batch of two: the pictures, the report, and the list of scores, each shown by a core node."""
    nodes = {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "two": {"class_type": "RepeatImageBatch", "inputs": {"image": ["load", 0], "amount": 2}},
        "check": {
            "class_type": "MendSafetyCheck",
            "inputs": {"images": ["two", 0], "threshold": 0.5, "action": "black", **inputs},
        },
        "images": {"class_type": "PreviewImage", "inputs": {"images": ["check", 0]}},
        "scores": {"class_type": "PreviewAny", "inputs": {"source": ["check", 3]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["check", 4]}},
    }
    if checker:
        nodes["checker"] = {"class_type": "MendLoadSafetyChecker", "inputs": {"checker": checker}}
        nodes["check"]["inputs"]["checker"] = ["checker", 0]
    return nodes


def pictures(client, run):
    references = run.outputs["images"]["images"]
    return [Image.open(io.BytesIO(client.image(reference))).convert("RGB") for reference in references]


def reported(run):
    return json.loads(run.outputs["report"]["text"][0])


def test_the_built_in_checker_passes_a_harmless_picture(client, picture):
    run = client.run(graph(picture))
    assert run.status == "success", run.error
    report = reported(run)
    assert report["checker"] == "opennsfw" and not report["flagged"]
    scores = [image["score"] for image in report["images"]]
    assert len(scores) == 2 and all(0 < score < 0.5 for score in scores)
    assert [float(text) for text in run.outputs["scores"]["text"]] == scores
    assert "0 of 2 pictures flagged" in run.outputs["check"]["text"][0]
    assert all(image.getpixel((45, 30)) == (255, 215, 0) for image in pictures(client, run))


@pytest.mark.parametrize(("action", "colours"), [("black", 1), ("blur", 100), ("pass", 2)])
def test_a_checker_from_a_folder_flags_and_the_action_follows(client, picture, folder_checker, action, colours):
    run = client.run(graph(picture, folder_checker, action=action))
    assert run.status == "success", run.error
    report = reported(run)
    assert report["checker"] == "tiny" and report["flagged"]
    assert set(report["images"][0]["details"]) == {f"special_{n}" for n in range(3)} | {
        f"concept_{n}" for n in range(17)
    }
    assert "2 of 2 pictures flagged by tiny" in run.outputs["check"]["text"][0]
    for image in pictures(client, run):
        count = len(image.getcolors(100_000))
        assert count > 100 if colours == 100 else count == colours
        assert (image.getextrema() == ((0, 0),) * 3) == (action == "black")


def test_the_menu_lists_folders_and_the_built_in_one(client, folder_checker):
    inputs = client.object_info()["MendLoadSafetyChecker"]["input"]["required"]["checker"]
    options = inputs[1].get("options", inputs[0])
    assert options[0] == BUILT_IN and folder_checker in options


@pytest.mark.parametrize("name", ["nothing", "../tiny/safety_checker", "/etc"])
def test_only_what_the_menu_lists_is_opened(client, picture, name):
    with pytest.raises(PromptRejectedError, match="There is no safety checker"):
        client.run(graph(picture, name))


def test_a_changed_checker_is_loaded_again(server, client, picture, folder_checker):
    def loads(run):
        return any(e.type == "executing" and e.data["node"] == "checker" for e in run.events)

    client.run(graph(picture, folder_checker))
    assert not loads(client.run(graph(picture, folder_checker)))
    weights = server.base / "models" / "diffusers" / folder_checker / "model.safetensors"
    checker = tiny_safety_checker()
    checker.save_pretrained(weights.parent, safe_serialization=True)
    run = client.run(graph(picture, folder_checker))
    assert loads(run) and not reported(run)["flagged"]


def test_every_socket_and_widget_is_explained(client):
    info = client.object_info()
    for name in ("MendLoadSafetyChecker", "MendSafetyCheck"):
        node = info[name]
        assert node["category"] == "Mend" and node["description"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(spec[1]["tooltip"] for spec in inputs.values())
        assert all(node["output_tooltips"])


def test_a_name_where_a_loaded_checker_belongs_is_explained(client, picture):
    workflow = graph(picture)
    workflow["check"]["inputs"]["checker"] = BUILT_IN
    run = client.run(workflow)
    assert "connect Load Safety Checker (Mend)" in run.error["exception_message"]
