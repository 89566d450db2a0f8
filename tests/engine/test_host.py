"""The stand-alone host."""

import pytest
import torch
from comfyui_mend.engine import host as host_module
from comfyui_mend.engine.host import LocalHost, Role, available_ram
from comfyui_mend.engine.types import MendError
from torch import nn

CARD = torch.device("cuda")


def test_memory_that_torch_holds_without_using_it_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert LocalHost(CARD).free_memory() == 100 + 700 - 200
    assert LocalHost(CARD).total_memory() == 1000


def test_without_a_card_main_memory_is_what_counts(monkeypatch, tmp_path):
    assert LocalHost(torch.device("cpu")).free_memory() > 2**20
    monkeypatch.setattr(host_module, "MEMORY_INFO", tmp_path / "not there")
    assert available_ram() == 4 * 2**30
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   70 kB\n")
    monkeypatch.setattr(host_module, "MEMORY_INFO", tmp_path / "meminfo")
    assert available_ram() == 70 * 1024


@pytest.mark.parametrize(("bfloat16", "vae"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_vae_never_gets_the_precision_it_overflows_in(monkeypatch, bfloat16, vae):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: bfloat16)
    card = LocalHost(CARD)
    assert card.dtype(Role.DENOISER) is card.dtype(Role.TEXT_ENCODER) is torch.float16
    assert card.dtype(Role.VAE) is vae
    assert LocalHost(torch.device("cpu")).dtype(Role.VAE) is torch.float32
    assert LocalHost(CARD, weights_dtype=torch.float16).dtype(Role.VAE) is torch.float16


class Weights(nn.Module):
    """So many bytes on a card that holds ``Card.total``."""

    def __init__(self, size, card):
        super().__init__()
        self.card = card
        self.register_buffer("weights", torch.zeros(size, dtype=torch.uint8))

    def to(self, device):
        if torch.device(device) != CARD:
            self.card.discard(self)
        elif sum(len(other.weights) for other in self.card) + len(self.weights) > Card.total:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        else:
            self.card.add(self)
        return self


class Card(LocalHost):
    total = 100

    def free_memory(self):
        return self.total - sum(len(module.weights) for module in self.on_card)

    @property
    def on_card(self):
        return {module.module for module in self._managed if module.resident}


def test_modules_leave_the_card_when_another_needs_the_room():
    host, card = Card(CARD), set()
    small, large, other = (host.manage(Weights(size, card), Role.DENOISER) for size in (10, 60, 50))
    assert small.load(0) == large.load(20) == CARD
    assert card == {small.module, large.module}
    other.load(20)
    assert card == {small.module, other.module}  # the largest goes first, and no more than must
    other.load(45)
    assert card == {other.module}
    large.load(40)
    assert card == {large.module}
    large.load(1000)  # activations that do not fit are the model's to split
    assert card == {large.module}


def test_weights_that_do_not_fit_are_an_error_that_says_so():
    host, card = Card(CARD), set()
    small, huge = (host.manage(Weights(size, card), Role.DENOISER) for size in (10, 101))
    small.load(0)
    with pytest.raises(MendError, match=r"weights of a Weights do not fit.*smaller precision"):
        huge.load(0)
    assert not card and not huge.resident
