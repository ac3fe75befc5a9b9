"""Rewrites of an exported graph that ONNX Runtime does not make itself; the model computes the same.

A head that reads one token, as that of BERT does the first, needs of the last layer only what that token
becomes: keys and values of all tokens, but one query, and one row of everything after the attention. PyTorch
computes all rows, and throws them away.
"""

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_ATTENTION = "MultiHeadAttention"
_PADDING = 4  # which of its inputs is the padding mask, (B, L)
_BIAS = 5  # and which one is added to the scores, (B, H, L, L)

# Whose output at a token depends on their inputs at that token alone.
_ACTIVATIONS = {"Clip", "Elu", "Erf", "Gelu", "HardSwish", "Neg", "Relu", "Sigmoid", "Softplus", "Tanh"}
_UNARY = {"Cast", "Identity", *_ACTIVATIONS}
_BINARY = {"Add", "Div", "Mul", "Pow", "Sub"}

# Nodes that compute token by token, each with the places of its inputs that have tokens.
_Nodes = dict[Any, tuple[int, ...]]


def rewrite(program: ir.Model) -> None:
    """All of the rewrites, in place."""
    drop_reshapes(program.graph)
    RemoveUnusedNodesPass()(program)  # they still read what is to be read by nothing else
    select_early(program.graph)
    skip_full_masks(program.graph)


def drop_reshapes(graph: ir.Graph) -> None:
    """Read, instead of a tensor that was reshaped and reshaped back, the tensor itself."""
    for node in graph:
        output, source = node.outputs[0], node
        while source is not None and source.op_type == "Reshape":
            value: Any = source.inputs[0]
            if _shape(value) is not None and _shape(value) == _shape(output):
                if not output.is_graph_output():
                    ir.convenience.replace_all_uses_with(output, value)
                break
            source = value.producer()


def select_early(graph: ir.Graph) -> None:
    """Where all that is left of a tensor is one of its tokens, compute only that, as far up as possible."""
    for node in list(graph):
        if _is_select(node):
            _push_up(graph, node)


def _is_select(node: ir.Node) -> bool:
    """Whether it takes the same token of each sequence of a batch."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    states, index = node.inputs
    return _rank(states) == 3 and _rank(index) == 0 and _constant(index) is not None


def _push_up(graph: ir.Graph, select: ir.Node) -> None:
    nodes = _above(select)
    while outside := [node for node in nodes if not _is_within(node, nodes, select)]:
        for node in outside:
            del nodes[node]
    if not nodes:
        return
    name = select.outputs[0].name
    index = _new_constant(graph, f"{name}_index", [_constant(select.inputs[1]).item()])
    selected: dict[Any, Any] = {}
    for node in [node for node in graph if node in nodes]:
        for place in nodes[node]:
            value: Any = node.inputs[place]
            if value.producer() in nodes:
                continue
            if value not in selected:
                gather = ir.node("Gather", [value, index], {"axis": 1}, name=f"{value.name}_for_{name}")
                graph.insert_before(node, gather)
                selected[value] = _describe(gather.outputs[0], gather.name, value.dtype, _one_token(value))
            node.replace_input_with(place, selected[value])
        for output in node.outputs:
            output.shape = _one_token(output)
    select.replace_input_with(1, _new_constant(graph, f"{name}_only", 0))


def _above(select: ir.Node) -> _Nodes:
    """What computes the tensor that `select` reads, up to where tokens meet."""
    states: Any = select.inputs[0]
    length = states.shape[1]
    nodes: _Nodes = {}
    values = [states]
    while values:
        node = values.pop().producer()
        if node is not None and node not in nodes and (places := _token_inputs(node, length)):
            nodes[node] = places
            values += [node.inputs[place] for place in places]
    return nodes


def _token_inputs(node: ir.Node, length: Any) -> tuple[int, ...]:
    """Places of the inputs that the outputs at a token are computed from, at that token alone; () if they
    are computed otherwise."""

    def has_tokens(value: Any) -> bool:
        return _rank(value) == 3 and bool(value.shape[1] == length)

    if not all(map(has_tokens, node.outputs)):
        return ()
    if node.op_type in _BINARY:
        places = tuple(place for place, value in enumerate(node.inputs) if has_tokens(value))
        others = [value for place, value in enumerate(node.inputs) if place not in places]
        return places if all(_rank(value) in (0, 1) for value in others) else ()
    return (0,) if has_tokens(node.inputs[0]) and _keeps_tokens_apart(node) else ()


def _keeps_tokens_apart(node: ir.Node) -> bool:
    """Of a node whose first input and whose outputs have tokens."""
    match node.op_type:
        case "LayerNormalization" | "RMSNormalization":
            return node.attributes.get_int("axis", -1) in (-1, 2)
        case "Split":
            return node.attributes.get_int("axis", 0) in (-1, 2)
        case "Slice":
            axes = _constant(node.inputs[3]) if len(node.inputs) > 3 else None
            return axes is not None and set(axes.tolist()) <= {-1, 2}
        case "MatMul":
            return _rank(node.inputs[1]) == 2
        case "MultiHeadAttention":
            # Each query has its own row of scores; a bias would have to be cut as they are.
            return all(value is None for value in node.inputs[_BIAS:])
    return node.op_type in _UNARY


def _is_within(node: ir.Node, nodes: _Nodes, select: ir.Node) -> bool:
    """Whether nothing reads what `node` computes but `select`, and `nodes` where they read tokens."""
    return not any(output.is_graph_output() for output in node.outputs) and all(
        use.node is select or use.idx in nodes.get(use.node, ())
        for output in node.outputs
        for use in output.uses()
    )


def skip_full_masks(graph: ir.Graph) -> None:
    """Leave a padding mask out, as the model runs, if there is no padding.

    Without a mask ONNX Runtime's attention goes through keys and values in blocks (Dao et al. 2022,
    FlashAttention); with one it forms all scores, which takes a fifth longer.
    """
    full: dict[Any, Any] = {}
    for node in list(graph):
        mask = node.inputs[_PADDING] if node.op_type == _ATTENTION and len(node.inputs) > _PADDING else None
        if mask is None or any(value is not None for value in node.inputs[_BIAS:]):
            continue
        if mask not in full:
            full[mask] = _is_full(graph, node, mask)
        branches = {"then_branch": _branch(node, "whole", None), "else_branch": _branch(node, "padded", mask)}
        choice = ir.node("If", [full[mask]], branches, name=f"{node.outputs[0].name}_if")
        old, new = node.outputs[0], choice.outputs[0]
        _describe(new, old.name, old.dtype, old.shape)
        graph.insert_before(node, choice)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is_full(graph: ir.Graph, before: ir.Node, mask: ir.Value) -> ir.Value:
    """A bool: whether all of the mask's entries, 0 or 1, are 1."""
    least = ir.node("ReduceMin", [mask], {"keepdims": 0}, name=f"{mask.name}_least")
    full = ir.node("Cast", [least.outputs[0]], {"to": ir.DataType.BOOL.value}, name=f"{mask.name}_is_full")
    graph.insert_before(before, [least, full])
    _describe(least.outputs[0], least.name, mask.dtype, ir.Shape([]))
    return _describe(full.outputs[0], full.name, ir.DataType.BOOL, ir.Shape([]))


def _branch(attention: ir.Node, how: str, mask: ir.Value | None) -> ir.Graph:
    """The attention alone, which reads its inputs from the graph around it."""
    inputs = [*attention.inputs[:_PADDING], mask]
    while inputs[-1] is None:
        inputs.pop()
    output = attention.outputs[0]
    name = f"{output.name}_{how}"
    copy = ir.node(_ATTENTION, inputs, dict(attention.attributes), domain=attention.domain, name=name)
    result = _describe(copy.outputs[0], name, output.dtype, output.shape)
    return ir.Graph([], [result], nodes=[copy], name=name)


def _rank(value: ir.Value | None) -> int | None:
    """None if it is not known, or there is no value."""
    return None if value is None or value.shape is None else len(value.shape)


def _shape(value: ir.Value) -> list[Any] | None:
    """Its dimensions; None if one of them is known neither by number nor by name."""
    dims: list[Any] | None = None if value.shape is None else list(value.shape)
    return None if dims is None or any(getattr(dim, "value", dim) is None for dim in dims) else dims


def _one_token(value: Any) -> ir.Shape:
    batch, _, width = value.shape
    return ir.Shape([batch, 1, width])


def _describe(value: ir.Value, name: str | None, dtype: Any, shape: ir.Shape | None) -> ir.Value:
    value.name, value.dtype, value.shape = name, dtype, shape
    return value


def _constant(value: ir.Value | None) -> Any:
    """Its numbers; None if they are not known before the model runs."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _new_constant(graph: ir.Graph, name: str, content: Any) -> ir.Value:
    tensor: Any = ir.tensor(content, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
