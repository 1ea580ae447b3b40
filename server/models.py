"""GET /v1/models and /v1/models/{id}: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter

from dibit.server.errors import ErrorReply
from dibit.server.replies import ModelCard, ModelList
from dibit.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["models"])

    def card() -> ModelCard:
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "dibit",
            "max_model_len": service.engine.max_model_len,
        }

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        """The models that are served."""
        return {"object": "list", "data": [card()]}

    # Names such as "org/model" have slashes.
    @routes.get("/v1/models/{model_id:path}", responses={"4XX": {"model": ErrorReply}})
    async def retrieve_model(model_id: str) -> ModelCard:
        """One model."""
        service.check_model(model_id)
        return card()

    return routes
