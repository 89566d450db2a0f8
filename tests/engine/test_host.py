"""The stand-alone host."""

import torch
from comfyui_mend.engine.host import LocalHost


def test_memory_that_torch_holds_without_using_it_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert LocalHost(torch.device("cuda")).free_memory() == 100 + 700 - 200
