"""A traceable model to a program of `torch.export`, by the exporter of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.exporters import DynamoConfig, DynamoExporter

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.export.job import Export

FILE = "model.pt2"
OPTIONS: Mapping[str, Any] = {"cpp.dynamic_threads": True}
"""As many threads as the server has, not as the compiler had."""


def write(job: Export) -> str:
    """Write the program and its weights; the name of its file."""
    config = DynamoConfig(dynamic=True, dynamic_shapes=job.sizes)
    program, _ = DynamoExporter().export_program(job.model, job.inputs, config)
    if job.order.compiled:
        _compile(program, job)
    else:
        DynamoExporter.save_program(program, job.folder / FILE)
    return FILE


def _compile(program: Any, job: Export) -> None:
    """Write machine code for this CPU, by AOTInductor. Raises `InvalidSettings` without a C++ compiler."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InvalidSettings(
            "there is no C++ compiler, expected one such as g++ where a program is compiled (where it is "
            "served there need be none), or no such key @ parameters.extra.compile"
        ) from None
    job.tell("compiling")
    aoti_compile_and_package(program, package_path=str(job.folder / FILE), inductor_configs=dict(OPTIONS))
