"""What people may ask the evaluator for, over HTTP."""

import json
from urllib.parse import parse_qs

from faststream.asgi import AsgiResponse, HttpHandler, post
from faststream.asgi.types import Scope

from services.evaluator.watch import Watch


def requests(watch: Watch) -> HttpHandler:
    """`POST /evaluations?model=NAME` asks for an evaluation now, whatever the grid does."""

    @post(description="Evaluate a model now")
    async def request(scope: Scope) -> AsgiResponse:
        (model, *_) = parse_qs(scope["query_string"].decode()).get("model", [""])
        if watch.request(model):
            return AsgiResponse(b'{"status": "requested"}', 202, {"Content-Type": "application/json"})
        body = json.dumps({"error": "give ?model= with the name of a model of the fleet file"})
        return AsgiResponse(body.encode(), 404, {"Content-Type": "application/json"})

    return request
