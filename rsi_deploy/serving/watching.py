"""Bundles that are replaced on disk while they are served: seen, checked, loaded, and only then switched to."""

import asyncio
import logging
from pathlib import Path

from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.serving.bundles import Stamp, stamps
from rsi_deploy.serving.catalog import all_served
from rsi_deploy.serving.service import Service

logger = logging.getLogger(__name__)


async def watch(service: Service, interval: float) -> None:
    """Look at the files every `interval` seconds; what has changed, and then kept still for one more look, is reloaded.

    Files that cannot be served are refused, with the reason in the log, until they change again: what was loaded before
    goes on answering.
    """
    seen: dict[Path, tuple[Stamp, ...]] = {}
    refused: dict[Path, tuple[Stamp, ...]] = {}
    while True:
        await asyncio.sleep(interval)
        changed = {}
        for served in all_served(service.routes):
            path = served.bundle.path
            now = stamps(path)
            if now not in (served.bundle.stamps, refused.get(path)) and now == seen.get(path):
                changed[served.key] = served
            seen[path] = now
        if not changed:
            continue
        try:
            await service.reload(changed)
        except RsiDeployError as error:
            refused |= {served.bundle.path: seen[served.bundle.path] for served in changed.values()}
            logger.error("not reloaded, the files before go on: %s", error)
            service.metrics.note_reload("refused")
        except OSError as error:  # gone again while it was read: the next look will tell
            logger.info("not read: %s", error)
        else:
            logger.warning("reloaded: %s", ", ".join(f"{s.name} {s.version}" for s in changed.values()))
            service.metrics.note_reload("done")
