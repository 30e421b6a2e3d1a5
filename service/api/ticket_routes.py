"""Tickets: how a web page, which cannot send a header with a WebSocket, opens a stream on a server with keys."""

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel

from unroll.service.api.app_state import AppState
from unroll.service.api.error_responses import problem_responses


class Ticket(BaseModel):
    """seconds: for which it opens streams."""

    ticket: str
    seconds: float


def router(app: AppState) -> APIRouter:
    api = APIRouter(prefix="/v1", tags=["native v1"])

    @api.post(
        "/tickets",
        summary="A ticket that opens streams in place of the API key, for a short time",
        description="Connect with the protocols `unroll.v1` and `unroll.ticket.` followed by the ticket.",
        responses=problem_responses({404: "not_found: this server has no keys, and streams need no ticket"}),
    )
    async def ticket(http: Request) -> Ticket:
        if not app.gate.has_keys:
            raise HTTPException(404, "this server has no keys: streams need no ticket")
        ticket, seconds = app.gate.ticket(app.gate.key_of(dict(http.scope["headers"])))
        return Ticket(ticket=ticket, seconds=seconds)

    return api
