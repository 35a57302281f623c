"""Other spectral norms: their state dicts, order and classes; and what PyTorch's own takes beside real weights."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lipgan
from lipgan.nn import SNConv2d, SNEmbedding, SNLinear, hook_state_dict

X = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 4, 4).sin()


def critic() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(6 * 64, 2),
    )


def normalized(apply: Callable[[nn.Module], object]) -> nn.Sequential:
    model = critic()
    torch.manual_seed(2)
    for layer in model:
        if hasattr(layer, "weight"):
            apply(layer)
    return model


def in_hook_order(layer: nn.Module) -> nn.Module:
    return lipgan.spectral_norm(layer, hook_order=True)


# ---- torch.nn.utils.spectral_norm ----


@pytest.mark.parametrize("grouped", [False, True])
def test_hook_order_gives_the_numbers_of_the_hook_from_the_first_forward(grouped: bool) -> None:
    hooked, ours = normalized(torch.nn.utils.spectral_norm), normalized(in_hook_order)
    if grouped:
        lipgan.group_spectral_norm(ours)
    for _ in range(4):
        out = ours(X)
        torch.testing.assert_close(out, hooked(X), rtol=1e-4, atol=1e-5)
        out.square().mean().backward()
    for key, value in hook_state_dict(ours.state_dict()).items():
        torch.testing.assert_close(value, hooked.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_a_group_of_hooked_layers_goes_on_as_they_would() -> None:
    hooked = normalized(torch.nn.utils.spectral_norm)
    with torch.no_grad():
        hooked(X)
    model = copy.deepcopy(hooked)
    lipgan.group_spectral_norm(model)
    for _ in range(3):
        torch.testing.assert_close(model(X), hooked(X), rtol=1e-4, atol=1e-5)
    model.load_state_dict(model.state_dict())


def test_a_state_dict_loads_after_the_parametrization_was_removed() -> None:
    layer = lipgan.spectral_norm(nn.Linear(4, 3))
    parametrize.remove_parametrizations(layer, "weight")
    assert list(layer.state_dict()) == ["bias", "weight"]
    layer.load_state_dict({"bias": torch.ones(3), "weight": torch.ones(3, 4)})
    assert torch.equal(layer.weight, torch.ones(3, 4))


def test_hook_state_dict_loads_into_hooked_layers() -> None:
    ours, hooked = normalized(lipgan.spectral_norm), normalized(torch.nn.utils.spectral_norm)
    ours(X)
    state = hook_state_dict(ours.state_dict())
    assert list(state) == [key for key in state if "parametrizations" not in key]
    hooked.load_state_dict(state)
    torch.testing.assert_close(hooked.eval()(X), ours.eval()(X), rtol=1e-5, atol=1e-6)
    back = normalized(lipgan.spectral_norm)
    back.load_state_dict(hooked.state_dict())
    assert torch.equal(back.eval()(X), ours(X))


def test_hook_state_dict_of_other_parametrizations() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", parametrizations._WeightNorm(0))
    lipgan.spectral_norm(model[1])
    state = hook_state_dict(model.state_dict())
    assert "0.parametrizations.weight.original1" in state
    assert "1.weight_orig" in state
    lipgan.spectral_norm(model[0])
    with pytest.raises(ValueError, match=r"0\.weight has other parametrizations beside its spectral norm"):
        hook_state_dict(model.state_dict())


@pytest.mark.parametrize("with_weight", [False, True])
def test_hook_checkpoints_without_v(with_weight: bool) -> None:
    hooked = normalized(torch.nn.utils.spectral_norm)
    for _ in range(30):
        hooked(X)
    hooked.eval()(X)
    state = {key: value for key, value in hooked.state_dict().items() if not key.endswith("_v")}
    if with_weight:  # as PyTorch 1.0 wrote them
        for index in (0, 2, 5):
            state[f"{index}.weight"] = hooked[index].weight.detach()
    ours = normalized(lipgan.spectral_norm)
    ours.load_state_dict(state)
    # Exact with the effective weight. Without it v follows from u, and sigma is off by the square of their error.
    tolerance = 1e-5 if with_weight else 2e-2
    torch.testing.assert_close(ours.eval()(X), hooked(X), rtol=tolerance, atol=tolerance)
    if with_weight:  # PyTorch's own solution of W v = sigma u, by the inverse of W^T W in float32, is not as near
        for index in (0, 2, 5):
            v = ours[index].parametrizations.weight[0]._v
            torch.testing.assert_close(v, hooked[index].weight_v, rtol=1e-3, atol=1e-4)


# ---- layers that divide their weight in their own forward ----


class SelfNormalizing:
    """The behaviour of the layers of mimicry and BigGAN-PyTorch: buffers u (1, h) and sigma beside a plain weight."""

    names: tuple[str, str]

    def effective_weight(self) -> Tensor:
        u, sigma = (getattr(self, name) for name in self.names)
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(u @ matrix, eps=1e-12)
            new_u = F.normalize(v @ matrix.T, eps=1e-12)
        value = (new_u @ matrix @ v.T).squeeze()
        if self.training:
            u.copy_(new_u)
            sigma.fill_(value.detach())
        return self.weight / value


def self_normalizing(base: type[nn.Module], names: tuple[str, str], *args: int) -> nn.Module:
    class Layer(SelfNormalizing, base):
        def __init__(self) -> None:
            super().__init__(*args)
            self.names = names
            self.register_buffer(names[0], torch.randn(1, self.weight.shape[0]))
            self.register_buffer(names[1], torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.effective_weight()
            if isinstance(self, nn.Conv2d):
                return F.conv2d(x, weight, self.bias)
            if isinstance(self, nn.Embedding):
                return F.embedding(x, weight)
            return F.linear(x, weight, self.bias)

    return Layer()


NAMES = pytest.mark.parametrize("names", [("sn_u", "sn_sigma"), ("u0", "sv0")])


@NAMES
@pytest.mark.parametrize(
    ("base", "ours", "args", "x"),
    [
        (nn.Linear, SNLinear, (16, 5), X[:, 0].flatten(1)),
        (nn.Conv2d, SNConv2d, (3, 6, 3), X),
        (nn.Embedding, SNEmbedding, (7, 4), torch.tensor([0, 3, 6])),
    ],
)
def test_their_state_dicts_load(
    base: type[nn.Module], ours: type[nn.Module], args: tuple[int, ...], x: Tensor, names: tuple[str, str]
) -> None:
    theirs = nn.Sequential(self_normalizing(base, names, *args))
    theirs(x)
    model = nn.Sequential(ours(*args))
    state = theirs.state_dict()
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys, "the caller's dictionary was changed"
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Sequential(ours(*[arg + 1 for arg in args])).load_state_dict(state)


class Wrapper(nn.Module):
    """The behaviour of ``SpectralNorm(layer)`` of pytorch-spectral-normalization-gan: it iterates in eval mode too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weight = module.weight
        del module.weight
        module.weight_u = nn.Parameter(F.normalize(torch.randn(weight.shape[0]), dim=0), requires_grad=False)
        module.weight_v = nn.Parameter(F.normalize(torch.randn(weight[0].numel()), dim=0), requires_grad=False)
        module.weight_bar = nn.Parameter(weight.data)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        matrix = layer.weight_bar.flatten(1)
        layer.weight_v.data = F.normalize(matrix.data.T @ layer.weight_u, dim=0)
        layer.weight_u.data = F.normalize(matrix.data @ layer.weight_v, dim=0)
        layer.weight = layer.weight_bar / torch.dot(layer.weight_u, matrix @ layer.weight_v)
        return layer(x)


class Block(nn.Module):
    """As theirs, it holds a layer by itself too."""

    def __init__(self, normalization: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 6, 3)
        self.model = nn.Sequential(normalization(self.conv), nn.Flatten(), normalization(nn.Linear(24, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("grouped", [False, True])
def test_state_dicts_of_a_module_around_the_layer_load(grouped: bool) -> None:
    theirs, ours = Block(Wrapper), Block(lipgan.spectral_norm)
    for _ in range(2):
        theirs(X)
    if grouped:
        lipgan.group_spectral_norm(ours)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X), rtol=1e-5, atol=1e-6)


@NAMES
def test_a_group_does_not_normalize_them_a_second_time(names: tuple[str, str]) -> None:
    model = nn.Sequential(nn.Linear(4, 16), self_normalizing(nn.Linear, names, 16, 5))
    for _ in range(2):  # also where another layer is normalized already
        with pytest.raises(
            ValueError, match=r"1 \(Layer\) has a spectral norm of its own, with the buffers " + names[0]
        ):
            lipgan.group_spectral_norm(model)
        assert not parametrize.is_parametrized(model[1])
        assert not model._forward_pre_hooks
        if not parametrize.is_parametrized(model[0]):
            lipgan.spectral_norm(model[0])


# ---- a second normalization, other parameters, complex weights: as PyTorch ----


@pytest.mark.parametrize("grouped", [False, True])
def test_a_second_normalization_of_a_parameter(grouped: bool) -> None:
    results = []
    for apply in (lipgan.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(3)
        layer = nn.Linear(16, 5)
        for _ in range(2):
            apply(layer)
        apply(layer, "bias")
        model = nn.Sequential(layer)
        if grouped and apply is lipgan.spectral_norm:
            lipgan.group_spectral_norm(model)
        outputs = [model(X[:, 0].flatten(1)) for _ in range(3)]
        outputs[-1].square().sum().backward()
        results.append([*outputs, layer.parametrizations.weight.original.grad, *model.state_dict().values()])
        parametrize.remove_parametrizations(layer, "bias")
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Linear
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_group_takes_over_torchs_after_another_parametrization() -> None:
    theirs = nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 4))
    for layer in theirs:
        parametrizations.weight_norm(layer)
        parametrizations.spectral_norm(layer)
    parametrizations.spectral_norm(theirs[1])
    model = copy.deepcopy(theirs)
    assert lipgan.group_spectral_norm(model).names == ["0", "1"]
    for _ in range(3):
        torch.testing.assert_close(model(X[:, 0].flatten(1)), theirs(X[:, 0].flatten(1)), rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2), (6,)])
def test_complex_weights(shape: tuple[int, ...], dtype: torch.dtype, grouped: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))

        def forward(self) -> Tensor:
            out: Tensor = self.weight
            return out

    results = []
    for apply in (lipgan.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(5)
        layer = apply(Layer())
        model = nn.Sequential()
        model.add_module("0", layer)
        if apply is lipgan.spectral_norm and grouped:
            group = lipgan.group_spectral_norm(layer)
        outputs = [layer() for _ in range(3)]
        outputs[-1].abs().pow(3).sum().backward()
        results.append([*outputs, layer.parametrizations.weight.original.grad, *layer.state_dict().values()])
    tolerance = 1e-4 if dtype == torch.complex64 else 1e-11
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if grouped and len(shape) > 1:
        group.step(300)
        exact = torch.linalg.matrix_norm(results[0][4].flatten(1), 2)
        assert group.sigmas() == {"": pytest.approx(float(exact), rel=1e-5)}


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 5}])
def test_attention_in_a_group(sizes: dict[str, int], applied: bool) -> None:
    """Its ``in_proj_weight``, or the three weights in its place, belong to the group; as per layer."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
            self.last = nn.Linear(8, 1)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.last(self.attention(x, key, value, need_weights=False)[0])
            return out

    single, model = Critic(), Critic()
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if sizes else ["in_proj_weight"]

    def apply_to(critic: Critic) -> None:
        torch.manual_seed(1)
        for name in names:
            lipgan.spectral_norm(critic.attention, name)
        lipgan.spectral_norm(critic.attention.out_proj)
        lipgan.spectral_norm(critic.last)

    apply_to(single)
    torch.manual_seed(1)
    if applied:
        apply_to(model)
    group = lipgan.group_spectral_norm(model)
    assert group.names == [*(f"attention.{name}" for name in names), "attention.out_proj", "last"]
    x, key, value = (torch.randn(2, 3, size) for size in (8, sizes.get("kdim", 8), sizes.get("vdim", 8)))
    for train in (True, True, False):
        single.train(train)
        model.train(train)
        outputs = [critic(x, key, value) for critic in (model, single)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
        group.step(200)
        single.load_state_dict(model.state_dict())
    exact = torch.linalg.matrix_norm(getattr(model.attention.parametrizations, names[0]).original.detach(), 2)
    assert group.sigmas()[f"attention.{names[0]}"] == pytest.approx(float(exact), rel=1e-5)
