"""GET /health and /version. Open to everyone: load balancers carry no key."""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter, Response

from dibit.server.replies import Health, Version
from dibit.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the engine is alive and takes requests; 503 with the reason when it does not."""
        reason, alive = service.engine.healthy, service.engine.healthy is None
        if alive and service.engine.draining:
            reason = "shutting down: requests in flight are finished, new ones are refused"
        stats = service.engine.stats()
        response.status_code = 200 if reason is None else 503
        return {
            "status": "ok" if reason is None else "draining" if alive else "dead",
            "alive": alive,
            "ready": reason is None,
            "reason": reason,
            "model": service.model_name,
            "running": stats.running,
            "waiting": stats.waiting,
        }

    @routes.get("/version")
    async def version() -> Version:
        """The version of dibit that answers."""
        return {"version": importlib.metadata.version("dibit")}

    return routes
