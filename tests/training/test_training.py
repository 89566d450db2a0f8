"""Training in miniature: the pictures, the words, runs that are stopped and go on, and the folder that comes out."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_mend.training import evaluate, export, scenes, train_unet, train_vae
from comfyui_mend.training.latents import LatentStore, latent_mask
from comfyui_mend.training.runs import Means, Run, rate
from comfyui_mend.training.scenes import Kind
from comfyui_mend.training.tokenizer import build_tokenizer

# --- scenes


@pytest.mark.parametrize("kind", Kind)
def test_a_sample_follows_from_its_seed_and_number_alone(kind):
    first, again, other = (scenes.sample(5, i, kind=kind) for i in (3, 3, 4))
    for name in ("image", "mask", "background", "coverage"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("index", range(40))
def test_samples_show_what_their_caption_says(index):
    sample = scenes.sample(1, index)
    assert sample.image.shape == (scenes.SIZE, scenes.SIZE, 3) and sample.image.dtype == np.float32
    assert sample.image.min() >= 0 and sample.image.max() <= 1
    assert set(np.unique(sample.mask)) <= {0, 1} and sample.mask.any()
    assert sample.caption in scenes.captions()
    if sample.kind is Kind.REMOVE:
        assert sample.caption == ""
        assert np.array_equal(sample.image[sample.mask > 0], sample.background[sample.mask > 0])
    else:
        assert sample.color in sample.caption and sample.shape in sample.caption
        shown = sample.image[sample.coverage == 1]
        assert np.abs(shown - scenes.COLORS[sample.color]).max() < 5 * scenes.COLOR_JITTER
    if sample.kind is Kind.PAINT:
        assert sample.mask[sample.coverage > 0].all()


def test_kinds_come_in_their_shares():
    kinds = [scenes.sample(2, i).kind for i in range(400)]
    for kind, share in scenes.SHARES.items():
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.08


@pytest.mark.parametrize("draw", scenes.MASKS)
def test_every_kind_of_mask_leaves_a_hole(draw):
    for seed in range(20):
        hole = draw(np.random.default_rng(seed)) > 0.5
        assert 0.002 < hole.mean() <= 1


def test_held_out_photographs_are_not_trained_on():
    for name in (*scenes.PHOTOS, *scenes.TEXTURES):
        shown, kept = scenes.load_photo(name, False), scenes.load_photo(name, True)
        assert abs(kept.width / (kept.width + shown.width) - scenes.HELD_OUT_WIDTH) < 0.01


def test_captions_have_their_article():
    assert scenes.describe("orange", "star") == "an orange star" and scenes.describe("red", "cross") == "a red cross"
    assert len(set(scenes.captions())) == 1 + len(scenes.COLORS) * len(scenes.SHAPES)


# --- words


def test_words_of_the_captions_are_one_token_and_others_are_spelled():
    tokenizer = build_tokenizer()
    ids = tokenizer("an orange triangle").input_ids
    assert len(ids) == 5 and (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer("Purple HEART!").input_ids[1:-1]).replace(" ", "") == "purpleheart!"
    assert len(tokenizer("zebra").input_ids) > 5
    padded = tokenizer("a red circle", padding="max_length").input_ids
    assert len(padded) == 77 and padded[-1] == tokenizer.eos_token_id


# --- runs


def parts():
    torch.manual_seed(0)
    return {"part": torch.nn.Linear(4, 4)}


def descend(run, module, total, stop_after=None):
    for step in run.steps(total):
        torch.manual_seed(step)
        run.update((module(torch.randn(8, 4)) - 1).square().mean())
        if stop_after is not None and step + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_that_was_stopped_ends_where_one_without_a_stop_does(tmp_path, signals):
    straight = parts()
    run = Run(tmp_path / "straight", straight, 1e-2)
    assert not run.resume()
    descend(run, straight["part"], 30)

    first = parts()
    run = Run(tmp_path / "stopped", first, 1e-2)
    descend(run, first["part"], 30, stop_after=11)
    assert run.step == 11
    second = {"part": torch.nn.Linear(4, 4)}
    run = Run(tmp_path / "stopped", second, 1e-2)
    assert run.resume() and run.step == 11
    descend(run, second["part"], 30)
    assert run.step == 30
    assert torch.equal(second["part"].weight, straight["part"].weight)
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.suffix == ".partial"]


def test_the_average_is_lent_and_given_back(tmp_path, signals):
    module = parts()["part"]
    run = Run(tmp_path, {"part": module}, 1e-1, ema=0.9)
    descend(run, module, 20)
    live = module.weight.clone()
    with run.averaged():
        assert not module.training and not torch.equal(module.weight, live)
    assert module.training and torch.equal(module.weight, live)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    rates = [rate(step, 10_000, 0.2) for step in range(10_001)]
    assert rates[0] == 0.01 and rates[99] == rates[5000] == rates[8000] == 1 and rates[9000] == 0.5 and rates[-1] == 0


def test_means_are_over_everything_since_the_last_line():
    means = Means()
    means.add(loss=torch.tensor([1.0, 2.0]), early=torch.tensor(4.0))
    means.add(loss=torch.tensor([6.0]))
    assert means.take() == {"loss": 3.0, "early": 4.0} and means.take() == {}


# --- latents


def test_masks_of_both_manners_stand_side_by_side():
    mask = torch.zeros(2, 1, scenes.SIZE, scenes.SIZE)
    mask[..., 5, 6] = 1  # neither first of its cell of 4 nor alone in touching it
    nearest, touched = latent_mask(mask)
    assert nearest.sum() == 0 and touched.sum() == 1 and touched[0, 1, 1] == 1


# --- the whole way, in a few steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of everything: (runs, exported folder, the log of the UNet)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vae, "HELD_OUT", 32)
        patch.setattr(train_vae, "EVERY", 2)
        patch.setattr(train_unet, "BATCH", 4)
        patch.setattr(train_unet, "EVERY", 2)
        patch.setattr(train_unet, "LESSONS", 60)
        patch.setattr("comfyui_mend.training.latents.SHARD", 8)
        patch.setattr("comfyui_mend.training.pipeline.SCALE_PICTURES", 16)
        assert train_vae.train(runs / "vae", 2)
        assert train_unet.train(runs / "unet", runs / "vae", 2)
        export.export(runs / "vae", runs / "unet", runs / "model")
    for number, handler in before.items():
        signal.signal(number, handler)
    log = [json.loads(line) for line in (runs / "unet" / "log.jsonl").read_text().splitlines()]
    return runs, runs / "model", log


def test_training_leaves_a_log_sheets_and_a_model_that_diffusers_loads(trained):
    runs, model, log = trained
    assert log[0]["lesson"] < 2  # the words are told apart before anything is painted
    psnr = json.loads((runs / "vae" / "log.jsonl").read_text().splitlines()[0])["psnr"]
    assert 0 < psnr < 40
    assert (runs / "vae" / "sheet.png").is_file() and (runs / "unet" / "sheet.png").is_file()
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < export.LIMIT
    pipeline = evaluate.load_pipeline(model)
    painted = evaluate.DiffusersPainter(pipeline)(evaluate.held_out(Kind.PAINT, 1), ["a red star"], "DDIM", 2, 4.0)
    assert painted[0].shape == (scenes.SIZE, scenes.SIZE, 3) and np.isfinite(painted[0]).all()
    assert (model / "README.md").read_text().startswith("---\nlicense: apache-2.0")


def test_a_lost_shard_is_made_again_the_same(trained):
    runs, _, _ = trained
    shard = sorted((runs / "unet" / "latents").glob("*.safetensors"))[0]
    before = shard.read_bytes()
    vae = train_unet.load_vae(runs / "vae")
    vae.register_to_config(scaling_factor=evaluate.load_pipeline(runs / "model").vae.config.scaling_factor)
    shard.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfyui_mend.training.latents.SHARD", 8)
        LatentStore(runs / "unet" / "latents", vae, train_unet.SEED).batch(1, 2, np.random.default_rng(0))
    assert shard.read_bytes() == before


# --- judges

NEXT_COLOR, NEXT_SHAPE = (
    dict(zip(names, [*names[1:], names[0]], strict=True)) for names in (list(scenes.COLORS), list(scenes.SHAPES))
)


def test_the_judges_see_what_is_there():
    samples = evaluate.held_out(Kind.PAINT, 40)
    verdict = evaluate.judge(samples, [s.image for s in samples])
    assert verdict == evaluate.Verdict(1, 1, 1, 1)
    relabelled = [replace(s, color=NEXT_COLOR[s.color], shape=NEXT_SHAPE[s.shape]) for s in samples]
    mistaken = evaluate.judge(relabelled, [s.image for s in samples])
    assert mistaken.color == mistaken.shape == 0 and mistaken.inside == 1
    unpainted = evaluate.judge(samples, [s.background for s in samples])
    assert unpainted.color == unpainted.shape == 0 and unpainted.inside == 1
    inverted = evaluate.judge(samples, [1 - s.background for s in samples])
    assert inverted.inside < 0.2
