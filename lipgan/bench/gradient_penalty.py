"""``lipgan bench gradient-penalty``: value and parameter gradients of a penalty, against double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lipgan
from lipgan.bench import critic_loss, critics
from lipgan.bench import device as on_device
from lipgan.bench.harness import Table, in_fresh_process, interleave, peak_memory


@dataclass(frozen=True)
class Case:
    """A critic, the shape of its samples, and the kind of penalty."""

    critic: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "wgan-gp"


CASES = {
    "DCGAN-32, batch 64": Case(critics.dcgan_32, (64, 3, 32, 32)),
    "ResNet-32, batch 16": Case(critics.ResNet32, (16, 3, 32, 32)),
    "ResNet-32, batch 16, R1+R2": Case(critics.ResNet32, (16, 3, 32, 32), "r1+r2"),
    "MLP 2-128-128-128-1, batch 256": Case(partial(critics.perceptron, 2, 128, 128, 128, 1), (256, 2)),
    "MLP 640-256-256-1 with dropout, batch 50": Case(
        partial(critics.perceptron, 640, 256, 256, 1, dropout=0.5), (50, 640)
    ),
}

# Further critics, of which only the time against double backward is taken.
MORE_CASES = {
    "MLP 2-128-128-128-1 in a module": Case(lambda: critics.Wrapped(critics.perceptron(2, 128, 128, 128, 1)), (256, 2)),
    "CTGAN, 50 packs of 10 rows": Case(
        lambda: critics.Wrapped(critics.perceptron(400, 256, 256, 1, dropout=0.5), pack=10), (50, 10, 40)
    ),
    "MLP 2-16-16-1, tanh, batch 64": Case(partial(critics.perceptron, 2, 16, 16, 1, activation=nn.Tanh), (64, 2)),
    "MLP 2-128-128-1, layer norm and GELU, batch 256": Case(
        partial(critics.perceptron, 2, 128, 128, 1, activation=nn.GELU, norm=nn.LayerNorm), (256, 2)
    ),
    "LSTM, 12 steps, batch 32": Case(partial(critics.Recurrent, nn.LSTM), (32, 12, 8)),
    "GRU, 12 steps, batch 32": Case(partial(critics.Recurrent, nn.GRU), (32, 12, 8)),
    "transformer of 2 blocks, 16 steps, batch 16": Case(critics.transformer, (16, 16, 32)),
    "WaveGAN, batch 16": Case(critics.wavegan, (16, 1, 4096)),
    "U-Net, batch 16": Case(critics.UNet, (16, 3, 32, 32)),
    "DCGAN-32, batch norm": Case(partial(critics.dcgan_32, norm=nn.BatchNorm2d), (64, 3, 32, 32)),
    "DCGAN-32, group norm": Case(partial(critics.dcgan_32, norm=partial(nn.GroupNorm, 8)), (64, 3, 32, 32)),
    "DCGAN-32, instance norm": Case(
        partial(critics.dcgan_32, norm=partial(nn.InstanceNorm2d, affine=True)), (64, 3, 32, 32)
    ),
    "ResNet-32, SiLU, batch 16": Case(partial(critics.ResNet32, smooth=True), (16, 3, 32, 32)),
    "DCGAN-32, self-attention": Case(critics.attentive, (64, 3, 32, 32)),
    "StyleGAN2-like, R1, batch 16": Case(critics.StyleGAN2, (16, 3, 32, 32), "r1"),
    "R3GAN-like, R1+R2, batch 16": Case(critics.r3gan, (16, 3, 32, 32), "r1+r2"),
}

# Whole steps of a critic, for each of these kinds.
STEP_CRITICS = (
    *("DCGAN-32, batch 64", "ResNet-32, batch 16", "StyleGAN2-like, R1, batch 16", "R3GAN-like, R1+R2, batch 16"),
    *("MLP 2-128-128-128-1, batch 256", "MLP 2-128-128-128-1 in a module", "MLP 2-16-16-1, tanh, batch 64"),
    "MLP 640-256-256-1 with dropout, batch 50",
)
STEP_KINDS = ("r1", "r1+r2", "wgan-gp")
# In one batch of real and fake samples, which the textbook takes, a deviation over the batch is another one.
NOT_IN_ONE_BATCH = ("StyleGAN2-like, R1, batch 16",)


# ---- ways to the same numbers ----


def _norms(gradient: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return norms


def _double_backward(critic: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return _norms(gradient)


def _mixture(real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    mix = torch.rand(real.shape[0], *[1] * (real.ndim - 1), generator=generator, device=real.device)
    return mix * real + (1 - mix) * fake


def with_double_backward(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """What users write: PyTorch differentiates the norm of a gradient."""
    if kind != "wgan-gp":
        norms = torch.cat([_double_backward(critic, x) for x in ((real, fake) if kind == "r1+r2" else (real,))])
        return (10.0 if kind == "r1+r2" else 5.0) * norms.square().mean()
    x_hat = _mixture(real, fake, torch.Generator(real.device).manual_seed(seed))
    return 10.0 * (_double_backward(critic, x_hat) - 1).square().mean()


def with_forward_mode(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """Reverse over forward: the gradient first, then the backward of a directional derivative."""
    if kind == "r1+r2":
        x, weight, target = torch.cat([real, fake]), 10.0, 0.0
    else:
        x, weight, target = _mixture(real, fake, torch.Generator().manual_seed(seed)), 10.0, 1.0
    state = torch.get_rng_state()
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(leaf).sum(), leaf)
    norms = _norms(gradient)
    n = x.shape[0]
    if kind == "r1+r2":
        value, factor = weight * norms.square().mean(), 2 * weight / n * torch.ones_like(norms)
    else:
        value, factor = (
            weight * (norms - target).square().mean(),
            2 * weight / n * (norms - target) / norms.clamp_min(1e-30),
        )
    cotangent = gradient * factor.view(-1, *[1] * (x.ndim - 1))
    parameters: dict[str, Tensor] = dict(critic.named_parameters())

    def score(x: Tensor) -> Tensor:
        scores: Tensor = torch.func.functional_call(critic, parameters, (x,))
        return scores.sum()

    torch.set_rng_state(state)  # the same dropout
    along: Tensor = torch.func.jvp(score, (x,), (cotangent,))[1]
    return along + (value - along).detach()  # the value of the penalty, the derivatives of the directional derivative


def with_lipgan(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """`lipgan.gradient_penalty`, engine "fused"."""
    generator = None if kind in ("r1", "r1+r2") else torch.Generator(real.device).manual_seed(seed)
    return lipgan.gradient_penalty(critic, real, fake, kind=kind, engine="fused", generator=generator)


def with_tape(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """The same through the recorded operations, where the closed form of a perceptron would serve."""
    generator = torch.Generator().manual_seed(seed)
    critic_as_function = critic.forward  # a function is not taken for a perceptron
    return lipgan.gradient_penalty(critic_as_function, real, fake, kind=kind, engine="fused", generator=generator)


Way = Callable[[nn.Module, Tensor, Tensor, str, int], Tensor]

ENGINES: dict[str, Way] = {
    "double backward": with_double_backward,
    "forward mode": with_forward_mode,
    "tape": with_tape,
    "lipgan": with_lipgan,
}


class _Variant:
    """A critic and a way; `step` gives its parameters the gradients of the penalty, or of the loss with it."""

    def __init__(self, case: Case, way: Way, seed: int, *, channels_last: bool = False) -> None:
        torch.manual_seed(seed)
        self.critic = case.critic()
        self.real, self.fake = torch.randn(case.shape), torch.randn(case.shape)
        if channels_last:
            self.critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.real = self.real.contiguous(memory_format=torch.channels_last)
            self.fake = self.fake.contiguous(memory_format=torch.channels_last)
        self.way, self.kind, self.seed = way, case.kind, seed

    def to(self, device: torch.device) -> _Variant:
        self.critic.to(device)
        self.real, self.fake = self.real.to(device), self.fake.to(device)
        return self

    def step(self) -> Tensor:
        self.critic.zero_grad()
        penalty = self.way(self.critic, self.real, self.fake, self.kind, self.seed)
        penalty.backward()  # type: ignore[no-untyped-call]
        return penalty.detach()

    @torch.no_grad()
    def forward(self) -> None:
        """One unit: the forward pass over as many samples as the penalty takes."""
        self.critic(self.real)
        if self.kind == "r1+r2":
            self.critic(self.fake)


def _check(variants: dict[str, _Variant], bound: float = 1e-4) -> None:
    """The variants agree in value and gradients, or nothing is timed."""
    results = {}
    for name, variant in variants.items():
        # Dropout draws the same numbers; in another order where R1 and R2 are one batch, and no such case has dropout.
        torch.manual_seed(0)
        value = variant.step()
        results[name] = (
            value,
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in variant.critic.parameters()],
        )
    truth_value, truth = next(iter(results.values()))
    scale = max(float(grad.abs().max()) for grad in truth)
    for name, (value, grads) in results.items():
        error = max(float((a - b).abs().max()) for a, b in zip(grads, truth, strict=True)) / scale
        error = max(error, float((value - truth_value).abs() / truth_value.abs()))
        if not error < bound:
            raise AssertionError(f"{name}: the value or its gradients are off by {error:.1e}, relative")


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark.

    Args:
        seed: of weights and samples.
        seconds: for each critic and table.
    """
    speed = Table(
        "Gradient penalty, value and parameter gradients, float32, CPU",
        ["critic", "torch ms", "lipgan ms", "ratio", "forward ms", "times the bound"],
        notes=[
            "torch: its double backward. forward: one forward pass, in the faster of PyTorch's two layouts. The bound",
            "is four of these (forward, backward to the input, tangent, weight gradients); below 1 where the closed",
            "form of a perceptron is faster than PyTorch's own forward pass.",
        ],
    )
    more = Table(
        "Gradient penalty of further critics, value and parameter gradients, float32, CPU",
        ["critic", "torch ms", "lipgan ms", "ratio"],
    )
    engines = Table(
        "Ways to the same gradients, ms",
        ["critic", *ENGINES, "double backward, channels_last"],
        notes=["lipgan is a plan made by the tape, or the closed form of a perceptron."],
    )
    memory = Table(
        "Peak memory of a first step beyond critic and samples, MB",
        ["critic", "torch", "lipgan"],
    )
    steps = Table(
        "A whole critic step (loss, penalty and all gradients), ms, float32, CPU",
        ["critic", "kind", *critic_loss.STEPS, "ratio"],
        notes=[
            "textbook: double backward, from one forward pass where loss and penalty are taken at the same samples, in",
            "the faster of PyTorch's two layouts. critic_loss: of the loss by its name; of a function: of that of the",
            "textbook. ratio: textbook / critic_loss.",
        ],
    )
    for name in STEP_CRITICS:
        for kind in STEP_KINDS:
            if kind == "r1+r2" and name in NOT_IN_ONE_BATCH:
                continue
            times = in_fresh_process(_step_times, name, kind, seed, seconds)
            row = {key: 1e3 * value for key, value in times.items()}
            ratio = times["textbook"] / times["critic_loss"]
            steps.rows.append({"critic": name, "kind": kind, **row, "ratio": ratio})
    for name in MORE_CASES:
        times = in_fresh_process(_times, name, seed, seconds)
        row = {"torch ms": 1e3 * times["double backward"], "lipgan ms": 1e3 * times["lipgan"]}
        more.rows.append({"critic": name, **row, "ratio": times["double backward"] / times["lipgan"]})
    for name, case in CASES.items():
        times = in_fresh_process(_times, name, seed, seconds)
        speed.rows.append(
            {
                "critic": name,
                "torch ms": 1e3 * times["double backward"],
                "lipgan ms": 1e3 * times["lipgan"],
                "ratio": times["double backward"] / times["lipgan"],
                "forward ms": 1e3 * times["forward"],
                "times the bound": times["lipgan"] / (4 * times["forward"]),
            }
        )
        times = in_fresh_process(_engine_times, name, seed, seconds)
        engines.rows.append({"critic": name, **{key: 1e3 * value for key, value in times.items()}})
        if len(case.shape) == 4:
            peaks = [in_fresh_process(_peak, name, seed, key) for key in ("double backward", "lipgan")]
            if None not in peaks:
                row = {key: (peak or 0) / 1e6 for key, peak in zip(memory.columns[1:], peaks, strict=True)}
                memory.rows.append({"critic": name, **row})
    return [speed, more, steps, engines, memory]


def run_on(device: torch.device, seed: int = 0, seconds: float = 3.0, timer: Any = None) -> list[Table]:
    """The table of the benchmark on a GPU: its time and that of the host apart.

    Args:
        device: the GPU.
        seed: of weights and samples.
        seconds: for each critic.
        timer: what takes the times; None for `lipgan.bench.device.Timer`.
    """
    timer = on_device.Timer(device) if timer is None else timer
    names = {"double backward": "torch", "lipgan": "lipgan"}
    table = Table(
        f"Gradient penalty, value and parameter gradients, float32, {on_device.name_of(device)}",
        ["critic", *on_device.columns(names.values()), "ratio"],
        notes=[*on_device.NOTES, "torch: its double backward. ratio: torch over lipgan, of device times."],
    )
    for name, case in (CASES | MORE_CASES).items():
        variants = {key: _Variant(case, ENGINES[way], seed).to(device) for way, key in names.items()}
        _check(variants, bound=1e-3)
        times = timer.interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds)
        ratio = times["torch"].device / times["lipgan"].device
        table.rows.append({"critic": name, **on_device.cells(times), "ratio": ratio})
    return [table]


def _case(name: str) -> Case:
    return CASES[name] if name in CASES else MORE_CASES[name]


def _step_times(name: str, kind: str, seed: int, seconds: float) -> dict[str, float]:
    case = replace(_case(name), kind=kind)
    variants = {key: _Variant(case, way, seed) for key, way in critic_loss.STEPS.items()}
    if len(case.shape) == 4:
        variants["textbook, channels_last"] = _Variant(case, critic_loss.by_textbook, seed, channels_last=True)
    for variant in variants.values():
        variant.critic.eval()  # Dropout draws different numbers where there are different numbers of forward passes.
    # In float32 the textbook's two layouts differ by 7e-4 for ResNet-32, whose scores are sums over pixels.
    _check(variants, bound=1e-3)
    for variant in variants.values():
        variant.critic.train()
    times = interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds)
    times["textbook"] = min(times["textbook"], times.pop("textbook, channels_last", times["textbook"]))
    return times


def _times(name: str, seed: int, seconds: float) -> dict[str, float]:
    """Seconds of torch, of lipgan and of one forward pass."""
    case = _case(name)
    variants = {key: _Variant(case, ENGINES[key], seed) for key in ("double backward", "lipgan")}
    _check(variants, bound=1e-3)
    runs: dict[str, Callable[[], Any]] = {key: variant.step for key, variant in variants.items()}
    runs["forward"] = variants["double backward"].forward
    if len(case.shape) == 4:
        runs["forward, channels_last"] = _Variant(case, with_lipgan, seed, channels_last=True).forward
    times = interleave(runs, seconds=seconds)
    times["forward"] = min(times["forward"], times.pop("forward, channels_last", times["forward"]))
    return times


def _engine_times(name: str, seed: int, seconds: float) -> dict[str, float]:
    case = CASES[name]
    variants = {key: _Variant(case, way, seed) for key, way in ENGINES.items()}
    if len(case.shape) == 4:
        variants["double backward, channels_last"] = _Variant(case, with_double_backward, seed, channels_last=True)
    _check(variants)
    return interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds)


def _peak(name: str, seed: int, key: str) -> int | None:
    """Bytes that a step takes; PyTorch has run another one on a single sample before, and its libraries are loaded."""
    case = CASES[name]
    _Variant(Case(case.critic, (1, *case.shape[1:]), case.kind), ENGINES[key], seed).step()
    variant = _Variant(case, ENGINES[key], seed)
    lipgan.ops.empty_cache()
    return peak_memory(variant.step)


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the ratios, into a matplotlib axes."""
    rows = tables[0].rows
    axes.barh([row["critic"] for row in rows], [row["ratio"] for row in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch")
    axes.set_title(tables[0].title)
