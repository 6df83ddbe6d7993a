"""The watcher that reloads bundles which are replaced on disk. The switch happens once the new files are loaded."""

import asyncio
import logging
from pathlib import Path

from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.serving.bundles import Stamp, stamps
from rsi_deploy.serving.catalog import all_versions
from rsi_deploy.serving.service import Service

logger = logging.getLogger(__name__)


async def watch(service: Service, interval: float) -> None:
    """Check the files every `interval` seconds; reload those that have changed and then stayed equal for one interval.

    If the new files cannot be served, the log has the reason, the models before are still served, and the files are
    tried again when they change again.
    """
    seen: dict[Path, tuple[Stamp, ...]] = {}
    refused: dict[Path, tuple[Stamp, ...]] = {}
    while True:
        await asyncio.sleep(interval)
        changed = {}
        for served in all_versions(service.routes):
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
            logger.error("not reloaded, the models before are still served: %s", error)
            service.metrics.note_reload("refused")
        except OSError as error:  # removed while it was read: tried again at the next check
            logger.info("could not be read: %s", error)
        else:
            logger.warning("reloaded: %s", ", ".join(f"{s.name} {s.version}" for s in changed.values()))
            service.metrics.note_reload("done")
