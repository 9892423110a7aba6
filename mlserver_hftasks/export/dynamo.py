"""A traceable model to a program of `torch.export`, by the exporter of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers.exporters import DynamoConfig, DynamoExporter

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export.job import Export

FILE = "model.pt2"
OPTIONS: Mapping[str, Any] = {"cpp.dynamic_threads": True}
"""As many threads as the server has, not as the compiler had."""


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file.

    Raises `ValueError` if it would not open, `InvalidSettings` if there is nothing to compile it with.
    """
    if job.order.compiled:
        _check_compiler()
    config = DynamoConfig(dynamic=True, dynamic_shapes=job.sizes)
    program, _ = DynamoExporter().export_program(job.model, job.inputs, config)
    if any(free_unbacked_symbols(node.meta.get("val")) for node in program.graph.nodes):
        # It would be written, and could not be read.
        raise ValueError("the size of a tensor inside depends on the values of others")
    if job.order.compiled:
        _compile(program, job)
    else:
        DynamoExporter.save_program(program, job.folder / FILE)
    return FILE


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InvalidSettings(
            "there is no C++ compiler, expected one such as g++ where a program is compiled (where it is "
            "served there need be none), or no such key @ parameters.extra.compile"
        ) from None


def _compile(program: Any, job: Export) -> None:
    """Write machine code for this CPU, by AOTInductor."""
    from torch._inductor import aoti_compile_and_package

    job.tell("compiling")
    aoti_compile_and_package(program, package_path=str(job.folder / FILE), inductor_configs=dict(OPTIONS))
