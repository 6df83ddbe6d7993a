"""`doctor`: what is installed, what will work here, and what is wrong, each with what to type."""

import importlib
import shutil
from pathlib import Path

import pydantic

from rsi_deploy.runtime.machine import Environment, environment, onnxruntime_distributions


class Finding(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One thing looked at: `level` is "ok", "note" or "problem"."""

    level: str
    what: str
    advice: str = ""


class Diagnosis(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The machine and everything found; `ok` when there is no problem."""

    environment: Environment
    providers: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing found is a problem."""
        return all(finding.level != "problem" for finding in self.findings)


def doctor() -> Diagnosis:
    """Look at versions, providers, CPU features and free disk. Imports torch and onnxruntime to see that they load."""
    findings = [_runtime_packages(onnxruntime_distributions()), *_imports(), _disk()]
    providers: tuple[str, ...] = ()
    try:
        from rsi_deploy.runtime.providers import available

        providers = tuple(available())
        findings += _cuda(providers)
    except Exception as error:  # a damaged installation can fail in any way
        findings.append(Finding(level="problem", what=f"onnxruntime does not answer: {error}"))
    here = environment()
    findings.append(_instructions(here))
    return Diagnosis(environment=here, providers=providers, findings=tuple(findings))


def _runtime_packages(found: dict[str, str]) -> Finding:
    """Onnxruntime's distributions install into one folder and overwrite each other."""
    if not found:
        return Finding(
            level="problem",
            what="no onnxruntime is installed",
            advice='pip install "rsi-deploy[cpu]", or [gpu] with CUDA',
        )
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        return Finding(
            level="problem",
            what=f"several onnxruntime packages share one folder and overwrite each other: {listed}",
            advice=f"pip uninstall -y {' '.join(found)}, then install exactly one of them",
        )
    return Finding(level="ok", what=listed)


def _imports() -> list[Finding]:
    findings = []
    for name in ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            module = importlib.import_module(name)
            findings.append(Finding(level="ok", what=f"{name} {getattr(module, '__version__', '')}".strip()))
        except Exception as error:  # a mismatched torchvision raises RuntimeError on import, for one
            findings.append(
                Finding(
                    level="problem",
                    what=f"import {name} fails: {error}",
                    advice="pip install torch torchvision (together, so that they match)"
                    if "torch" in name
                    else f"pip install {name}",
                )
            )
    return findings


def _cuda(providers: tuple[str, ...]) -> list[Finding]:
    import torch

    has = "CUDAExecutionProvider" in providers
    if torch.cuda.is_available() and not has:
        return [
            Finding(
                level="note",
                what="torch sees a GPU, onnxruntime has no CUDA provider",
                advice="pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
            )
        ]
    if has and not torch.cuda.is_available():
        return [Finding(level="note", what="onnxruntime offers CUDA, but torch sees no GPU here: it may not start")]
    return [Finding(level="ok", what="CUDA provider" if has else "no GPU: the CPU provider is what runs here")]


def _instructions(here: Environment) -> Finding:
    flags = ", ".join(here.cpu_flags) or "none known"
    return Finding(level="ok", what=f"{here.cpu}, {here.cores} cores; matrix instructions: {flags}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    level = "ok" if free > 5 * 10**9 else "note"
    advice = "" if level == "ok" else "export needs about twice the dense model's size here while it runs"
    return Finding(level=level, what=f"{free / 10**9:.0f} GB free in this folder", advice=advice)
