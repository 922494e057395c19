"""The page for people, in a real browser: what is seen, by keyboard too, and what is never done."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from page_cases import EVIL, EVIL_ID, OneModel, Shop, chromium, served

from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys, make_key

PAGE = Path(__file__).parents[1] / "serving" / "api" / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop()


@pytest.fixture(scope="module")
def url(shop: Shop) -> Iterator[str]:
    with served(make_app(OneModel(shop))) as url:
        yield url


@pytest.fixture
def visit(browser: Any, url: str, shop: Shop) -> Iterator[Callable[..., Any]]:
    """Open a place of the page; at the end nothing may have failed, or reached elsewhere."""
    contexts, wrong = [], []

    def visit(place: str = "#/", at: str = url, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda sent: sent.url.startswith((at, "data:")) or wrong.append(sent.url)
        )
        page.on(
            "console",
            lambda said: wrong.append(said.text) if "Content Security" in said.text else None,
        )
        page.goto(f"{at}/{place}")
        settle(page)
        return page

    shop.asks.clear()
    yield visit
    shop.slow, shop.broken = 0.0, None
    for context in contexts:
        context.close()
    assert not wrong


def settle(page: Any) -> None:
    page.wait_for_selector("#view[aria-busy]", state="detached")
    page.wait_for_selector("#loading", state="hidden")


def go(page: Any, place: str) -> Any:
    """To another place of the page that is open."""
    page.evaluate("place => { location.hash = place; }", place)
    page.wait_for_timeout(20)
    settle(page)
    return page


def until(page: Any, expression: str) -> None:
    """Wait for it; the page's policy forbids the evaluation inside it that Playwright uses."""
    end = time.monotonic() + 5
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def titles(page: Any, inside: str = "#view") -> list[str]:
    return page.locator(f"{inside} .results .title a").all_inner_texts()


def hash_of(page: Any) -> str:
    return page.evaluate("location.hash")


def test_the_first_sight_is_what_is_popular_and_facts_of_the_model(visit: Any, shop: Shop) -> None:
    page = visit()
    assert titles(page)[:2] == ["Oak lamp no 0", "Oak chair no 1"] and len(titles(page)) == 12
    assert "model 0123456789ab" in page.inner_text("#facts") and "41 items" in page.inner_text(
        "#facts"
    )
    assert shop.asks[-1].history == () and page.title() == "recsys"


def test_items_are_found_while_typing_and_stale_answers_never_show(visit: Any, shop: Shop) -> None:
    page = visit()
    shop.slow = 0.15
    page.locator("#query").press_sequentially("rug", delay=200)
    until(page, "document.querySelector('.results a')?.textContent.includes('rug')")
    shop.slow = 0
    settle(page)
    assert all("rug" in title for title in titles(page)) and hash_of(page) == "#/search/rug"
    asked = [ask.text for ask in shop.asks if ask.kind == "search"]
    assert asked[-1] == "rug" and set(asked) <= {"r", "ru", "rug"}
    page.fill("#query", "no such thing")
    page.wait_for_selector(".nothing")
    assert "Nothing found" in page.inner_text("#view")
    page.fill("#query", "")
    page.wait_for_selector("text=Popular now")
    assert hash_of(page) == "#/"


def test_an_answer_that_comes_late_is_never_shown(visit: Any) -> None:
    page = visit()
    held: list[Any] = []
    page.route("**/v1/search", lambda route: route.continue_() if held else held.append(route))
    page.fill("#query", "rug")
    page.wait_for_selector("#loading", state="visible")
    while not held:
        page.wait_for_timeout(10)
    page.fill("#query", "chair")
    page.wait_for_selector("text=Items for “chair”")
    with contextlib.suppress(Exception):  # the browser has given it up
        held[0].continue_()
    page.wait_for_timeout(200)
    assert {title.split()[1] for title in titles(page)} == {"chair"}


def test_fast_typing_asks_once(visit: Any, shop: Shop) -> None:
    page = visit()
    page.locator("#query").press_sequentially("chair", delay=10)
    page.wait_for_selector("text=Items for “chair”")
    settle(page)
    assert [ask.text for ask in shop.asks if ask.kind == "search"] == ["chair"]


def test_an_id_in_the_search_opens_its_item_or_user(visit: Any) -> None:
    page = visit("#/search/i07")
    page.click("text=Item Oak desk no 7")
    page.wait_for_selector("h1:text('Oak desk no 7')")
    page.fill("#query", "u1")
    page.click("text=User u1")
    page.wait_for_selector("h1:text('User u1')")


def test_without_text_ids_are_looked_up_and_nothing_is_searched(browser: Any, visit: Any) -> None:
    shop = Shop(text=False)
    with served(make_app(OneModel(shop))) as url:
        page = visit("#/search/i07", at=url)
        assert page.locator(".opens a").all_inner_texts() == ["Item Oak desk no 7 →"]
        assert "id of an item or a user" in page.get_attribute("#query", "placeholder")
        page.fill("#query", "oak lamp")
        page.wait_for_selector("text=No such id")
    assert not [ask for ask in shop.asks if ask.kind == "search"]


def test_an_item_shows_its_fields_what_is_like_it_and_why(visit: Any, shop: Shop) -> None:
    page = visit("#/item/i03")
    assert page.inner_text("h1") == "Oak desk no 3" and page.title() == "Oak desk no 3 · recsys"
    facts = page.locator(".facts").inner_text().split("\n")
    assert facts[facts.index("price") + 1] == "13" and facts[facts.index("in stock") + 1] == "no"
    assert "Jan 5, 2024" in facts
    assert titles(page)[:2] == ["Oak desk no 7", "Oak desk no 11"]
    first = page.locator(".results > li").first
    assert "Mostly for its text and who chose it; shares category desk" in first.inner_text()
    assert first.locator(".much").all_inner_texts()[0].startswith("+0.340")
    bars = first.locator(".pulls .track i").evaluate_all("all => all.map(one => one.offsetWidth)")
    assert bars[0] > bars[1] > bars[2] > bars[3] > 0
    assert first.locator(".track.against").count() == 1  # the price
    assert shop.asks[-1].explain and shop.asks[-1].items == ("i03",)
    page.locator(".results .title a").nth(1).click()
    page.wait_for_selector("h1:text('Oak desk no 11')")
    assert page.evaluate("document.activeElement.tagName") == "H1"  # told to those who listen
    page.go_back()
    page.wait_for_selector("h1:text('Oak desk no 3')")


def test_a_user_shows_the_history_beside_what_is_recommended(visit: Any, shop: Shop) -> None:
    page = visit("#/user/u1")
    assert titles(page, ".history") == [
        "Oak lamp no 4", "Oak desk no 3", "Oak rug no 2", "Oak chair no 1", "Oak lamp no 0",
    ]  # fmt: skip
    assert "posted since" in page.locator(".history li").first.inner_text()
    assert "Jan 1, 2024, 04:00" in page.inner_text(".history")
    best = page.locator("[aria-label=Recommendations] .results > li").first
    assert "Because of Oak desk no 3 and Oak rug no 2" in best.inner_text()
    best.locator(".title a").focus()
    strong = page.locator(".history li.strong .title a").all_inner_texts()
    assert strong == ["Oak desk no 3", "Oak rug no 2"]
    assert shop.asks[-1].drop_seen
    page.check("#seen")
    settle(page)
    assert not shop.asks[-1].drop_seen and hash_of(page) == "#/user/u1?seen=1"


def test_a_fallback_is_told(visit: Any) -> None:
    page = visit("#/user/nobody")
    assert "User 'nobody' is unknown." in page.inner_text(".note")
    assert "Not known to this model." in page.inner_text(".head")
    assert "No history" in page.inner_text(".history")


def test_filters_and_dials_stand_in_the_address_and_in_the_question(visit: Any, shop: Shop) -> None:
    page = visit()
    page.click(".chip:text('lamp')")
    settle(page)
    assert {title.split()[1] for title in titles(page)} == {"lamp"}
    page.click(".chip:text('rug')")
    page.get_by_label("price from").fill("20")
    page.get_by_label("price to").fill("30.5")
    page.get_by_label("price to").press("Enter")
    page.get_by_label("published from").fill("2024-01-02")
    settle(page)
    page.click("[data-name='f.in_stock'][data-value='true']")
    settle(page)
    asked = shop.asks[-1].filter
    assert asked.equals == {"category": ("lamp", "rug"), "in_stock": (True,)}
    assert asked.ranges == {"price": (20, 30.5), "published": (1704153600, None)}
    assert "f.category=lamp&f.category=rug" in hash_of(page)
    assert page.inner_text("#active") == "4 set"
    before = titles(page)
    page.reload()
    settle(page)
    rugs, lamps = ["Oak rug no 10", "Oak rug no 14"], ["Oak lamp no 16", "Oak lamp no 20"]
    assert titles(page) == before == rugs + lamps
    page.click("#reset")
    settle(page)
    assert hash_of(page) == "#/" and shop.asks[-1].filter.empty
    typed = page.locator("input[data-name='f.tags']")
    typed.fill("steel")
    typed.press("Enter")
    page.wait_for_selector("text=Nothing found")
    assert shop.asks[-1].filter.equals == {"tags": ("steel",)}


def test_dials_ask_for_longer_lists_where_there_are_no_pages(visit: Any, shop: Shop) -> None:
    page = visit("#/item/i00?diversity=0.4&popularity=-0.5&exact=1")
    ask = shop.asks[-1]
    assert (ask.diversity, ask.popularity, ask.exact, ask.paged) == (0.4, -0.5, True, False)
    assert page.inner_text("#popularity-said") == "−0.5" and page.is_checked("#exact")
    page.focus("#diversity")
    page.keyboard.press("Home")
    until(page, "!location.hash.includes('diversity')")
    page = visit("#/?popularity=1")
    assert len(titles(page)) == 12
    page.get_by_role("button", name="More").click()
    until(page, "document.querySelectorAll('.results > li').length === 24")
    assert shop.asks[-1].k == 24 and len(set(titles(page))) == 24


def test_more_goes_on_where_the_page_ended(visit: Any) -> None:
    page = visit()
    for length in (24, 36, 41):
        page.get_by_role("button", name="More").click()
        until(page, f"document.querySelectorAll('.results > li').length === {length}")
        assert page.evaluate("document.activeElement.closest('li') !== null")
    assert page.get_by_role("button", name="More").count() == 0 and len(set(titles(page))) == 41
    assert page.locator(".rank").all_inner_texts() == [str(n) for n in range(1, 42)]
    assert page.inner_text("#said") == "5 more, 41 in all"


def test_a_model_that_was_replaced_meanwhile_is_told(visit: Any, shop: Shop) -> None:
    page = visit()
    page.route("**/v1/recommendations", lambda route: route.continue_(
        post_data=json.dumps({**route.request.post_data_json, "cursor": "gone"})))  # fmt: skip
    page.get_by_role("button", name="More").click()
    page.wait_for_selector("text=The model was replaced while you read")
    page.unroute("**/v1/recommendations")
    page.click("text=Begin anew")
    settle(page)
    assert page.inner_text("#alert") == "" and len(titles(page)) == 12


def test_all_of_it_by_keyboard(visit: Any) -> None:
    page = visit()
    press = page.keyboard.press
    at = lambda: page.evaluate("document.activeElement.id || document.activeElement.textContent")  # noqa: E731
    press("Tab")
    assert at() == "skip" and page.locator("#skip").bounding_box()["y"] >= 0
    press("Enter")
    assert at() == "content"
    press("/")
    assert at() == "query"
    page.keyboard.type("lamp")
    page.wait_for_selector("text=Items for “lamp”")
    settle(page)
    press("ArrowDown")
    assert at() == "Oak lamp no 0"
    press("ArrowDown")
    press("ArrowDown")
    assert at() == "Oak lamp no 8"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("ArrowUp")
    assert at() == "Oak lamp no 4"
    press("End")
    assert at() == "Oak lamp no 36"
    press("Home")
    press("Enter")
    page.wait_for_selector("h1:text('Oak lamp no 0')")
    settle(page)
    press("ArrowDown")
    assert at() == "Oak lamp no 4"
    press("Tab")
    press("Enter")  # the reason
    assert page.locator(".why").first.get_attribute("open") is None
    press("Escape")
    assert at() == "query"
    page.keyboard.type("rug")
    page.wait_for_selector("text=Items for “rug”")
    press("Escape")
    assert page.input_value("#query") == "" and hash_of(page) == "#/"
    for key in ("Tab",) * 3:
        press(key)
    press("Enter")
    assert page.get_attribute("html", "data-theme") == "dark"


def test_controls_have_names_and_one_heading_leads(visit: Any) -> None:
    page = visit()
    for place in ("#/", "#/search/lamp", "#/item/i03", "#/user/u1", "#/model"):
        go(page, place)
        nameless = page.evaluate(
            """[...document.querySelectorAll('button, a, input, summary')].filter(one =>
                one.checkVisibility() && !(one.labels?.length || one.ariaLabel
                || one.textContent.trim())).map(one => one.outerHTML)"""
        )
        assert nameless == []
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == page.locator("header").count() == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
        assert len(ids) == len(set(ids))
    assert page.locator("[aria-current=page]").inner_text() == "Model"


CONTRAST = """() => {
  const linear = (c) => { c /= 255; return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = (one) => { for (; one; one = one.parentElement) {
    const found = rgb(getComputedStyle(one).backgroundColor); if (found[3] === 255) return found; }
    return [255, 255, 255, 255]; };
  const bad = [];
  for (const one of document.querySelectorAll('body *')) {
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const seen = one.checkVisibility() && !one.closest('.hidden, .skip, svg');
    if (!seen || !(own || one.matches('input'))) continue;
    const a = light(rgb(getComputedStyle(one).color)), b = light(ground(one));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`${ratio} ${one.className || one.tagName} ${one.textContent}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(visit: Any, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    for place in ("#/?f.category=lamp", "#/item/i03", "#/user/u1", "#/user/nobody", "#/model"):
        go(page, place)
        assert page.evaluate(CONTRAST) == [], place


def test_dark_follows_the_system_until_told_otherwise(visit: Any) -> None:
    page = visit(color_scheme="dark")
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = ground()
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    light = ground()
    assert light != dark and page.get_attribute("#theme", "aria-pressed") == "false"
    page.reload()
    settle(page)
    assert ground() == light  # kept
    page.emulate_media(color_scheme="light")
    assert ground() == light
    assert page.evaluate("JSON.stringify({...localStorage})") == '{"theme":"light"}'


def test_an_error_is_told_with_its_request_and_can_be_tried_again(visit: Any, shop: Shop) -> None:
    shop.broken = ZeroDivisionError("boom")
    page = visit("#/item/i03")
    alert = page.locator("#alert")
    assert "mistake of ours" in alert.inner_text() and "(request " in alert.inner_text()
    assert page.locator(".ghost").count() == 0
    shop.broken = None
    page.click("text=Try again")
    settle(page)
    assert alert.inner_text() == "" and len(titles(page)) == 9
    page = visit("#/item/nothing")
    assert "There is no item 'nothing'." in page.inner_text("#alert")


def test_a_service_that_is_gone_is_told(visit: Any) -> None:
    page = visit()
    page.context.set_offline(True)
    page.fill("#query", "lamp")
    page.wait_for_selector("text=The service cannot be reached")
    page.context.set_offline(False)
    page.click("text=Try again")
    page.wait_for_selector("text=Items for “lamp”")


def test_a_key_is_asked_for_and_kept_in_memory_only(browser: Any, visit: Any) -> None:
    key, hashed = make_key("read")
    with served(make_app(OneModel(Shop()), keys=Keys((hashed,)))) as url:
        page = visit("#/item/i03", at=url)
        assert page.is_visible("#key-form") and titles(page) == []
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=This key is not valid.")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:text('Oak desk no 3')")
        assert not page.is_visible("#key-form")
        kept = page.evaluate(
            "[document.cookie, JSON.stringify([localStorage, sessionStorage]), location.href,"
            " document.documentElement.outerHTML, document.querySelector('#key').value]"
        )
        assert not any(key in one for one in kept)
        page.reload()
        page.wait_for_selector("#key-form", state="visible")


@pytest.mark.parametrize("place", ["#/search/img", f"#/item/{quote(EVIL_ID, safe='')}", "#/"])
def test_what_an_item_is_called_is_never_more_than_text(visit: Any, place: str) -> None:
    page = visit(place)
    for _ in range(3):
        if page.get_by_role("button", name="More").count():
            page.get_by_role("button", name="More").click()
            settle(page)
    assert page.locator("text=onerror").count() >= 1
    assert page.evaluate("window.hacked") is None
    assert page.locator("#view img, #view script, #view b").count() == 0
    link = page.locator(f"#view .results a:text-is({json.dumps(EVIL)})")
    if link.count():
        link.first.click()
        page.wait_for_selector("h1:text('onerror')")
        settle(page)
        assert page.inner_text(".head .id") == EVIL_ID and page.evaluate("window.hacked") is None


def test_a_search_for_markup_is_shown_as_it_was_typed(visit: Any) -> None:
    page = visit()
    page.fill("#query", EVIL + " & 100% #/?")
    page.wait_for_selector(".nothing")
    assert EVIL + " & 100% #/?" in page.inner_text("#view")
    page.reload()
    settle(page)
    assert page.input_value("#query") == EVIL + " & 100% #/?"
    assert page.evaluate("window.hacked") is None


def test_a_narrow_screen_needs_no_scrolling_sideways(visit: Any) -> None:
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True)
    for place in ("#/", "#/search/oak", "#/item/i03", "#/user/u1", "#/model"):
        _fits(go(page, place))
    go(page, "#/item/i03")
    assert not page.is_visible("#diversity")  # folded away
    page.click("#controls summary")
    assert page.is_visible("#diversity")
    _fits(page)


def _fits(page: Any) -> None:
    wide = "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    assert page.evaluate(wide) == [360, 360, 360]
    outside = page.evaluate(
        "[...document.querySelectorAll('main *, header *')].filter(one => one.checkVisibility() &&"
        " !one.closest('.hidden, .skip') && one.getBoundingClientRect().right > 360.5)"
        ".map(one => one.outerHTML.slice(0, 80))"
    )
    assert outside == []


def test_the_facts_of_the_model_are_there_to_be_read(visit: Any) -> None:
    page = visit("#/model")
    facts = dict(
        zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True)
    )
    expected = {
        "Version": "0123456789ab", "Knows events until": "Jan 1, 2024, 00:00", "Items": "41",
        "Index": "hnsw", "Recall of the index at 100": "99.8 %", "Recall of neighbours": "100.0 %",
        "Share of users": "100 %", "Swaps": "2", "Failed loads": "1", "Reads": "text",
        "Last error": "the digest of index.bin differs",
    }  # fmt: skip
    assert expected.items() <= facts.items()
    assert not page.is_visible("#controls")


def test_the_page_is_small_and_asks_nobody_else() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(PAGE.iterdir()))
    assert len(text.encode()) < 80_000
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bstyle=|\son\w+=\"", text
    )
