"""ADM against recorded outputs of the reference implementation, and Algorithm 1 on a tiny one."""
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ncsnpp                                                           # noqa: E402
from adm import CONFIGS, ADMPrecond, configuration                      # noqa: E402
from test_ncsnpp import FIXTURE, fill, inputs                           # noqa: E402

TINY = dict(resolution=8, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[4], dropout=0.0)
close = torch.testing.assert_close


# ----------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("name", ["small32_adm_cond", "small32_adm_uncond", "imagenet64_adm_cond"])
def test_reference(name):
    case = FIXTURE[name]
    config = case["kwargs"] | {k: case[k] for k in ("resolution", "channels", "label_dim")}
    del config["model_type"]
    with torch.device("cpu" if "D_mean" in case else "meta"):           # or shapes alone
        net = ADMPrecond(**config)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == case["tensors"]
    assert sum(p.numel() for p in net.parameters()) == case["params"]
    del config["dropout"]                                               # which leaves no tensors
    assert configuration(net.state_dict()) == dict(augment_dim=0) | config
    if "D_mean" in case:
        x, sigma = inputs()
        c = torch.eye(net.label_dim)[case["labels"]] if net.label_dim else None
        with torch.no_grad():
            D_x = fill(net)(x, sigma, c)
        close(D_x[:, :, ::8, ::8], torch.tensor(case["D_every8"]), rtol=0, atol=2e-4)
        close(D_x.mean((1, 2, 3)), torch.tensor(case["D_mean"]), rtol=0, atol=2e-4)
        close(D_x.std((1, 2, 3)), torch.tensor(case["D_std"]), rtol=0, atol=2e-4)


def test_the_official_configuration():
    case = FIXTURE["imagenet64_adm_cond"]
    expected = case["kwargs"] | dict(model_type="DhariwalUNet", resolution=64, label_dim=1000)
    assert CONFIGS["imagenet64-adm"] | dict(model_type="DhariwalUNet") == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_gradients_and_checkpointing(checkpointing):
    """One pass for image and logits equals two, encode() leaves the decoder alone, and gradients
    reach every parameter."""
    net, x, sigma, c = fill(ADMPrecond(**TINY)), *inputs(size=8), torch.eye(3)
    net.gradient_checkpointing, seen = checkpointing, []
    D_x, logits = net(x, sigma, c, return_logits=True)
    for name, module in net.named_modules():
        if isinstance(module, ncsnpp.Conv2d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    close(net.encode(x, sigma, c), logits, rtol=0, atol=0)
    assert seen and logits.shape == (3, 4, 4) and all(".enc." in name for name in seen)
    close(net(x, sigma, c), D_x, rtol=0, atol=0)
    (D_x.square().sum() + logits.square().sum()).backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert net(x, sigma, c[[1, 2, 0]]).ne(D_x).any((1, 2, 3)).all()


def test_bf16():
    net, (x, sigma), c = fill(ADMPrecond(**TINY)), inputs(size=8), torch.eye(3)
    reference = net(x, sigma, c)
    with torch.autocast("cpu", torch.bfloat16):
        D_x, logits = net(x, sigma, c, return_logits=True)
    assert D_x.dtype == logits.dtype == torch.float32
    assert (D_x - reference).std() < 0.05 * reference.std()


def test_which_network_has_these_tensors():
    for name in CONFIGS:
        with torch.device("meta"):
            state = ADMPrecond(**CONFIGS[name]).state_dict()
        expected = dict(channels=3, augment_dim=0) | CONFIGS[name]
        del expected["dropout"]
        assert configuration(dict(sorted(state.items()))) == expected   # in any order
        with pytest.raises(ValueError, match="ADM, as EDM's imagenet-64x64"):
            ncsnpp.configuration(state)
    with pytest.raises(ValueError, match="not ADM: no tensor is named model.enc"):
        configuration({"a": torch.ones(1)})
    ddpmpp = ncsnpp.EDMPrecond(**ncsnpp.CONFIGS["compact"]).state_dict()
    with pytest.raises(ValueError, match=r"block0.affine.weight is \(16, 64\), not \(32, 64\)"):
        configuration(ddpmpp)
    with pytest.raises(ValueError, match="multiples of 2, such as 6 or 8, not 7"):
        ADMPrecond(**TINY | dict(resolution=7))
