"""Work that thousands of tests would repeat, done once for a process. What is tested stays the same."""

import contextlib
import functools
import gc

import torch

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><g/></svg>'


def share_export_tables():
    """Let all ONNX exports of this process use one table of translations; torch builds it again for each (1 to 2 s)."""
    export = torch.onnx.export

    @functools.wraps(export)
    def shared(*arguments, **options):
        _share_export_tables()
        return export(*arguments, **options)

    torch.onnx.export = shared


@functools.cache
def _share_export_tables():
    """Cache what `torch.onnx.export` builds; its functions are private, and a torch without them builds as before."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter import _decomp
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        build = functools.cache(ONNXRegistry.from_torchlib)
        find = functools.cache(_decomp.create_onnx_friendly_decomposition_table)

        def from_torchlib(*arguments, **options):
            built, registry = build(*arguments, **options), ONNXRegistry()
            registry.__dict__.update(built.__dict__)
            registry.functions = {target: list(known) for target, known in built.functions.items()}
            return registry

        ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
        _decomp.create_onnx_friendly_decomposition_table = lambda registered: dict(find(frozenset(registered)))


def freeze_objects():
    """Exempt all objects of imports and of the collection of tests from garbage collection (0.5 s for a full one)."""
    gc.collect()
    gc.freeze()


def blank_picture(specification, **options):
    """Return an empty picture instead of a drawn one (0.1 s each, five in every report)."""
    return SVG
