"""The gateway's page: who may read it, what it shows, and how it looks in headless Chromium."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.processes import LOOPBACK
from shared.messages import SavingOnMeter
from shared.topics import METERED_SAVINGS
from tests.support.chromium import Page, chromium, chromium_program
from tests.support.deadlines import REPLY_S
from tests.support.gateway import GatewayProcess
from tests.support.router import LONG_PROMPT, MODEL, producing, question

pytestmark = pytest.mark.integration

PHONE = {"width": 390, "height": 844}

CONTRAST = """
(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const back = node => { for (; node; node = node.parentElement) {
    const color = parts(getComputedStyle(node).backgroundColor); if (color.length < 4 || color[3] > 0) return color; }
    return [255, 255, 255]; };
  let least = 21;
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some(one => one.nodeType === 3 && one.data.trim())) continue;
    if (node.closest("script, style, noscript, .skip")) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(back(node))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()
"""
"""The least contrast of any text with its background."""


def key_of(gateways: GatewayProcess, tenant: str | None = None) -> str:
    return asyncio.run(gateways.create_key(tenant=tenant))


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=REPLY_S, **options)


def ask(url: str, key: str, prompt: str, **changes: object) -> str:
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": prompt}], **changes},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    answer.raise_for_status()
    return answer.json()["id"]


async def publish_savings(gateways: GatewayProcess, *savings: SavingOnMeter) -> None:
    async with producing(gateways.kafka) as producer:
        for saving in savings:
            await producer.post(METERED_SAVINGS, saving, saving.window)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = chromium_program()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with chromium(program, Path(tmp_path_factory.mktemp("chromium"))) as page:
        yield page


def test_the_page_needs_a_key_unless_this_machine_asks(gateways: GatewayProcess):
    tenant, other = key_of(gateways, tenant="garden"), key_of(gateways, tenant="other")
    url = gateways.urls[0]
    asked = ask(url, tenant, question(7))
    assert get(url).status_code == 200
    foreign = {"host": "sprout.example"}
    refused = get(url, headers=foreign)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic ")
    assert get(url, headers=foreign, auth=("any", "wrong")).status_code == 401
    assert get(f"{url}/?key={tenant}", headers=foreign).status_code == 401
    assert get(url, headers={**foreign, "authorization": "Basic !"}).status_code == 401
    mine = get(url, headers=foreign, auth=("any", tenant))
    assert mine.status_code == 200
    assert asked[:16] in mine.text
    # A key with a tenant lists the answers to this tenant only.
    assert asked[:16] not in get(url, headers=foreign, auth=("any", other)).text
    status = get(f"{url}/v1/sprout/status", headers={**foreign, "authorization": f"Bearer {tenant}"}).json()
    assert [answer["level"] for answer in status["answers"]] == ["L1"]
    saved = status["saved_today"]
    assert (saved["on_the_meter_g"], saved["meter"]["reason"]) == (None, "the ledger has not published it today")
    assert status["zones"][0]["now"]["g_per_kwh"] == 300.0


def test_on_a_public_address_everybody_needs_a_key(gateways: GatewayProcess):
    key = key_of(gateways)
    url = gateways.start(SPROUT_HTTP_HOST="0.0.0.0")
    try:
        assert LOOPBACK in url
        assert get(url).status_code == 401
        assert get(url, auth=("any", key)).status_code == 200
    finally:
        gateways.stop(url)


def test_the_page_in_chromium(gateways: GatewayProcess, browser: Page):
    key, url = key_of(gateways), gateways.urls[0]
    browser.open(url, **PHONE)
    # Readable on a phone: nothing but tables scrolls sideways.
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(CONTRAST) >= 4.5
    landmarks = browser.evaluate("[...document.querySelectorAll('header, main, footer')].map(one => one.localName)")
    assert landmarks == ["header", "main", "footer"]
    assert browser.evaluate(
        "[...document.querySelectorAll('section')].every(one => document.getElementById("
        "one.getAttribute('aria-labelledby')).textContent)"
    )
    assert "Policy 1" in browser.evaluate("document.getElementById('policy').textContent")
    assert "300 g/kWh" in browser.evaluate("document.getElementById('grid').textContent")
    # The first stop of the tab key skips to the answers.
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.evaluate("document.activeElement.textContent") == "Skip to the last answers"
    # The saving on the meter appears by itself once the ledger has published it, or why it has not.
    assert "the ledger has not published it today" in browser.evaluate("document.getElementById('saved').textContent")
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    today = SavingOnMeter(
        window="day", since=midnight, at=midnight + timedelta(seconds=1), saved_g=1_234.0, saved_g_low=-5.0,
        saved_g_high=2_000.0, blocks=4,
    )  # fmt: skip
    month = SavingOnMeter(
        window="28-days", since=midnight, at=midnight, saved_share=0.25, saved_share_low=0.2, saved_share_high=0.3
    )
    asyncio.run(publish_savings(gateways, today, month))
    assert browser.evaluate(
        "new Promise(done => { const look = () => document.getElementById('meter').textContent === '1.23 kg' ? "
        "done(true) : setTimeout(look, 100); look(); })"
    )
    saved = browser.evaluate("document.getElementById('saved').textContent")
    assert "-5.00 g to 2.00 kg, 95 %" in saved
    assert "25.0 % of the fleet's grams" in saved
    assert "has not published" not in saved
    assert browser.evaluate(CONTRAST) >= 4.5
    # An answer appears by itself, without its text.
    asked = ask(url, key, LONG_PROMPT)
    assert browser.evaluate(
        "new Promise(done => { const look = () => document.getElementById('answer-rows').textContent.includes("
        f"'{asked[:16]}') ? done(true) : setTimeout(look, 100); look(); }})"
    )
    shown = browser.evaluate("document.body.textContent")
    assert "L1 says" not in shown
    assert LONG_PROMPT not in shown
    assert asked not in shown
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.evaluate(CONTRAST) >= 4.5
    browser.evaluate("document.getElementById('pause').click()")
    assert browser.evaluate("document.getElementById('pause').getAttribute('aria-pressed')") == "true"


def test_the_page_says_when_the_gateway_is_away(gateways: GatewayProcess, browser: Page):
    url = gateways.start()
    browser.open(url, **PHONE)
    gateways.stop(url)
    assert browser.evaluate(
        "new Promise(done => { const look = () => document.getElementById('connection').textContent ? done(true) : "
        "setTimeout(look, 100); look(); })"
    )
