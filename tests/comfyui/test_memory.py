"""ComfyUI's memory management owns every module, and the results are those of the plain modules, bit for bit."""

import pytest
from workspace import run_inside

MODULES = ("unet", "vae", "vae_in_bands", "text_encoder", "t5", "safety_checker", "lama")
ON_THE_CARD = "meta"
"""The name of the pretended graphics card; see inside.VRAM."""


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_memory.py")


def assert_exact(row):
    assert row["equal"]
    assert row["stranded"] == []


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("memory", "least", "most"), [("full", 1.0, 1.0), ("40 %", 0.2, 0.4), ("10 %", 0.0, 0.1), ("no VRAM", 0.0, 0.0)]
)
def test_outputs_are_exact_however_little_is_loaded(found, module, memory, least, most):
    row = found["placements"][f"{module}, {memory}"]["loaded"]
    assert_exact(row)
    # without room on the card ComfyUI runs text encoders on the processor, where they are whole
    if row["device"] == ON_THE_CARD:
        assert least <= row["loaded"] <= most
    else:
        assert memory == "no VRAM" and module in ("text_encoder", "t5", "safety_checker")


@pytest.mark.parametrize("module", MODULES)
def test_a_partly_unloaded_module_stays_exact(found, module):
    rows = found["placements"][f"{module}, full"]
    assert_exact(rows["partially unloaded"])
    assert 0 < rows["partially unloaded"]["loaded"] < 1
    for memory in ("40 %", "10 %", "no VRAM"):
        assert_exact(found["placements"][f"{module}, {memory}"]["partially unloaded"])


@pytest.mark.parametrize("module", MODULES)
def test_unloading_all_models_takes_every_tensor_off_the_card_and_a_load_brings_them_back(found, module):
    for memory in ("full", "40 %", "10 %"):
        rows = found["placements"][f"{module}, {memory}"]
        assert rows["in VRAM after unloading"] == 0
        assert_exact(rows["loaded again"])
        assert rows["loaded again"]["loaded"] == 1


@pytest.mark.parametrize("module", MODULES)
def test_a_load_into_less_memory_than_before_strands_nothing(found, module):
    row = found["placements"][f"{module}, full"]["shrunk"]
    assert_exact(row)
    assert 0 < row["loaded"] <= 0.5


@pytest.mark.parametrize("module", MODULES)
def test_the_check_for_stranded_tensors_can_fail(found, module):
    control = found["plain_modules_are_stranded"][module]
    assert control["stranded"] > 0
    assert "expected all tensors on one device" in control["error"]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_stranded_when_someone_else_loads_the_patcher(found, module):
    assert found["loaded_by_others"][module] == []


@pytest.mark.parametrize("module", ["unet", "vae", "vae_in_bands", "text_encoder", "t5"])
def test_dynamic_vram_fetches_each_weight_when_it_is_used(found, module):
    report = found["dynamic"][module]
    assert report["dynamic"]
    for row in report["rows"]:
        assert_exact(row)
    assert report["in VRAM after unloading"] == 0


@pytest.mark.parametrize("module", ["unet", "vae"])
def test_dynamic_vram_manages_the_weights_that_matter(found, module):
    # layers below 16 KB are loaded at once, by ComfyUI's choice
    assert found["dynamic"][module]["staged"] > 0.8


def test_another_model_moves_ours_out_and_ours_moves_it(found):
    for row in found["eviction"]["rows"]:
        assert_exact(row)
        assert row["loaded"] == 1
    evicted, resident = found["eviction"]["shares"]
    assert evicted < 0.5
    assert resident == 1


def test_the_patcher_is_asked_only_when_something_changed(found):
    assert found["repeated_loads"] == {
        "first": 1,
        "same": 0,
        "less": 0,
        "more": 1,
        "after another model": 1,
        "after a partial unload": 1,
        "after unloading": 1,
        "free": True,
    }


def test_dropping_a_model_frees_its_entries_without_a_leak(found):
    report = found["dropping_the_model"]
    assert report["models"] == report["before"] == 3
    assert report["largest first"]
    assert report["recognised"] in (True, None)
    assert report["after"] == report["patchers left"] == 0
    assert "Requested to load UNet2DConditionModel" in report["log"]
    assert report["leak warnings"] == 0


def test_modules_made_in_inference_mode_are_unloaded_outside_of_it(found):
    for row in found["inference_mode"]["rows"]:
        assert_exact(row)


def test_an_interrupt_stops_inside_a_denoising_step_and_the_next_one_runs(found):
    report = found["interruption"]
    assert report["stopped"]
    assert report["ran"] == ["conv_in", "mid_block"]
    assert_exact(report["after"])


def test_without_a_card_everything_is_float32_unless_told_otherwise(found):
    assert set(found["host"]["dtypes"].values()) == {"torch.float32"}
    assert found["host"]["precision"] == "torch.bfloat16"
    assert found["host"]["free"] > 0


def test_model_folders_are_comfyuis(found):
    assert all(count >= 1 for count in found["host"]["folders"].values())
    assert found["host"]["unknown folders"] == 0


def test_progress_carries_previews_where_the_user_wants_them(found):
    preview = ["JPEG", [8, 8], "RGB", 512]
    # latent2rgb twice, previews switched off twice, another family's latents, then two that nothing is known of
    assert found["host"]["progress"] == [
        [1, 3, preview],
        [3, 3, None],
        [1, 3, None],
        [3, 3, None],
        [1, 1, preview],
        [1, 1, None],
        [1, 1, None],
    ]
    assert found["host"]["previews differ"]


def test_every_kind_of_latents_that_comfyui_can_show_is_shown(found):
    formats = found["host"]["previewed formats"]
    assert {name: shown for name, shown in formats.items() if shown not in ("True", "none")} == {}
    assert {"SD15", "SDXL", "SD3", "Flux", "Wan21"} <= {name for name, shown in formats.items() if shown == "True"}


def test_an_interrupt_is_seen_by_the_check_and_by_the_bar(found):
    assert found["host"]["interrupts"] == 2
    assert not found["host"]["pending"]


@pytest.fixture(scope="module")
def pictures(workspace):
    return run_inside(workspace, "inside_inpaint.py")


@pytest.mark.parametrize("channels", [9, 4])
@pytest.mark.parametrize(
    ("memory", "least", "most"), [("full", 1.0, 1.0), ("40 %", 0.2, 0.4), ("10 %", 0.0, 0.1), ("no VRAM", 0.0, 0.0)]
)
def test_pictures_are_the_same_however_little_memory_there_is(pictures, channels, memory, least, most):
    report = pictures["pictures"][f"{channels} channels, {memory}"]
    assert least <= report["most loaded"] <= most
    # as the batch shrinks with the memory, sums are rounded in another order; a picture has 256 levels
    assert {name: difference for name, difference in report["differences"].items() if difference > 2e-4} == {}


@pytest.mark.parametrize("memory", ["full", "40 %", "10 %", "no VRAM"])
def test_a_vae_in_bands_makes_the_same_pictures_on_the_card(pictures, memory):
    report = pictures["bands"][memory]
    assert report["difference"] < 2e-4
    # the whole canvas has 32 planes of 128x128
    assert 0 < report["largest"][ON_THE_CARD] < 32 * 128 * 128 / 2
    assert set(report["largest"]) == {ON_THE_CARD}


def test_a_card_that_runs_out_of_memory_is_tried_again_with_less(pictures):
    report = pictures["out_of_memory"]
    assert report["rows"] == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]  # two pictures of two branches, twice
    assert report["difference"] < 2e-4
    assert len(report["log"]) == 2
    assert "128x128, one picture at a time; trying again, one picture and one prompt at a time" in report["log"][1]


@pytest.mark.parametrize("memory", ["full", "40 %", "10 %", "no VRAM"])
def test_a_network_kept_in_8_bits_computes_with_its_rounded_weights(found, memory):
    report = found["eight_bits"][memory]
    assert_exact(report)
    assert report["stored"] == ["torch.float32", "torch.float8_e4m3fn"]
    assert report["computes in"] == "torch.float32"
    # three quarters of the linear layers and convolutions, which are nearly everything
    assert report["share of memory"] < 0.35


def test_only_diffusion_networks_are_kept_in_8_bits(found):
    assert found["eight_bits"]["roles"] == {"denoiser": "torch.float8_e4m3fn"}
    assert found["eight_bits"]["a precision that was chosen"] is None
