"""`doctor`: check the installation and the machine, and say what to type where something is wrong."""

import importlib
import shutil
from pathlib import Path

import pydantic

from rsi_deploy.runtime.machine import Environment, environment, onnxruntime_distributions


class Finding(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One result of a check; `level` is "ok", "note" or "problem"."""

    level: str
    what: str
    advice: str = ""


class Diagnosis(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The machine and all findings."""

    environment: Environment
    providers: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Return whether no finding is a problem."""
        return all(finding.level != "problem" for finding in self.findings)


def doctor() -> Diagnosis:
    """Check versions, providers, CPU features and free disk space; imports torch and onnxruntime to test them."""
    findings = [_runtime_packages(onnxruntime_distributions()), *_imports(), _disk()]
    providers: tuple[str, ...] = ()
    try:
        from rsi_deploy.runtime.providers import available_providers

        providers = tuple(available_providers())
        findings += _cuda(providers)
    except Exception as error:  # a damaged installation can raise anything
        findings.append(Finding(level="problem", what=f"onnxruntime does not work: {error}"))
    machine = environment()
    flags = ", ".join(machine.cpu_flags) or "none known"
    findings.append(Finding(level="ok", what=f"{machine.cpu}, {machine.cores} cores; matrix instructions: {flags}"))
    return Diagnosis(environment=machine, providers=providers, findings=tuple(findings))


def _runtime_packages(found: dict[str, str]) -> Finding:
    """Check that exactly one distribution of onnxruntime is installed; several overwrite each other's files."""
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
        except Exception as error:  # for example, a mismatched torchvision raises RuntimeError
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
    return [Finding(level="ok", what="CUDA provider" if has else "no GPU: the CPU provider runs models here")]


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    level = "ok" if free > 5 * 10**9 else "note"
    advice = "" if level == "ok" else "export needs about twice the dense model's size here while it runs"
    return Finding(level=level, what=f"{free / 10**9:.0f} GB free in this folder", advice=advice)
