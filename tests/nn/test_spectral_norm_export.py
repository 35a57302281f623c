"""Tracers and exporters see PyTorch's own operations, and give the numbers of the model."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipgan

X = torch.linspace(-1, 1, 4 * 3 * 16).reshape(4, 3, 4, 4).sin()


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(6 * 64, 1),
    )
    for layer in network:
        if hasattr(layer, "weight"):
            lipgan.spectral_norm(layer)
    if kind == "group":
        lipgan.group_spectral_norm(network)
    for _ in range(3):
        network(X)
    return network.eval()


def names_of_operations(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


KINDS = pytest.mark.parametrize("kind", ["single", "group"])
# The tracers themselves warn of their own deprecation, and of checks of shapes that become constants.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.mark.hardware
@KINDS
def test_jit_trace(kind: str) -> None:
    network = model(kind)
    traced = torch.jit.trace(network, X[:2])
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    kinds = {node.kind() for node in loaded.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    assert "prim::PythonOp" not in kinds
    torch.testing.assert_close(loaded(X), network(X), rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # the trace reads the weights, it has not baked them
        dict(loaded.named_parameters())["5.parametrizations.weight.original"][:, 0] += 1
    assert not torch.allclose(loaded(X), network(X))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(kind: str, strict: bool) -> None:
    network = model(kind)
    program = torch.export.export(network, (X,), strict=strict)
    assert not any("lipgan" in name for name in names_of_operations(program.graph))
    torch.testing.assert_close(program.module()(X), network(X), rtol=1e-5, atol=1e-6)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(X), network(X), rtol=1e-5, atol=1e-6)


def _by_tracing(network: nn.Module, x: Tensor, path: Path) -> None:
    torch.onnx.export(network, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})


def _by_export(network: nn.Module, x: Tensor, path: Path) -> None:
    pytest.importorskip("onnxscript")
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(network, (x,), path, dynamo=True, input_names=["x"], dynamic_shapes=({0: batch},), verbose=False)


@KINDS
@pytest.mark.parametrize("export", [_by_tracing, _by_export])
def test_onnxruntime(export: Callable[[nn.Module, Tensor, Path], None], kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    network = model(kind)
    path = tmp_path / "critic.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(network, X[:2], path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in (X[:2], X):
        (out,) = session.run(None, {"x": x.numpy(force=True)})
        torch.testing.assert_close(torch.as_tensor(out), network(x).detach(), rtol=1e-5, atol=1e-6)
