"""The page as a person meets it, in a real browser: what it says, what it draws, and what it does when things go wrong."""

import asyncio
from collections.abc import Iterator

import pytest
from browser import browser, chromium, tab
from msgspec.structs import replace
from stage import Script, quiet, shown, starting, surge

from waterline.snapshot import NodeNow, Use

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium: apt-get install chromium")

WATER = "Number(document.getElementById('sea').getAttribute('y'))"
HEALTH = "document.getElementById('health').textContent"
SAID = "document.getElementById('said').textContent"
CONTRAST = """(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => parse(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [.2126, .7152, .0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) { const colour = getComputedStyle(node).backgroundColor; if ((parse(colour)[3] ?? 1) > 0) return colour; } return "rgb(255, 255, 255)"; };
  const poor = [];
  for (const node of document.querySelectorAll("main *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!own || !node.getClientRects().length || node.closest("svg")) continue;
    const [a, b] = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push([node.tagName, node.textContent.slice(0, 30), (a + .05) / (b + .05)]);
  }
  return poor;
})()"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with browser() as started:
        yield started


def test_the_water_drops_when_the_public_surges(address: str) -> None:
    async def case() -> None:
        script = Script()
        async with shown(script) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            text = await page.text()
            assert "17 %" in text, "9 of 52 GPUs"
            assert "9 GPUs for the public" in text
            calm = await page.run(WATER)
            heights = await page.run(
                "Object.fromEntries([...document.querySelectorAll('.seg')].map(one => [one.textContent, Number(one.getAttribute('width')) * Number(one.getAttribute('height'))]))"
            )
            per_gpu = heights["public: 6 GPUs serving in a100"] / 6
            assert heights["research: 16 GPUs in jobs in a100"] / 16 == pytest.approx(per_gpu, rel=0.01)
            assert heights["enterprise: 3 GPUs serving in mi300"] / 3 == pytest.approx(per_gpu, rel=0.01)
            script.now = surge()
            await page.until("document.title.startsWith('75 %')")
            assert await page.run(WATER) > calm, "further down on the screen: more of the iceberg shows"
            assert page.problems == []

    asyncio.run(case())


def test_everything_that_matters_is_said_in_words(address: str) -> None:
    async def case() -> None:
        async with shown(Script()) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            text = await page.text()
            for words in (
                "Replica 'small/9' is backing off",
                "public makes room for small: 2 GPUs of mi300; ablation of research ends within 30 s",
                "reclaim: The claimant stays within what it deserves",
                "5 failures in a row",
                "batch_1",
                "25 %",
                "15 ready, 1 backing off",
            ):
                assert words in text
            assert await page.run("document.querySelector('#latencies .over').textContent") == "2.4 s", "beyond its SLO"
            assert "alice" not in await page.run("document.documentElement.outerHTML")

    asyncio.run(case())


def test_nodes_that_are_lost_are_said_and_drawn(address: str) -> None:
    lost = NodeNow(pool="gaming", node=1, state="down", gpus=2, reason="The Ray cluster has no node for it.")
    there = NodeNow(pool="gaming", node=0, state="up", gpus=2, used_gpus=2, users=("small/7", "small/8"))
    before = quiet()
    gone = Use(pool="gaming", tenant="", kind="lost", gpus=2.0)
    script = Script(
        replace(before, uses=(*before.uses[:-1], gone), nodes=(lost, there), node_states={"down": 1, "up": 1})
    )

    async def case() -> None:
        async with shown(script) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            text = await page.text()
            assert "gaming, 1\tdown\t0\t2\t–\t–\tThe Ray cluster has no node for it." in text
            assert "small/7, small/8" in text
            assert "1 down, 1 up." in text
            assert "lost with their node 2" in text, "in the legend, apart from who is idle"
            assert (
                await page.run("document.getElementById('nodes').closest('[role=region]').getAttribute('aria-label')")
                == "Nodes"
            )
            assert page.problems == []

    asyncio.run(case())


def test_names_are_shown_as_they_are(address: str) -> None:
    async def case() -> None:
        name = "<img src=x onerror=alert(1)> & co"
        moved = replace(quiet().moves[0], what=name)
        script = Script(now=replace(quiet(), fleet=name, moves=(moved,), problems=(name,)))
        async with shown(script) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            assert await page.run("document.getElementById('fleet').textContent") == name
            assert await page.run("document.querySelectorAll('img').length") == 0
            assert page.problems == []

    asyncio.run(case())


def test_it_says_when_nothing_is_ready_and_when_the_service_stops(address: str) -> None:
    async def case() -> None:
        script = Script(now=starting())
        async with shown(script) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'not ready'")
            assert await page.run(SAID) == "Nothing is ready yet: engines are starting."
            script.now = quiet()
            await page.until(f"{HEALTH} === 'serving'")
            script.now = replace(quiet(), health="stopping")
            script.stopping.set()
            await page.until(f"['stopping', 'stopped'].includes({HEALTH})")
            assert "The service" in await page.run(SAID)

    asyncio.run(case())


def test_a_lost_connection_is_said_and_comes_back_by_itself(address: str) -> None:
    async def case() -> None:
        async with shown(Script()) as url:
            port = int(url.rpartition(":")[2])
            opened = tab(address, url)
            page = await opened.__aenter__()
            await page.until(f"{HEALTH} === 'serving'")
        await page.until(f"{HEALTH} === 'connection lost'")
        assert "below is how it was at" in await page.run(SAID)
        assert await page.run("document.body.classList.contains('stale')")
        async with shown(Script(now=surge()), port=port):
            await page.until("document.title.startsWith('75 %')")
            assert await page.run(HEALTH) == "serving"
            assert not await page.run("document.body.classList.contains('stale')")
            await opened.__aexit__(None, None, None)

    asyncio.run(case())


def test_only_what_changed_is_spoken(address: str) -> None:
    async def case() -> None:
        async with shown(Script()) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            assert await page.run("document.getElementById('said').getAttribute('aria-live')") == "polite"
            await page.run(
                "window.spoken = 0; new MutationObserver(() => window.spoken++).observe(document.getElementById('said'), {childList: true, characterData: true, subtree: true})"
            )
            await page.run("window.before = document.querySelector('#replicas td')")
            await asyncio.sleep(2.2)
            assert await page.run("window.spoken") == 0
            assert await page.run("window.before === document.querySelector('#replicas td')"), "cells are kept"

    asyncio.run(case())


def test_a_keyboard_reaches_the_tables_and_opens_the_chart_as_one(address: str) -> None:
    async def case() -> None:
        async with shown(Script()) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            await page.key("Tab")
            assert await page.run("document.activeElement.className") == "skip"
            await page.key("Tab")
            assert await page.run("document.activeElement.tagName") == "SUMMARY"
            await page.key("Enter")
            assert await page.run("document.querySelector('details').open")
            assert "serving, above the water" in await page.text()
            await page.key("Tab")
            assert await page.run("document.activeElement.getAttribute('aria-label')") == "GPUs by pool"
            await asyncio.sleep(1.2)
            assert await page.run("document.activeElement.getAttribute('aria-label')") == "GPUs by pool", "focus stays"

    asyncio.run(case())


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_themes_and_on_a_phone(address: str, dark: bool) -> None:
    async def case() -> None:
        async with shown(Script()) as url, tab(address, url) as page:
            for width in (1100, 360):
                await page.look(width=width, dark=dark)
                await page.until(f"{HEALTH} === 'serving' && document.documentElement.clientWidth <= {width}")
                assert await page.run(CONTRAST) == []
                wide = await page.run("document.documentElement.scrollWidth - innerWidth")
                assert wide <= 0, f"{wide} pixels beyond {width}"

    asyncio.run(case())


def test_a_fleet_of_thousands_is_drawn_at_once(address: str) -> None:
    async def case() -> None:
        one = quiet().replicas[0]
        many = tuple(replace(one, id=f"small/{number}") for number in range(7500))
        script = Script(now=replace(quiet(), replicas=many, replica_states={"ready": 7500}))
        async with shown(script) as url, tab(address, url) as page:
            await page.until(f"{HEALTH} === 'serving'")
            assert "7,500 ready; shown are 40" in await page.text()
            assert (
                await page.run(
                    "(() => { const begun = performance.now(); draw(); return performance.now() - begun; })()"
                )
                < 200
            )

    asyncio.run(case())
