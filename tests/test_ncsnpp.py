"""ncsnpp.py against recorded outputs of the reference implementation (fixtures/)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ncsnpp
from ncsnpp import CONFIGS, EDMPrecond, configuration

FIXTURES = Path(ncsnpp.__file__).parent / "fixtures"
FIXTURE = {name: dict(resolution=32, channels=3, x_seed=0, sigma=[0.02, 0.8, 40], labels=[1, 4, 9])
           | case for name, case in json.loads((FIXTURES / "ncsnpp.json").read_text()).items()}
FIXTURE |= json.loads((FIXTURES / "unet64.json").read_text())
OURS = {"uncond-vp": "cifar10_ddpmpp_uncond", "uncond-ve": "cifar10_ncsnpp_uncond",
        "cond-vp": "cifar10_ddpmpp_cond", "compact": "compact_ddpmpp",
        "compact-ve": "compact_ncsnpp"}
SIZES = ["ffhq64_ddpmpp", "small64_ddpmpp", "small28_grey_ddpmpp", "small64_ncsnpp"]
close = torch.testing.assert_close


def config_of(name):
    """The keywords of a network of the fixtures."""
    case = FIXTURE[name]
    config = dict(num_blocks=4, attn_resolutions=[16]) | case["kwargs"]     # EDM's defaults
    config |= {k: case[k] for k in ("resolution", "channels", "label_dim")}
    return {k: v for k, v in config.items() if k not in ("model_type", "decoder_type")}


def fill(net):
    """The fixture's rule: every tensor from RandomState(its place in the sorted state dict)."""
    state = net.state_dict()
    for place, name in enumerate(sorted(state)):
        shape = tuple(state[name].shape)
        v = np.random.RandomState(place).standard_normal(shape)
        if name.endswith("resample_filter"):
            continue
        if len(shape) >= 2:
            v *= np.sqrt(2 / np.prod(shape[1:]))
        elif "norm" in name:
            v = 0.1 * v + (1 if name.endswith("weight") else 0)
        elif not name.endswith("freqs"):
            v *= 0.1
        state[name].copy_(torch.from_numpy(v))
    return net.eval()


def compact(name="compact"):
    return fill(EDMPrecond(**CONFIGS[name]))


def inputs(n=3, channels=3, size=32):
    sigma = torch.tensor([0.02, 0.8, 40.0])[:n]
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((n, channels, size, size)))
    return (x * (0.25 + sigma.double() ** 2).sqrt()[:, None, None, None]).float(), sigma


@pytest.mark.parametrize("name", OURS)
def test_configs_are_those_of_the_reference(name):
    full = dict(resolution=32, channels=3, label_dim=0) | CONFIGS[name]
    assert full == config_of(OURS[name])


@pytest.mark.parametrize("name", [*OURS.values(), *SIZES])
def test_reference(name):
    case, config = FIXTURE[name], config_of(name)
    with torch.device("cpu" if "D_mean" in case else "meta"):           # or shapes alone
        net = EDMPrecond(**config)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == case["tensors"]
    del config["dropout"]                                       # which leaves no tensors
    levels = [net.resolution >> i for i in range(len(config["channel_mult"]))]
    config["attn_resolutions"] = [s for s in config["attn_resolutions"] if s in levels]
    assert configuration(net.state_dict()) == config
    if "D_mean" in case:
        x, sigma = inputs(3, net.channels, net.resolution)
        c = torch.eye(net.label_dim)[case["labels"]] if net.label_dim else None
        with torch.no_grad():
            D_x = fill(net)(x, sigma, c)
        close(D_x[:, :, ::8, ::8], torch.tensor(case["D_every8"]), rtol=0, atol=1e-4)
        close(D_x.mean((1, 2, 3)), torch.tensor(case["D_mean"]), rtol=0, atol=1e-4)
        close(D_x.std((1, 2, 3)), torch.tensor(case["D_std"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["compact", "compact-ve"])
def test_one_pass_gives_image_and_logits(name):
    """Logits are the channel mean of the encoder's last features; encode() leaves the decoder."""
    net, features, decoded = compact(name), [], []
    net.model.enc["8x8_block0"].register_forward_hook(lambda *call: features.append(call[2]))
    for module in net.model.dec.values():
        module.register_forward_hook(lambda *call: decoded.append(module))
    x, sigma = inputs()
    with torch.no_grad():
        D_x, logits = net(x, sigma, return_logits=True)
        assert len(features) == 1 and len(decoded) == len(net.model.dec)
        close(logits, features[0].mean(1))                      # (3, 8, 8)
        close(net(x, sigma[:, None, None, None]), D_x, rtol=0, atol=0)      # either shape of sigma
        decoded.clear()
        close(net.encode(x, sigma), logits, rtol=0, atol=0)
    assert not decoded


def test_gradient_checkpointing_computes_again_instead_of_keeping():
    """The same gradients, of image and logits, from less than half of what is kept."""
    x, sigma = inputs()
    kept, grads = [0, 0], []

    def keep(tensor):
        kept[checkpointing] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        net = compact("compact-ve")
        net.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            D_x, logits = net(x, sigma, return_logits=True)
            loss = D_x.square().mean() + logits.mean()
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(grad.any() for grad in grads[0])                 # every parameter is reached
    close(grads[1], grads[0])
    assert kept[1] < 0.4 * kept[0]


def test_half_precision_is_near_and_returns_float32():
    net, (x, sigma) = compact("compact-ve"), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        D_x, logits = net(x, sigma, return_logits=True)
    assert D_x.dtype == logits.dtype == torch.float32
    reference = net(x, sigma)
    assert (D_x - reference).std() < 0.05 * reference.std()


def test_before_training_the_denoiser_is_c_skip_x():
    net = EDMPrecond(**CONFIGS["compact"])
    x, sigma = inputs()
    c_skip = 0.25 / (sigma ** 2 + 0.25)             # the best linear guess for data of variance 1/4
    close(net(x, sigma), c_skip[:, None, None, None] * x)
    h = torch.randn(2, 64, 8, 8)                    # blocks and attention add nothing yet
    close(net.model.dec["8x8_in0"](h, torch.randn(2, 64)), h / 2)
    bound = (6 / (9 * 3 + 9 * 16)) ** 0.5           # Glorot's, of weights that are uniform
    assert 0.9 * bound < net.model.enc["32x32_conv"].weight.abs().max() <= bound


def test_configuration_is_read_from_the_tensors_in_any_order():
    config = CONFIGS["compact-ve"] | dict(
        resolution=160, channels=2, model_channels=4, channel_mult=[1, 2, 1, 1], num_blocks=2,
        attn_resolutions=[160, 20], label_dim=2, augment_dim=3)
    del config["dropout"]
    with torch.device("meta"):
        state = EDMPrecond(**config).state_dict()
    assert configuration(dict(sorted(state.items()))) == config


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.dec.8x8_in0.proj.bias"), "8x8_in0.proj.bias is missing"),
    (lambda s: s.update({"model.map_layer1.weight": torch.ones(64, 63)}), r"\(64, 63\), not"),
    (lambda s: (s.clear(), s.update(conv1=torch.ones(3))), "not DDPM")])
def test_tensors_of_no_such_network(change, message):
    state = EDMPrecond(**CONFIGS["compact"]).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        configuration(state)


def test_bad_input():
    with pytest.raises(ValueError, match="labels"):
        EDMPrecond(**CONFIGS["compact-cond"])(*inputs())
    with pytest.raises(ValueError, match="multiples of 4.* not 30"):
        EDMPrecond(resolution=30, **CONFIGS["compact"])
