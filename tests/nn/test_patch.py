"""lipgan.patch: models of other packages go on as they were, with lipgan's spectral norms in them.

The layers of mimicry and BigGAN-PyTorch are stand-ins: written for these tests, with the names of the attributes,
buffers and methods of those packages, and what their forwards compute.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lipgan
from lipgan.nn.spectral_norm import SpectralNorm, parametrization_of

# ---- stand-ins ----


class _Mimicry:
    """Iterates in both modes, and keeps u in training."""

    def set_up(self, h: int, num_iters: int) -> None:
        self.num_iters, self.eps = num_iters, 1e-12
        self.register_buffer("sn_u", torch.randn(1, h))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self) -> Tensor:
        matrix = self.weight.flatten(1)
        u = self.sn_u
        with torch.no_grad():
            for _ in range(self.num_iters):
                v = F.normalize(u @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.T, eps=self.eps)
        sigma = u @ (matrix @ v.T)
        if self.training:
            with torch.no_grad():
                self.sn_u.copy_(u)
                self.sn_sigma.copy_(sigma.reshape(1))
        return self.weight / sigma


class MimicryConv2d(nn.Conv2d, _Mimicry):
    def __init__(self, *args: Any, num_iters: int = 1, **options: Any) -> None:
        nn.Conv2d.__init__(self, *args, **options)
        self.set_up(self.out_channels, num_iters)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class MimicryLinear(nn.Linear, _Mimicry):
    def __init__(self, *args: int, num_iters: int = 1) -> None:
        nn.Linear.__init__(self, *args)
        self.set_up(self.out_features, num_iters)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.sn_weights(), self.bias)


class MimicryEmbedding(nn.Embedding, _Mimicry):
    def __init__(self, *args: int, **options: Any) -> None:
        nn.Embedding.__init__(self, *args, **options)
        self.set_up(self.num_embeddings, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.sn_weights())


class _BigGAN:
    """Iterates in both modes; in eval mode each iteration begins from the same u."""

    def set_up(self, h: int, num_itrs: int, num_svs: int) -> None:
        self.num_itrs, self.num_svs, self.transpose, self.eps = num_itrs, num_svs, False, 1e-12
        for k in range(num_svs):
            self.register_buffer(f"u{k}", torch.randn(1, h))
            self.register_buffer(f"sv{k}", torch.ones(1))

    def W_(self) -> Tensor:
        matrix = self.weight.flatten(1)
        for _ in range(self.num_itrs):
            with torch.no_grad():
                v = F.normalize(self.u0 @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.T, eps=self.eps)
                if self.training:
                    self.u0.copy_(u)
        sigma = (v @ matrix.T @ u.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.sv0.fill_(sigma)
        return self.weight / sigma


class BigGANConv2d(nn.Conv2d, _BigGAN):
    def __init__(self, *args: int, num_itrs: int = 1, num_svs: int = 1) -> None:
        nn.Conv2d.__init__(self, *args)
        self.set_up(self.out_channels, num_itrs, num_svs)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class BigGANLinear(nn.Linear, _BigGAN):
    def __init__(self, *args: int, num_itrs: int = 1) -> None:
        nn.Linear.__init__(self, *args)
        self.set_up(self.out_features, num_itrs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class BigGANEmbedding(nn.Embedding, _BigGAN):
    def __init__(self, *args: int) -> None:
        nn.Embedding.__init__(self, *args)
        self.set_up(self.num_embeddings, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.W_())


# ---- models ----


class Critic(nn.Module):
    """A projection critic of three layers."""

    def __init__(self, conv: Callable[..., nn.Module], linear: Callable[..., nn.Module], embedding: Any) -> None:
        super().__init__()
        self.conv, self.linear, self.embedding = conv(3, 6, 3, 2), linear(6, 1), embedding(5, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv(x), 0.1).sum((2, 3))
        return self.linear(h) + (self.embedding(y) * h).sum(1, keepdim=True)


def applied(normalization: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kinds = [
            lambda *sizes, kind=kind: normalization(kind(*sizes), **options)
            for kind in (nn.Conv2d, nn.Linear, nn.Embedding)
        ]
        return Critic(*kinds)

    return make


def mimicry(num_iters: int) -> Callable[[], nn.Module]:
    return lambda: Critic(
        lambda *sizes: MimicryConv2d(*sizes, num_iters=num_iters),
        lambda *sizes: MimicryLinear(*sizes, num_iters=num_iters),
        MimicryEmbedding,
    )


def biggan(num_itrs: int) -> Callable[[], nn.Module]:
    return lambda: Critic(
        lambda *sizes: BigGANConv2d(*sizes, num_itrs=num_itrs),
        lambda *sizes: BigGANLinear(*sizes, num_itrs=num_itrs),
        BigGANEmbedding,
    )


MODELS = {
    "parametrization": applied(parametrizations.spectral_norm),
    "parametrization, 3 iterations, dim 1": applied(
        parametrizations.spectral_norm, n_power_iterations=3, dim=1, eps=1e-3
    ),
    "hook": applied(nn.utils.spectral_norm),
    "hook, 3 iterations, dim 1": applied(nn.utils.spectral_norm, n_power_iterations=3, dim=1, eps=1e-3),
    "mimicry": mimicry(1),
    "mimicry, 2 iterations": mimicry(2),
    "BigGAN-PyTorch": biggan(1),
    "BigGAN-PyTorch, 2 iterations": biggan(2),
}
EACH = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
X, Y = torch.linspace(-3, 3, 4 * 3 * 49).reshape(4, 3, 7, 7).sin(), torch.tensor([0, 3, 4, 3])
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def original(layer: nn.Module) -> Tensor:
    """The weight before its normalization."""
    if parametrize.is_parametrized(layer):
        return layer.parametrizations.weight.original
    return layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[Tensor, list[Tensor]]:
    """Scores and gradients, and then a step of the optimizer."""
    model.zero_grad()
    scores = model(X, Y)
    scores.square().mean().backward()
    gradients = [original(layer).grad.clone() for layer in (model.conv, model.linear, model.embedding)]
    gradients += [layer.bias.grad.clone() for layer in (model.conv, model.linear)]
    if optimizer is not None:
        optimizer.step()
    return scores, gradients


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model after two steps of training, and a patched copy of it."""
    theirs = make()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(2):
        step(theirs, optimizer)
    with torch.no_grad():  # The hook leaves a weight without a graph, which deepcopy takes.
        theirs(X, Y)
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lipgan.patch(ours, **options) is ours
    for name in ("conv", "linear", "embedding"):
        assert isinstance(parametrization_of(getattr(ours, name), "weight"), SpectralNorm)
    return theirs, ours


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


# ---- what stays ----


@EACH
@pytest.mark.parametrize("grouped", [False, True])
def test_training_and_evaluation_go_on_with_the_same_numbers(make: Callable[[], nn.Module], grouped: bool) -> None:
    theirs, ours = pair(make)
    if grouped:
        assert len(lipgan.group_spectral_norm(ours)) == 3
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (theirs, ours)]
    for training in (False, True, True, False, False, True):
        theirs.train(training)
        ours.train(training)
        same(step(ours, optimizers[1]), step(theirs, optimizers[0]))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours.eval()(X, Y)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changes in eval mode"


@EACH
def test_the_state_dict_loads_both_ways(make: Callable[[], nn.Module]) -> None:
    theirs, ours = pair(make)
    old = theirs.state_dict()
    assert sorted(ours.state_dict()) == sorted(old)
    for key, value in ours.state_dict().items():
        assert value.shape == old[key].shape
        if "sigma" not in key and "sv" not in key:
            assert torch.equal(value, old[key]), key
    # An old checkpoint into a patched model that was another before.
    other = lipgan.patch(make())
    assert not other.load_state_dict(copy.deepcopy(old)).missing_keys
    # A new one into a model that is not patched.
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    same(step(other), step(theirs))
    for _ in range(2):
        step(ours, optimizer)
    plain = make()
    assert not plain.load_state_dict(ours.state_dict()).unexpected_keys
    for training in (False, True, True):
        plain.train(training)
        ours.train(training)
        same(step(plain), step(ours))


@pytest.mark.parametrize("name", ["mimicry", "BigGAN-PyTorch"])
def test_sigma_of_a_state_dict_is_that_of_the_weight(name: str) -> None:
    _, ours = pair(MODELS[name])
    for _ in range(50):
        ours(X, Y)
    state = ours.state_dict()
    for layer in ("conv", "linear", "embedding"):
        sigma = state[f"{layer}.{'sn_sigma' if name == 'mimicry' else 'sv0'}"]
        exact = torch.linalg.matrix_norm(state[f"{layer}.weight"].flatten(1), 2)
        torch.testing.assert_close(sigma, exact.reshape(1), rtol=1e-3, atol=0)


@EACH
def test_keys_of_lipgan_where_they_are_asked_for(make: Callable[[], nn.Module]) -> None:
    theirs, ours = pair(make, keep_keys=False)
    keys = {f"{layer}.parametrizations.weight.original" for layer in ("conv", "linear", "embedding")}
    assert (
        keys
        <= set(ours.state_dict())
        <= keys
        | {
            f"{layer}.{rest}"
            for layer in ("conv", "linear", "embedding")
            for rest in ("bias", "parametrizations.weight.0._u", "parametrizations.weight.0._v")
        }
    )
    fresh = lipgan.patch(make(), keep_keys=False)
    fresh.load_state_dict(theirs.state_dict())
    same(step(fresh), step(theirs))
    # What has these keys loads into a model that keeps the old ones.
    other = lipgan.patch(make())
    other.load_state_dict(fresh.state_dict())
    same(step(other), step(theirs))


def test_torch_distributed_checkpoint_takes_the_keys_of_lipgan() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    _, ours = pair(MODELS["mimicry"], keep_keys=False)
    state = get_model_state_dict(ours)
    other = lipgan.patch(MODELS["mimicry"](), keep_keys=False)
    set_model_state_dict(other, state)
    same(step(other), step(ours))


@EACH
def test_parameters_are_the_same_objects_and_optimizers_go_on(make: Callable[[], nn.Module]) -> None:
    model = make()
    parameters = {id(parameter) for parameter in model.parameters()}
    for parameter in model.linear.parameters():
        parameter.requires_grad_(False)
    frozen = [parameter.requires_grad for parameter in sorted(model.parameters(), key=id)]
    lipgan.patch(model)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert [parameter.requires_grad for parameter in sorted(model.parameters(), key=id)] == frozen


@EACH
def test_a_second_patch_changes_nothing(make: Callable[[], nn.Module]) -> None:
    _, ours = pair(make)
    modules = {name: (id(module), type(module)) for name, module in ours.named_modules()}
    hooks = [len(module._state_dict_hooks) for module in ours.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lipgan.patch(ours)
    assert {name: (id(module), type(module)) for name, module in ours.named_modules()} == modules
    assert [len(module._state_dict_hooks) for module in ours.modules()] == hooks


@EACH
def test_copies_and_files_hold_a_patched_model(make: Callable[[], nn.Module]) -> None:
    _, ours = pair(make)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [copy.deepcopy(ours), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(ours))]
    for training in (False, True):
        expected = step(ours.train(training))
        for other in copies:
            same(step(other.train(training)), expected)
            assert sorted(other.state_dict()) == sorted(ours.state_dict())


@EACH
def test_without_the_parametrization_a_plain_layer_is_left(make: Callable[[], nn.Module]) -> None:
    _, ours = pair(make)
    ours.eval()
    scores = ours(X, Y)
    for layer in (ours.conv, ours.linear, ours.embedding):
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer).__module__.startswith("torch.nn.")
    same(ours(X, Y), scores)
    # The hooks of the state dict stay behind.
    assert sorted(ours.state_dict()) == ["conv.bias", "conv.weight", "embedding.weight", "linear.bias", "linear.weight"]
    ours.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ["parametrization", "hook", "mimicry", "BigGAN-PyTorch"])
def test_settings_are_kept(name: str) -> None:
    model = MODELS["hook, 3 iterations, dim 1" if name == "hook" else name]()
    if name == "mimicry":
        model.conv.num_iters, model.conv.eps = 4, 1e-5
    if name == "BigGAN-PyTorch":
        model.conv.num_itrs, model.conv.eps = 4, 1e-5
    expected = {"parametrization": (1, 1e-12, 0, 0), "hook": (3, 1e-3, 1, 0), "mimicry": (4, 1e-5, 0, 4)}.get(
        name, (4, 1e-5, 0, 1)
    )
    lipgan.patch(model.eval())
    ours = parametrization_of(model.conv, "weight")
    assert ours is not None
    assert (ours.n_power_iterations, ours.eps, ours.dim, ours.eval_iterations) == expected
    assert not ours.training


def test_a_shared_module_and_a_shared_weight() -> None:
    torch.manual_seed(0)
    shared = nn.utils.spectral_norm(nn.Linear(4, 4))
    tied = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    theirs = nn.Sequential(shared, nn.Tanh(), shared, tied, nn.Linear(4, 4))
    theirs[4].weight = tied.parametrizations.weight.original
    parametrizations.spectral_norm(theirs[4])
    ours = lipgan.patch(copy.deepcopy(theirs))
    assert ours[0] is ours[2]
    assert ours[3].parametrizations.weight.original is ours[4].parametrizations.weight.original
    x = X[:, 0, 0, :4]
    for _ in range(3):
        same(ours(x), theirs(x))


@pytest.mark.parametrize("make", [nn.ConvTranspose2d, nn.ConvTranspose1d])
@pytest.mark.parametrize("normalization", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_transposed_convolutions(make: type[nn.Module], normalization: Callable[[nn.Module], nn.Module]) -> None:
    theirs = normalization(make(3, 5, 3))
    ours = lipgan.patch(copy.deepcopy(theirs))
    x = X if make is nn.ConvTranspose2d else X[:, :, 0]
    for _ in range(3):
        same(ours(x), theirs(x))
    same(ours.eval()(x), theirs.eval()(x))


def test_other_parametrizations_of_the_weight_stay_where_they_are() -> None:
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.numel()).reshape(weight.shape) % 3 > 0)

    theirs = nn.Linear(4, 3)
    parametrize.register_parametrization(theirs, "weight", Mask())
    parametrizations.spectral_norm(theirs)
    parametrize.register_parametrization(theirs, "weight", Mask())
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=r"model\.weight \(the parametrization Mask is not known\)"):
        lipgan.patch(ours)
    assert [type(each).__name__ for each in ours.parametrizations.weight] == ["Mask", "SpectralNorm", "Mask"]
    x = X[:, 0, 0, :4]
    for _ in range(2):
        same(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


# ---- what is left alone ----


class SpectralNormOfSomeone(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight, 2)


class SNLayer(nn.Linear):
    """Divides by something in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Descendant(MimicryLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SpectralHook:
    def __call__(self, module: nn.Module, args: Any) -> None:
        pass


def _parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", SpectralNormOfSomeone())
    return layer


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(SpectralHook())
    return layer


def _with(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _without_iterations(layer: nn.Module) -> nn.Module:
    layer.parametrizations.weight[0].n_power_iterations = 0
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_parametrized, r"1\.weight \(the parametrization SpectralNormOfSomeone is not known\)"),
        (_hooked, r"1 \(the hook SpectralHook is not known\)"),
        (lambda: SNLayer(4, 4), r"1 \(SNLayer looks like a spectral norm that is not known\)"),
        (lambda: Descendant(4, 4), r"1 \(Descendant is not the SNConv2d, SNLinear or SNEmbedding of mimicry\)"),
        (lambda: _with(BigGANLinear(4, 4), num_svs=2), r"1 \(num_svs is 2, which only 1 is known"),
        (lambda: _with(BigGANLinear(4, 4), transpose=True), r"1 \(transpose is True, "),
        (lambda: _with(MimicryLinear(4, 4), eps=-1.0), r"1 \(eps must be positive, got -1\.0\)"),
        (
            lambda: _without_iterations(parametrizations.spectral_norm(nn.Linear(4, 4))),
            r"1\.weight \(n_power_iterations must be .*got 0\)",
        ),
        (lambda: nn.utils.spectral_norm(nn.LayerNorm(4)), r"1\.weight \(the hook on a weight of one dimension"),
    ],
)
def test_what_is_not_known_is_left_as_it_is_and_named(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), make())
    before, state = type(model[1]), sorted(model[1].state_dict())
    with pytest.warns(UserWarning, match=r"lipgan\.patch left as they are: " + message):
        lipgan.patch(model)
    assert isinstance(parametrization_of(model[0], "weight"), SpectralNorm)
    assert type(model[1]) is before
    assert sorted(model[1].state_dict()) == state
    assert parametrization_of(model[1], "weight") is None
    model(X[:, 0, 0, :4])


@pytest.mark.parametrize(("option", "value"), [("padding_idx", 1), ("max_norm", 1.0), ("scale_grad_by_freq", True)])
def test_options_of_an_embedding_that_their_forward_ignores(option: str, value: Any) -> None:
    layer = MimicryEmbedding(5, 3, **{option: value})
    with pytest.warns(UserWarning, match=f"{option} is "):
        lipgan.patch(layer)
    assert type(layer) is MimicryEmbedding


def test_other_parametrizations_of_torch_are_no_news() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.utils.weight_norm(nn.Linear(4, 4)),
        lipgan.nn.SNLinear(4, 4),
    )
    lipgan.group_spectral_norm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lipgan.patch(model)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        lipgan.patch([nn.Linear(2, 2)])  # type: ignore[arg-type]


@pytest.mark.hardware
def test_a_compiled_forward_of_a_patched_model() -> None:
    theirs, ours = pair(MODELS["mimicry"])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        same(compiled(X, Y), theirs(X, Y))


@pytest.mark.parametrize("name", ["hook", "mimicry", "BigGAN-PyTorch"])
def test_a_penalty_of_a_patched_critic(name: str) -> None:
    theirs, ours = pair(MODELS[name])
    expected = lipgan.gradient_penalty(lambda x: theirs(x, Y), X, kind="r1", engine="autograd")
    same(lipgan.gradient_penalty(ours, X, kind="r1", critic_args=(Y,)), expected)
