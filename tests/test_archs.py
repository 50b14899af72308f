"""archs.py against the papers' formulas, written a second time, and against the names others' weights have."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from archs import ARCHS, DEPTH, NestedUNet, UNet, as_heads, build_model, probabilities, upsample
from utils import count_params

PLAIN = {
    "UNet": {"arch": "UNet"},
    "NestedUNet": {"arch": "NestedUNet"},
    "deep": {"arch": "NestedUNet", "deep_supervision": True},
}
LITE0 = {**PLAIN["deep"], "encoder": "efficientnet_lite0"}
ENCODED = {
    "lite0": LITE0,
    "lite0 half": {**LITE0, "stem": "half"},
    "resnet18 one head": {"arch": "NestedUNet", "encoder": "resnet18"},
}
VARIANTS = {**PLAIN, **ENCODED}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model_of(variant, **options):
    options = {"width": 2, **VARIANTS[variant], **options}
    return ARCHS[options.pop("arch")](**options)


def settle(model, size=(32, 48), channels=3):
    """Batch norm statistics and scales unlike their initial 0 and 1, then eval: a swapped layer changes the output."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, 0.5, 1.5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, channels, *size))
    return model.eval()


# ---------------------------------------------------------------- layers


def test_parameter_counts():
    assert count_params(UNet()) == 7_852_545
    assert count_params(NestedUNet()) == 9_163_329
    assert count_params(NestedUNet(deep_supervision=True)) == 9_163_329 + 3 * (32 + 1)  # three more 1x1 convolutions


def block(name, in_channels, out_channels):
    shapes = {}
    for layer, channels in (("1", in_channels), ("2", out_channels)):
        shapes[f"{name}.conv{layer}.weight"] = (out_channels, channels, 3, 3)
        shapes[f"{name}.conv{layer}.bias"] = (out_channels,)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn{layer}.{entry}"] = (out_channels,)
        shapes[f"{name}.bn{layer}.num_batches_tracked"] = ()
    return shapes


ENCODER = {"conv0_0": (3, 32), "conv1_0": (32, 64), "conv2_0": (64, 128), "conv3_0": (128, 256), "conv4_0": (256, 512)}
UNET = ENCODER | {"conv3_1": (768, 256), "conv2_2": (384, 128), "conv1_3": (192, 64), "conv0_4": (96, 32)}
NESTED = ENCODER | {
    "conv0_1": (32 + 64, 32),
    "conv1_1": (64 + 128, 64),
    "conv2_1": (128 + 256, 128),
    "conv3_1": (256 + 512, 256),
    "conv0_2": (2 * 32 + 64, 32),
    "conv1_2": (2 * 64 + 128, 64),
    "conv2_2": (2 * 128 + 256, 128),
    "conv0_3": (3 * 32 + 64, 32),
    "conv1_3": (3 * 64 + 128, 64),
    "conv0_4": (4 * 32 + 64, 32),
}


@pytest.mark.parametrize("variant", PLAIN)
def test_names_and_shapes_are_those_of_pytorch_nested_unet(variant):
    expected = {}
    for name, channels in (UNET if variant == "UNet" else NESTED).items():
        expected |= block(name, *channels)
    for head in ("final1", "final2", "final3", "final4") if variant == "deep" else ("final",):
        expected |= {f"{head}.weight": (5, 32, 1, 1), f"{head}.bias": (5,)}
    state = model_of(variant, width=32, num_classes=5).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


# ---------------------------------------------------------------- the formula of the papers, a second time


def twice_convolved(x, state, name):
    for layer in "12":
        conv, bn = f"{name}.conv{layer}", f"{name}.bn{layer}"
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        x = x - state[f"{bn}.running_mean"].view(-1, 1, 1)
        x = x / (state[f"{bn}.running_var"].view(-1, 1, 1) + 1e-5).sqrt()
        x = (x * state[f"{bn}.weight"].view(-1, 1, 1) + state[f"{bn}.bias"].view(-1, 1, 1)).clamp(min=0)
    return x


def doubled(x):
    """Bilinear, corners aligned: output pixel o of 2n lies at o (n - 1) / (2n - 1) of the n input pixels."""
    for axis in (-2, -1):
        n = x.shape[axis]
        weights = torch.zeros(2 * n, n, dtype=x.dtype)
        for o in range(2 * n):
            place = o * (n - 1) / (2 * n - 1)
            for i in range(n):
                weights[o, i] = max(0.0, 1 - abs(place - i))
        x = torch.einsum("oi,nchi->ncho" if axis == -1 else "oi,nciw->ncow", weights, x)
    return x


def halved(x):
    return torch.stack([x[..., a::2, b::2] for a in (0, 1) for b in (0, 1)]).amax(0)


def slow_nested(state, images):
    """X^{i,j} = H([X^{i,0} ... X^{i,j-1}, U(X^{i+1,j-1})]), equation 1 of Zhou et al. 2020, asked for recursively."""

    def node(i, j):
        if (i, j) not in known:
            if j == 0:
                inputs = halved(node(i - 1, 0)) if i else images
            else:
                inputs = torch.cat([node(i, k) for k in range(j)] + [doubled(node(i + 1, j - 1))], dim=1)
            known[i, j] = twice_convolved(inputs, state, f"conv{i}_{j}")
        return known[i, j]

    known = {}
    return [node(0, j) for j in (1, 2, 3, 4)]


def slow_unet(state, images):
    down = [twice_convolved(images, state, "conv0_0")]
    for i in (1, 2, 3, 4):
        down.append(twice_convolved(halved(down[-1]), state, f"conv{i}_0"))
    x = down[4]
    for i, name in ((3, "conv3_1"), (2, "conv2_2"), (1, "conv1_3"), (0, "conv0_4")):
        x = twice_convolved(torch.cat([down[i], doubled(x)], dim=1), state, name)
    return x


@pytest.mark.parametrize("variant", PLAIN)
def test_the_output_is_the_papers_formula(variant):
    model = settle(model_of(variant, num_classes=2, width=3)).double()
    images, state = torch.randn(2, 3, 32, 48, dtype=torch.float64), model.state_dict()
    columns = [slow_unet(state, images)] if variant == "UNet" else slow_nested(state, images)
    names = ["final1", "final2", "final3", "final4"] if variant == "deep" else ["final"]
    expected = [
        torch.einsum("kc,nchw->nkhw", state[f"{name}.weight"][..., 0, 0], x) + state[f"{name}.bias"].view(-1, 1, 1)
        for name, x in zip(names, columns[-len(names) :], strict=True)
    ]
    with torch.no_grad():
        heads = as_heads(model(images))
    assert len(heads) == len(expected)
    for head, wanted in zip(heads, expected, strict=True):
        torch.testing.assert_close(head, wanted)
        assert wanted.std() > 1e-3


def test_heads_and_their_names():
    images = torch.randn(2, 3, 32, 32)
    deep, plain, unet = NestedUNet(width=2, deep_supervision=True), NestedUNet(width=2), UNet(width=2)
    heads, output = deep(images), unet(images)
    assert isinstance(heads, list) and len(heads) == 4 and as_heads(heads) == heads
    assert isinstance(output, torch.Tensor) and as_heads(output) == [output]
    assert deep.head_names == ["L1", "L2", "L3", "L4"] and plain.head_names == unet.head_names == ["L4"]


def test_probabilities_are_the_mean_of_the_heads_probabilities():
    heads = [torch.full((1, 1, 2, 2), math.log(odds)) for odds in (1, 3)]  # 1/2 and 3/4
    torch.testing.assert_close(probabilities(heads), torch.full((1, 1, 2, 2), 0.625))
    torch.testing.assert_close(probabilities(heads[1]), torch.full((1, 1, 2, 2), 0.75))
    assert probabilities(heads[1].bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_every_size_from_1_to_33_and_some_more(variant, training):
    model = model_of(variant).train(training)
    with torch.no_grad():
        for side in (*range(1, 34), 47, 48, 49, 64, 65):
            for size in ((side, 20), (20, side)):
                for head in as_heads(model(torch.rand(1, 3, *size))):
                    assert head.shape == (1, 1, *size) and head.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31), (33, 64), (48, 5)])
def test_padding_is_replication_right_and_bottom_then_cropped(variant, size):
    model = settle(model_of(variant))
    images = torch.randn(1, 3, *size)
    multiple = 32 if variant == "lite0 half" else 16
    height, width = (-(-side // multiple) * multiple for side in size)
    edges = ((0, 0), (0, 0), (0, height - size[0]), (0, width - size[1]))
    padded = torch.from_numpy(np.pad(images.numpy(), edges, mode="edge"))
    with torch.no_grad():
        heads, whole = as_heads(model(images)), as_heads(model(padded))
        for head, expected in zip(heads, whole, strict=True):
            torch.testing.assert_close(head, expected[..., : size[0], : size[1]])
        if size == (height, width):  # nothing was added to what the network sees
            assert model.pad(images).shape == images.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_sees_at_least_two_pixels_at_the_bottom(variant):
    model, seen = model_of(variant), []
    first = model.encoder or model.conv0_0
    first.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    for training, size in ((True, (1, 16)), (True, (40, 32)), (False, (1, 16))):
        model.train(training)(torch.rand(1, 3, *size))
    half = variant == "lite0 half"
    assert seen == ([(64, 64), (64, 64), (32, 32)] if half else [(32, 32), (48, 32), (16, 16)])


# ---------------------------------------------------------------- pruning


def nodes_up_to(level):
    return {name: channels for name, channels in NESTED.items() if sum(map(int, name[4:].split("_"))) <= level}


def counted(level, heads=1, classes=1):
    """Parameters by formula: 9 weights an in-out pair and a bias, twice; batch norm's two; 1x1 convolutions."""
    blocks = nodes_up_to(level).values()
    return sum(9 * (a * b + b * b) + 2 * b + 4 * b for a, b in blocks) + heads * (32 * classes + classes)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_pruned_to_a_level_nothing_else_is_left(level):
    model = NestedUNet(deep_supervision=True, num_classes=2)
    pruned, before = model.prune(level), set(model.state_dict())
    expected = set().union(*(block(name, *channels) for name, channels in nodes_up_to(level).items()))
    assert set(pruned.state_dict()) == expected | {f"final{level}.weight", f"final{level}.bias"}
    assert len(nodes_up_to(level)) == (level + 1) * (level + 2) // 2
    assert count_params(pruned) == counted(level, classes=2)
    assert count_params(model) == counted(4, heads=4, classes=2) and set(model.state_dict()) == before


def test_parameters_of_each_level():
    """The paper's nuclei table gives 0.1, 0.5, 2.2 and 9.0 million."""
    counts = [count_params(NestedUNet(deep_supervision=True).prune(level)) for level in (1, 2, 3, 4)]
    assert counts == [103_041, 519_105, 2_236_161, 9_163_329]


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["deep", "lite0", "lite0 half"])
def test_a_pruned_model_gives_what_that_head_gave(variant, level):
    model = settle(model_of(variant, num_classes=2, width=4))
    pruned = model.prune(level)
    with torch.no_grad():
        for size in ((32, 48), (1, 1), (17, 31), (40, 5), (50, 33)):
            images = torch.randn(2, 3, *size)
            output, heads = pruned(images), model(images)
            assert isinstance(output, torch.Tensor) and output.shape == (2, 2, *size)
            torch.testing.assert_close(output, heads[level - 1])
            others = [head for k, head in enumerate(heads, 1) if k != level]
            assert all((output - other).abs().max() > 1e-3 for other in others)
        for parameter in pruned.parameters():
            parameter.zero_()
        assert torch.equal(model(images)[level - 1], heads[level - 1])  # the original shares no weight with it
    assert pruned.head_names == [f"L{level}"] and model.head_names == ["L1", "L2", "L3", "L4"]


def test_pruning_to_smaller_padding_would_change_the_output():
    """Why L1 pads to multiples of 16 though multiples of 2 would do: aligned corners depend on the size."""
    model = settle(model_of("deep")).prune(1)
    images = torch.randn(1, 3, 18, 18)
    with torch.no_grad():
        unpadded = model.final1(model.forward_nodes(images)[0, 1])
        assert (unpadded - model(images)).abs().max() > 1e-3


def test_a_pruned_model_keeps_mode_type_and_layout_and_can_be_saved(tmp_path):
    model = settle(model_of("deep")).double().to(memory_format=torch.channels_last)
    pruned, images = model.prune(2), torch.randn(1, 3, 20, 20, dtype=torch.float64)
    assert not pruned.training and model.prune(3).training is False
    assert pruned.conv0_0.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.save(pruned.state_dict(), tmp_path / "L2.pth")
    other = model_of("deep").double().eval().prune(2)
    other.load_state_dict(torch.load(tmp_path / "L2.pth", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(other(images), pruned(images))
    assert pruned.prune(2).head_names == ["L2"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_gives_the_same_without_batch_norms(variant):
    model = settle(model_of(variant, width=4))
    before, images = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 3, 40, 33)
    folded = model.folded()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert folded.head_names == model.head_names and not any(p.requires_grad for p in folded.parameters())
    with torch.no_grad():
        for expected, found in zip(as_heads(model(images)), as_heads(folded(images)), strict=True):
            assert torch.allclose(expected, found, atol=1e-5) and expected.std() > 0.01
    after = model.state_dict()  # the model itself is untouched
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folded_one_convolution_by_hand():
    model = settle(model_of("UNet"))
    conv, bn, folded = model.conv0_0.conv1, model.conv0_0.bn1, model.folded().conv0_0.conv1
    for channel in range(conv.out_channels):
        scale = bn.weight[channel] / (bn.running_var[channel] + bn.eps) ** 0.5
        assert torch.allclose(folded.weight[channel], conv.weight[channel] * scale, atol=1e-6)
        shift = (conv.bias[channel] - bn.running_mean[channel]) * scale + bn.bias[channel]
        assert torch.allclose(folded.bias[channel], shift, atol=1e-6)


def test_folded_and_pruned_in_either_order_and_from_training_mode():
    model = settle(model_of("deep")).to(memory_format=torch.channels_last)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.prune(2)(images)
        model.train()
        for small in (model.folded().prune(2), model.prune(2).folded()):
            assert torch.allclose(small(images), expected, atol=1e-5) and not small.training
            assert small.conv0_0.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.training


def test_pruning_where_no_head_was_trained():
    with pytest.raises(ValueError, match="level 2: this NestedUNet has no such head, only L4; .*deep_supervision True"):
        model_of("NestedUNet").prune(2)
    with pytest.raises(ValueError, match="level 1: this UNet has no such head"):
        model_of("UNet").prune(1)
    model = model_of("deep")
    for level in (0, 5, -1, "2"):
        with pytest.raises(ValueError, match=f"level {level}: .*only L1, L2, L3, L4$"):
            model.prune(level)
    with pytest.raises(ValueError, match="only L2"):
        model.prune(2).prune(1)
    for whole in (model_of("NestedUNet"), model_of("UNet")):
        assert count_params(whole.prune(4)) == count_params(whole)


# ---------------------------------------------------------------- training, building, saving


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    model = settle(model_of(variant, width=4)).train()  # timm initialises some batch norms with 0
    sum((head**2).sum() for head in as_heads(model(torch.randn(2, 3, 32, 32)))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # the mean that batch norm subtracts takes a convolution's bias with it: there the gradient is rounding
        assert ".conv" in f".{name}" and name.endswith("bias") or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("channels", "classes"), [(1, 7), (3, 1), (4, 2)])
def test_classes_and_channels(variant, channels, classes):
    model = model_of(variant, num_classes=classes, input_channels=channels)
    assert next(model.parameters()).shape[1] == channels  # the first convolution, of X^{0,0} or of the encoder
    heads = as_heads(model(torch.rand(2, channels, 19, 35)))
    assert [head.shape for head in heads] == [(2, classes, 19, 35)] * len(model.head_names)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("wrong", ["num_classes", "input_channels", "width"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_out_of_range(arch, wrong, value):
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, found {value}"):
        ARCHS[arch](**{wrong: value})


def test_unet_has_no_deep_supervision():
    with pytest.raises(ValueError, match="needs NestedUNet"):
        UNet(deep_supervision=True)


def test_build_model_reads_its_keys_of_a_config():
    config = {"arch": "NestedUNet", "num_classes": 2, "input_channels": 4, "deep_supervision": True, "width": 5}
    model = build_model(config | {"lr": 0.1, "dataset": "cells"})
    assert type(model) is NestedUNet and model.deep_supervision
    assert model.conv0_0.conv1.weight.shape == (5, 4, 3, 3) and model.final4.weight.shape == (2, 5, 1, 1)
    assert type(build_model(config | {"arch": "UNet", "deep_supervision": False})) is UNet
    with pytest.raises(ValueError, match="UNext.*UNet, NestedUNet"):
        build_model(config | {"arch": "UNext"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_gives_the_same(variant, tmp_path):
    model, images = settle(model_of(variant)), torch.rand(1, 3, 40, 20)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = model_of(variant).eval()
    with torch.no_grad():
        expected = as_heads(model(images))
        assert not torch.equal(as_heads(other(images))[-1], expected[-1])
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        for head, wanted in zip(as_heads(other(images)), expected, strict=True):
            assert torch.equal(head, wanted)


def test_depth_is_what_names_and_sizes_assume():
    """The names conv4_0, final4 and L4 and the multiple 16 above are those of four downsamplings."""
    assert DEPTH == 4 and {name for name, _ in NestedUNet(width=1).named_children()} >= {"conv4_0", "conv0_4"}


# ---------------------------------------------------------------- training faster, and in less memory


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 5), (4, 4)], ids=str)
def test_the_gradient_of_upsampling_is_that_of_interpolation(layout, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(upsample(x), doubled(x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(upsample, x)
    seen = torch.randn(2, 7, 2 * size[0], 2 * size[1], dtype=torch.float64).to(memory_format=layout)[:, 2:5]
    (own,) = torch.autograd.grad(upsample(x), x, seen)
    (expected,) = torch.autograd.grad(doubled(x), x, seen)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_result_and_keeps_fewer_bytes(variant):
    """Outputs, gradients and running statistics to the last bit: no batch norm sees a batch twice."""
    keys = {"num_classes": 1, "input_channels": 3, "deep_supervision": False, "width": 4, **VARIANTS[variant]}
    usual, checkpointed = build_model(keys), build_model({**keys, "checkpointing": True})
    checkpointed.load_state_dict(usual.state_dict())
    images, kept = torch.randn(2, 3, 32, 48), {}

    for name, model in (("usual", usual), ("checkpointed", checkpointed)):
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sum(head.square().mean() for head in as_heads(model(images))).backward()
        kept[name] = sum(storages.values())
    for (name, a), b in zip(usual.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(usual.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b), name
    share = 1 if variant in ENCODED else 0.9  # an encoder keeps its tensors
    assert kept["checkpointed"] < share * kept["usual"]
