"""ncsnpp.py against recorded outputs of the reference implementation (fixtures/)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ncsnpp
from ncsnpp import CONFIGS, Conv2d, EDMPrecond, configuration

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
    assert sum(p.numel() for p in net.parameters()) == case["params"]
    assert (net.resolution, net.channels, net.label_dim) == tuple(
        case[k] for k in ("resolution", "channels", "label_dim"))
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


@pytest.mark.parametrize("name", ["compact", "compact-ve", "compact-cond"])
def test_gradients_reach_every_parameter(name):
    net = fill(EDMPrecond(**CONFIGS[name] | dict(dropout=0.1))).train()
    x, sigma = inputs()
    c = torch.eye(10)[:3] if net.label_dim else None
    net(x, sigma, c).square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["compact", "compact-ve"])
def test_one_pass_gives_image_and_logits(name):
    """The same as two passes give; encode() leaves the decoder alone."""
    net, calls = compact(name), []
    for module_name, module in net.named_modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(lambda *_, name=module_name: calls.append(name))
    x, sigma = inputs()
    with torch.no_grad():
        D_x, logits = net(x, sigma, return_logits=True)
        one_pass, calls[:] = list(calls), []
        close(net(x, sigma[:, None, None, None]), D_x, rtol=0, atol=0)      # either shape of sigma
        assert calls == one_pass and len(set(calls)) == len(calls)
        calls.clear()
        close(net.encode(x, sigma), logits, rtol=0, atol=0)
    assert calls == [name for name in one_pass if ".enc." in name]
    assert logits.shape == (3, 8, 8)


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
    close(grads[1], grads[0])
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast(dtype, tolerance):
    net = compact("compact-ve")
    x, sigma = inputs(2)
    reference = net(x, sigma)
    with torch.autocast("cpu", dtype):
        D_x, logits = net(x, sigma, return_logits=True)
        D_x.square().mean().backward()
    assert D_x.dtype == logits.dtype == torch.float32
    assert (D_x - reference).std() < tolerance * reference.std()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_channels_last_and_batch_size_change_nothing():
    net = compact()
    x, sigma = inputs()
    with torch.no_grad():
        D_x = net(x, sigma)
        close(torch.cat([net(x[i:i + 1], sigma[i].item()) for i in range(3)]), D_x,
              rtol=0, atol=1e-5)
        net.to(memory_format=torch.channels_last)
        close(net(x.contiguous(memory_format=torch.channels_last), sigma), D_x, rtol=0, atol=1e-5)


def test_before_training_the_denoiser_is_c_skip_x():
    net = EDMPrecond(**CONFIGS["compact"])
    x, sigma = inputs()
    c_skip = 0.25 / (sigma ** 2 + 0.25)             # the best linear guess for data of variance 1/4
    close(net(x, sigma), c_skip[:, None, None, None] * x)
    h = torch.randn(2, 64, 8, 8)                    # blocks and attention add nothing yet
    close(net.model.dec["8x8_in0"](h, torch.randn(2, 64)), h / 2)
    bound = (6 / (9 * 3 + 9 * 16)) ** 0.5           # Glorot's, of weights that are uniform
    assert 0.9 * bound < net.model.enc["32x32_conv"].weight.abs().max() <= bound


@pytest.mark.parametrize("config", [
    dict(resolution=20, model_channels=8, channel_mult=[2], num_blocks=1, attn_resolutions=[20],
         augment_dim=3, encoder_type="standard", resample_filter=[1, 1]),   # nothing is resampled
    dict(resolution=160, model_channels=4, channel_mult=[1, 2, 1, 1], num_blocks=2,
         attn_resolutions=[160, 20], label_dim=2)])
def test_configuration_is_read_from_the_tensors(config):
    config = CONFIGS["compact-ve"] | dict(channels=2, label_dim=0) | config
    del config["dropout"]
    with torch.device("meta"):
        state = EDMPrecond(**config).state_dict()
    assert configuration(dict(sorted(state.items()))) == config         # in any order


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("model.dec.8x8_in0.proj.bias"), "model.dec.8x8_in0.proj.bias is missing"),
    (lambda s: s.update({"model.extra": torch.ones(3)}), "model.extra does not belong"),
    (lambda s: s.update({"model.map_layer1.weight": torch.ones(64, 63)}),
     r"model.map_layer1.weight is \(64, 63\), not \(64, 64\)"),
    (lambda s: s.update({"model.out_conv.weight": torch.ones(3)}), "ADM, .* examples/imagenet64"),
    (lambda s: (s.clear(), s.update(conv1=torch.ones(3))), "not DDPM.* named model.enc"),
])
def test_tensors_of_no_such_network(change, message):
    state = EDMPrecond(**CONFIGS["compact"]).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        configuration(state)


def test_bad_input():
    x, sigma = inputs()
    with pytest.raises(ValueError, match="labels"):
        EDMPrecond(**CONFIGS["compact-cond"])(x, sigma)
    with pytest.raises(ValueError, match="multiples of 4, such as 28 or 32, not 30"):
        EDMPrecond(resolution=30, **CONFIGS["compact"])
