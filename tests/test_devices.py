"""Which device a run takes, and how precisely it computes there; for GPUs, as far as one can tell
without one.
"""

import pytest
import torch

from common import models
from common.errors import BadInput
from common.models import choose_device


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, of the compute capability that it is told."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_capability


@pytest.mark.parametrize("capability, expected", [
    ((7, 5), "float32"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((10, 0), "bfloat16"),
])  # fmt: skip
def test_bfloat16_is_chosen_where_the_gpu_has_it(capability, expected, gpu):
    gpu(*capability)
    assert choose_device("auto", "auto", "transformers") == (torch.device("cuda"), expected)
    assert choose_device("cuda:0", "float32", "transformers")[1] == "float32"


def test_bfloat16_is_refused_on_a_gpu_without_it(gpu):
    gpu(7, 5)
    with pytest.raises(BadInput, match=r"--precision bfloat16 is not for Tesla T4.*give float32"):
        choose_device("auto", "bfloat16", "transformers")


def test_a_cpu_computes_as_it_is_told():
    for precision, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        assert choose_device("cpu", precision, "transformers") == (torch.device("cpu"), expected)


def test_a_driver_that_pytorch_cannot_use_is_mentioned(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose_device("auto", "auto", "transformers")
    assert capsys.readouterr().err == ""  # there is none
    monkeypatch.setattr(models, "_driver_without_use", lambda: True)
    choose_device("cpu", "auto", "transformers")  # as was asked for
    assert capsys.readouterr().err == ""
    assert choose_device("auto", "auto", "transformers")[0] == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert "driver is too old" in line and "uses the CPU" in line
    with pytest.raises(BadInput, match="newer driver"):
        choose_device("cuda", "auto", "transformers")
