"""Export of any model with layers of this package to ONNX."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .models import deploy, set_backend
from .ops.export import decompositions

PACKAGES = ('onnx', 'onnxscript')  # what PyTorch's exporter needs


def export_onnx(
    module: nn.Module,
    args: tuple,
    file: str | Path,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any | None = None,
    **options,
) -> None:
    """Write a model in evaluation mode, folded for inference, as an ONNX file.

    What ``torch.onnx.export`` does not know, the operators of this package, becomes plain ONNX.
    The module itself stays as it is.

    Args:
        module (nn.Module): Any model with layers of this package, or one of these layers.
        args (tuple): Of ``module``: example inputs. Their sizes are those of the graph's inputs,
            but for what ``dynamic_shapes`` leaves open.
        file (str | Path): File to write.
        kwargs (dict[str, Any] | None): Keyword arguments of ``module``. Default: None.
        dynamic_shapes (Any | None): Sizes that stay open, as ``torch.export.export`` takes them:
            for one image ``({2: Dim('height', min=65), 3: Dim('width', min=65)},)``, with ``Dim``
            of ``torch.export``. Examples should have two different sizes above ``min`` there, and
            ``min`` be large enough that no map gets a side below 3 pixels. Default: None.
        **options: Of ``torch.onnx.export``, such as ``input_names``, ``output_names`` and
            ``opset_version``.

    Raises:
        ImportError: If a package that PyTorch's exporter needs is not installed.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise ImportError(
                f'acmix_mm.export_onnx needs {name}, which is not installed: '
                f'pip install {" ".join(PACKAGES)}'
            )
    model = set_backend(deploy(copy.deepcopy(module).eval()), 'torch')  # which decomposes
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    table = {**torch.export.default_decompositions(), **decompositions()}
    program = program.run_decompositions(table)
    # Unoptimised: that would take most of the time, and runtimes do it when they load the file.
    options = {'optimize': False, 'verbose': False, **options}
    onnx_program = torch.onnx.export(program, **options)
    for node in onnx_program.model.graph:
        node.metadata_props.clear()  # where in the source it comes from, larger than the weights
    onnx_program.save(file, external_data=False)
