"""The section of a page on the machine and the versions."""

from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.pages.page import Section, block_of
from rsi_deploy.report.table import Table
from rsi_deploy.runtime.machine import Environment


def environment_section(e: Environment) -> Section:
    """Return the section on machine and versions."""
    load = "unknown" if e.load_average is None else ", ".join(f"{load:.2f}" for load in e.load_average)
    rows = [
        ("processor", e.cpu),
        ("cores", f"{e.cores} usable" + (f", {e.physical_cores} physical" if e.physical_cores else "")),
        *([("torch threads", str(e.torch_threads))] if e.torch_threads is not None else []),
        ("instructions", ", ".join(e.cpu_flags)),
        ("memory", human_bytes(e.memory_bytes)),
        ("GPUs", ", ".join(e.gpus) or "none"),
        ("load average", load),
        ("system", e.platform),
        ("Python", e.python),
        *e.versions.items(),
    ]
    table = Table(caption="Machine and versions", columns=("", ""), rows=rows)
    return Section(name="environment", title="Environment", blocks=block_of(table))
