"""Converts TorchScript and programs of torch.export to an nn.Module.

Both are graphs of PyTorch operators. Each call of a recurrent layer becomes an nn.LSTM, nn.GRU or nn.RNN with the same
weights. Comparing answers tells whether the result equals the model.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.export.errors import ExportError, first_line
from unroll.export.log_filter import quiet
from unroll.export.signature.outputs import leaves

_LAYERS: dict[Any, tuple[Any, dict[str, Any]]] = {
    torch.ops.aten.lstm.input: (nn.LSTM, {}),
    torch.ops.aten.gru.input: (nn.GRU, {}),
    torch.ops.aten.rnn_tanh.input: (nn.RNN, {"nonlinearity": "tanh"}),
    torch.ops.aten.rnn_relu.input: (nn.RNN, {"nonlinearity": "relu"}),
}

#: Operators of PyTorch's own that it defines with custom_op, and ours.
_LIBRARIES = {"prims", "rngprims", "debug_mode_ops", "unroll"}

_OPTIONS = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")


def as_module(model: Any, example: dict[str, Any]) -> nn.Module:
    """Convert `model` to an nn.Module. Raises ExportError(scripted | not_exportable)."""
    if isinstance(model, ExportedProgram):
        _check_sizes(model)
        return _with_layers(model)
    if isinstance(model, fx.GraphModule) and any(node.target in _LAYERS for node in model.graph.nodes):
        raise ExportError(
            "not_exportable", "this is the module of an exported program; give the torch.export.ExportedProgram itself"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return _from_script(model, example)
    return model


def load(path: Path) -> nn.Module:
    """Load a TorchScript file. Its operators may run, but nothing in it is unpickled into Python objects."""
    try:
        with quiet():
            return torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ExportError("checkpoint", f"{path} is a damaged TorchScript file: {first_line(error)}") from error


def _from_script(model: nn.Module, example: dict[str, Any]) -> nn.Module:
    """Convert through the Python classes it was compiled from, if they can be imported, otherwise through its graph."""
    why = ""
    for read in (partial(without_scripts, model), partial(_converted, model, example)):
        try:
            with quiet(), torch.no_grad():
                module = read()
                if _alike(_answers(model, example), _answers(module, example)):
                    return module
                why = "its answers change"
        except Exception as error:  # noqa: BLE001 user code: the reason goes into the refusal
            why = first_line(error)
    if "INTERNAL ASSERT" in why:
        why = "PyTorch's own converter fails, as on any model that keeps its state in itself"
    raise ExportError(
        "scripted",
        f"the scripted model cannot be converted ({why}); export the nn.Module that it was made from, with its weights "
        "in --weights: safetensors, or a state_dict",
    )


def _answers(model: nn.Module, example: dict[str, Any]) -> Any:
    """Run the model in eval mode, as it is exported; its own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return model.eval()(**example)
    finally:
        for module, training in modes:
            module.training = training


def _converted(model: nn.Module, example: dict[str, Any]) -> nn.Module:
    from torch._export.converter import TS2EPConverter

    if not isinstance(model, torch.jit.ScriptModule):
        raise ExportError("scripted", "the Python class of a scripted layer is not known")
    program = TS2EPConverter(model, tuple(example.values()), {}).convert()
    return _with_layers(program, list(example))


def _in_python(model: torch.jit.ScriptModule) -> nn.Module:
    kind = getattr(getattr(model, "_actual_script_module", model), "_concrete_type", None)
    if kind is None or kind.py_class is None:
        raise ExportError("scripted", "its Python classes are not known")
    return _rebuilt(model, kind)


def without_scripts(model: nn.Module) -> nn.Module:
    """A copy with scripted submodules as Python modules, sharing all parameters; `model` itself if there are none."""
    if isinstance(model, torch.jit.ScriptModule):
        return _in_python(model)
    children = {name: without_scripts(child) for name, child in model.named_children()}
    if all(children[name] is child for name, child in model.named_children()):
        return model
    copied = copy.copy(model)
    copied._modules = {name: children.get(name) for name in model._modules}
    return copied


@contextmanager
def in_python() -> Iterator[None]:
    """Run scripted functions and the operators of torch.library.custom_op as their Python functions.

    Some packages make an operator when they first need it.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, "_torchdynamo_inline", partial(compiled, self))(*args, **kwargs)

    def define(self: CustomOpDef, *args: Any, **kwargs: Any) -> None:
        defined(self, *args, **kwargs)
        replace(self)

    def replace(definition: CustomOpDef) -> None:
        if definition._namespace in _LIBRARIES:
            return
        for called in (definition._opoverload, definition._opoverload.overloadpacket):
            changes.enter_context(mock.patch.object(called, "_op", partial(_on_cpu, definition)))

    compiled: Any = torch.jit.ScriptFunction.__call__
    defined: Any = CustomOpDef.__init__
    with ExitStack() as changes:
        changes.enter_context(mock.patch.object(torch.jit.ScriptFunction, "__call__", run))
        changes.enter_context(mock.patch.object(CustomOpDef, "__init__", define))
        for definition in list(OPDEFS.values()):
            replace(definition)
        yield


def _on_cpu(operator: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
    """Call an operator's own function, or the one that was registered for CPUs."""
    kernels, key = operator._backend_fns, torch.DispatchKey.CPU
    if "cpu" not in kernels and operator._opoverload.has_kernel_for_dispatch_key(key):
        return operator._opoverload._op_dk(key, *args, **kwargs)
    return kernels.get("cpu", operator._init_fn)(*args, **kwargs)


def _rebuilt(model: nn.Module, kind: Any) -> nn.Module:
    """An instance of the Python class that `kind` was compiled from, with the contents of `model`."""
    plain: Any = kind.py_class
    if issubclass(plain, nn.RNNBase):
        options = {name: getattr(model, name) for name in _OPTIONS}
        if plain is nn.RNN:
            options["nonlinearity"] = model.nonlinearity
        layer = plain(
            model.input_size,
            model.hidden_size,
            **options | ({"proj_size": model.proj_size} if plain is nn.LSTM else {}),
        )
        layer.load_state_dict(model.state_dict())
        return layer
    if issubclass(plain, torch.jit.ScriptModule):
        plain = type(plain.__name__, (nn.Module,), {n: stub.original_method for n, stub in plain._methods.items()})
    made = plain.__new__(plain)
    nn.Module.__init__(made)
    for name, parameter in model.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        made.register_buffer(name, buffer)
    for name, inner in kind.get_modules():
        made.add_module(name, _rebuilt(getattr(model, name), inner))
    for name in (*kind.get_attributes(), *kind.get_constants()):
        if not hasattr(made, name):
            setattr(made, name, getattr(model, name))
    return made


def _alike(one: Any, other: Any) -> bool:
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for (_, a), (_, b) in pairs)


def _check_sizes(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            value = node.meta["val"]
            if isinstance(value, Tensor) and value.dim() > 1 and any(isinstance(n, int) for n in value.shape[:2]):
                raise ExportError(
                    "not_exportable",
                    f"the program takes {node.name!r} of {tuple(value.shape)} only; export it with dynamic_shapes for "
                    "the batch and the time: {0: Dim.AUTO, 1: Dim.AUTO}",
                )


def _with_layers(program: ExportedProgram, names: list[str] | None = None) -> nn.Module:
    """Convert a program to a module, with `names` for its inputs."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(inputs, names or [], strict=False):
        node.target = node.name = name
    for number, node in enumerate([node for node in graph.nodes if node.target in _LAYERS]):
        name = f"layer_{number}"
        module.add_submodule(name, _layer(module, node))
        x, hx = node.args[:2]
        states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (x, *states)))
        graph.erase_node(node)
    (output,) = graph.output_node().args
    if isinstance(output, (list, tuple)) and len(output) == 1:
        graph.output_node().args = (output[0],)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph)


class _Layer(nn.Module):
    """Adapts a recurrent layer to the operator's arguments and results."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, after = self.rnn(x, states if len(states) == 2 else states[0])
        return (y, *after) if isinstance(after, tuple) else (y, after)


def _layer(module: fx.GraphModule, node: fx.Node) -> _Layer:
    kind, options = _LAYERS[node.target]
    _, _, weights, bias, layers, dropout, _, bidirectional, batch_first = node.args
    values = [_value(module, weight) for weight in weights]  # type: ignore[union-attr, arg-type]
    hidden, proj = values[1].shape[0] // {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind], values[1].shape[1]
    if kind is nn.LSTM and proj != hidden:
        options = options | {"proj_size": proj}
    options = options | {"bias": bias, "dropout": dropout, "bidirectional": bidirectional, "batch_first": batch_first}
    rnn = kind(values[0].shape[1], hidden, layers, **options)
    with torch.no_grad():
        for own, value in zip(pytree.tree_leaves(rnn._flat_weights), values, strict=True):
            own.copy_(value)
    return _Layer(rnn.to(values[0].dtype))


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op != "get_attr":
        raise ExportError(
            "not_exportable", "the program computes the weights of a recurrent layer; export the nn.Module"
        )
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name)
