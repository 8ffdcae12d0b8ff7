"""The page at `/`, and the same as JSON. A little script fetches the page again, and replaces what has changed.

Reading it needs an API key, as the password of HTTP basic authentication (any user name) or as a bearer token. On
loopback it needs none: then the address in the browser must be one of this machine as well, so that neither a proxy nor
a foreign name that resolves to this machine opens it to others.
"""

import base64
import binascii
import secrets
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from typing import Annotated, Final

from fastapi import Depends, FastAPI, Request
from jinja2 import Environment, PackageLoader
from starlette.responses import HTMLResponse

from services.gateway.errors import ApiError
from services.gateway.keys import ApiKey
from services.gateway.status import IntensityAt, Monitor, SproutStatus
from shared.runtime.clock import Clock

REFRESH_MS: Final = 3_000

Authenticate = Callable[[Request], Awaitable[ApiKey]]
"""Finds the key of a request with a bearer token, or raises `ApiError`."""


def add_page(api: FastAPI, monitor: Monitor, *, clock: Clock, authenticate: Authenticate, host: str) -> None:
    """Add `/` and `/v1/sprout/status`.

    Args:
        host: address on which the gateway listens.
    """
    template = _environment().get_template("page.html.jinja")

    async def viewer(request: Request) -> ApiKey | None:
        if is_loopback(host) and is_loopback(request.url.hostname or ""):
            return None
        try:
            return await authenticate(_with_bearer(request))
        except ApiError as error:
            if error.status == 401:
                error.headers["www-authenticate"] = 'Basic realm="Sprout: an API key as the password", charset="UTF-8"'
            raise

    Viewer = Annotated[ApiKey | None, Depends(viewer)]  # noqa: N806 - a type

    @api.get("/v1/sprout/status", tags=["sprout"])
    async def sprout_status(key: Viewer) -> SproutStatus:
        """What Sprout does at the moment: grid, policies, servers, saving, last answers."""
        return monitor.status(clock.now(), tenant=None if key is None else key.tenant)

    @api.get("/", include_in_schema=False)
    async def page(key: Viewer) -> HTMLResponse:
        status, nonce = monitor.status(clock.now(), tenant=None if key is None else key.tenant), secrets.token_hex(16)
        return HTMLResponse(
            template.render(status=status, nonce=nonce, refresh_ms=REFRESH_MS),
            headers={
                "cache-control": "no-store",
                "content-security-policy": f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}';"
                " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "referrer-policy": "no-referrer",
                "x-content-type-options": "nosniff",
            },
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address means only this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _with_bearer(request: Request) -> Request:
    """The request with the password of HTTP basic authentication as its bearer token."""
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return request
    try:
        _, _, password = base64.b64decode(encoded, validate=True).partition(b":")
    except binascii.Error:
        password = b""
    others = [(name, value) for name, value in request.scope["headers"] if name != b"authorization"]
    return Request({**request.scope, "headers": [*others, (b"authorization", b"Bearer " + password)]})


def _environment() -> Environment:
    made = Environment(loader=PackageLoader("services.gateway"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"number": _number, "grams": format_grams, "line": _line}
    return made


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}".replace(",", "\N{NO-BREAK SPACE}")


def format_grams(value: float) -> str:
    """Grams with about three digits, in a unit that fits."""
    factor, unit = (1e-3, "kg") if abs(value) >= 1_000 else (1.0, "g") if abs(value) >= 1 else (1e3, "mg")
    amount = value * factor
    return f"{_number(amount, 0 if abs(amount) >= 100 else 1 if abs(amount) >= 10 else 2)} {unit}"


def _line(points: Sequence[IntensityAt]) -> str:
    """The path of a chart, 100 wide and 40 high."""
    first, last = points[0].at.timestamp(), points[-1].at.timestamp()
    values = [point.g_per_kwh for point in points]
    low, span = min(values), max(values) - min(values)
    return "M" + " L".join(
        f"{100 * (point.at.timestamp() - first) / max(last - first, 1e-9):.1f} "
        f"{38 - 36 * ((point.g_per_kwh - low) / span if span else 0.5):.1f}"
        for point in points
    )
