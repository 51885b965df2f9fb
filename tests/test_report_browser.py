"""The report in a real browser: headless Chromium, without network."""

import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from synthetic_results import synthetic_results

from cmi_lightning.report.page import write_report

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver import ActionChains, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    made = synthetic_results(folder, tasks=2, methods=3, images=40, examples=2)
    evil = replace(made.cells[0], label="</script><script>window.injected = 1</script>")
    made = replace(made, cells=(evil, *made.cells[1:]))
    write_report(made, folder)
    page = (folder / "report.html").as_uri()
    return {"title": made.title, "page": page, "folder": folder}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(started: Any, results: dict[str, Any]) -> Iterator[Any]:
    """A browser on the freshly opened report; the test fails if the page complains."""
    _screen(started, 1280)
    _scheme(started, "light")
    started.get(results["page"])
    started.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    yield started
    assert started.get_log("browser") == []


def _screen(driver: Any, width: int, mobile: bool = False) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": mobile},
    )


def _scheme(driver: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    features.append({"name": "prefers-reduced-motion", "value": "reduce"})  # clicks need no wait
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def _wait(driver: Any, condition: Callable[[], bool]) -> None:
    WebDriverWait(driver, 60).until(lambda _: condition())


def _show(driver: Any, element: Any) -> None:
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)


def _pick(driver: Any, **chosen: str) -> None:
    """Choose options by the names of their groups."""
    for name, value in chosen.items():
        group = name.replace("_", "-")
        driver.execute_script(
            f"document.querySelector('[name={group}][value=\"{value}\"]').click()"
        )


def _sources(driver: Any, selector: str) -> list[str]:
    images = driver.find_elements(By.CSS_SELECTOR, f"{selector} img")
    return [image.get_attribute("src") for image in images]


def _embedded(results: dict[str, Any], *paths: str) -> list[str]:
    """The files of images as the page embeds them."""
    files = [results["folder"] / "cells" / f"{path}/00001.png" for path in paths]
    return [f"data:image/png;base64,{b64encode(f.read_bytes()).decode()}" for f in files]


def _press(driver: Any, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def _focused(driver: Any) -> Any:
    return driver.switch_to.active_element


def test_opens_without_an_error_and_without_the_network(browser, results):
    assert browser.title == results["title"]
    assert browser.execute_script("return window.injected") is None
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [url for url in asked if not url.startswith("data:")] == []
    broken = browser.execute_script(
        "return [...document.images].filter((i) => !i.hidden && i.src && !i.naturalWidth).length"
    )
    assert broken == 0
    drawn = browser.execute_script(
        "return getComputedStyle(document.querySelector('.plate img')).imageRendering"
    )
    assert drawn == "pixelated"


def test_policy_stops_what_is_not_the_reports_own(started, results):
    started.get(results["page"])
    started.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.foreign = 1';"
        "document.body.append(s)"
    )
    assert started.execute_script("return window.foreign") is None
    refused = "Content Security Policy"  # the log may lag behind
    _wait(started, lambda: any(refused in e["message"] for e in started.get_log("browser")))


def _place(driver: Any) -> float:
    """Where the line of the first slider is, as a part of its image's width."""
    return driver.execute_script(
        "const stage = document.querySelector('.stage').getBoundingClientRect();"
        "const line = document.querySelector('.handle').getBoundingClientRect();"
        "return (line.left + line.width / 2 - stage.left) / stage.width"
    )


def test_slider_moves_by_mouse(browser):
    stage = browser.find_element(By.CSS_SELECTOR, ".stage")
    _show(browser, stage)
    width = stage.size["width"]
    assert _place(browser) == pytest.approx(0.5, abs=0.01)
    clip = "return getComputedStyle(document.querySelector('.before')).clipPath"
    before = browser.execute_script(clip)
    ActionChains(browser).move_to_element(stage).click_and_hold().move_by_offset(
        round(width * 0.3), 0
    ).release().perform()
    assert _place(browser) == pytest.approx(0.8, abs=0.02)
    assert browser.execute_script(clip) != before
    ActionChains(browser).move_to_element_with_offset(
        stage, round(-0.4 * width), 10
    ).click().perform()
    assert _place(browser) == pytest.approx(0.1, abs=0.02)


def test_slider_moves_by_touch(browser):
    stage = browser.find_element(By.CSS_SELECTOR, ".stage")
    _show(browser, stage)
    box = browser.execute_script(
        "const r = arguments[0].getBoundingClientRect(); return [r.left, r.top, r.width, r.height]",
        stage,
    )
    left, y, width = box[0], box[1] + box[3] / 2, box[2]
    for kind, part in (("Start", 0.5), ("Move", 0.6), ("Move", 0.75), ("End", 0)):
        points = [{"x": left + part * width, "y": y}] if part else []
        event = {"type": f"touch{kind}", "touchPoints": points}
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)
    assert _place(browser) == pytest.approx(0.75, abs=0.02)


def test_slider_moves_by_keys_and_shows_its_focus(browser):
    slider = browser.find_element(By.CSS_SELECTOR, ".stage input")
    image = browser.find_element(By.CSS_SELECTOR, "#compare [data-compare=image] input:checked")
    _show(browser, slider)
    browser.execute_script("arguments[0].focus()", image)
    _press(browser, Keys.TAB)
    assert _focused(browser) == slider
    outline = "return getComputedStyle(document.querySelector('.stage')).outlineStyle"
    assert browser.execute_script(outline) == "solid"
    for key, place in (
        (Keys.ARROW_RIGHT, 0.51),
        (Keys.ARROW_LEFT, 0.50),
        (Keys.HOME, 0.0),
        (Keys.END, 1.0),
        (Keys.ARROW_DOWN, 0.99),
    ):
        _press(browser, key)
        assert _place(browser) == pytest.approx(place, abs=0.005)
    assert slider.get_attribute("aria-valuetext") == "99 % measurement, 1 % CMI+DPS"


def test_slider_shows_what_is_chosen(browser, results):
    _pick(browser, compare_before="base", compare_method="2", compare_image="1")
    paths = [f"inpaint_random/ΠGDM-{variant}/restored" for variant in ("cmi", "base")]
    assert _sources(browser, ".stage")[:2] == _embedded(results, *paths)  # after, before
    tags = [e.get_attribute("textContent") for e in browser.find_elements(By.CLASS_NAME, "tag")]
    assert tags[:2] == ["ΠGDM", "CMI+ΠGDM"]


def test_figure_shows_what_is_chosen(browser, results):
    _pick(browser, figure_method="2", figure_image="1")
    paths = [f"inpaint_box/none-base/{kind}" for kind in ("truth", "measurement")]
    paths += [f"inpaint_box/ΠGDM-{variant}/restored" for variant in ("base", "cmi", "equal")]
    shown = _sources(browser, ".line[data-task='1'] .tile:not([hidden])")
    assert shown == _embedded(results, *paths)
    heads = browser.find_elements(By.CSS_SELECTOR, ".head [data-name]")
    assert [head.text for head in heads] == ["ΠGDM", "CMI+ΠGDM", "ΠGDM, equal passes"]
    assert browser.find_element(By.CSS_SELECTOR, ".line [data-id]").text == "00001"


def _column(driver: Any, column: int) -> list[list[str]]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#results tbody')].map((body) =>"
        "[...body.querySelectorAll('tr:not(.task)')].map((row) => row.children[arguments[0]])"
        ".map((cell) => cell.dataset.value ?? cell.textContent.trim()))",
        column,
    )


@pytest.mark.parametrize("way", ["mouse", Keys.ENTER, Keys.SPACE], ids=["mouse", "enter", "space"])
def test_table_sorts_both_ways_and_back(browser, way):
    header = browser.find_elements(By.CSS_SELECTOR, "#results th.js-sort")[4]  # some are absent
    button = header.find_element(By.TAG_NAME, "button")
    before = _column(browser, 4)
    expected = [sorted(map(float, filter(None, body))) for body in before]
    for order in ("ascending", "descending", "none"):
        if way == "mouse":
            _show(browser, button)
            button.click()
        else:
            browser.execute_script("arguments[0].focus()", button)
            _press(browser, way)
        assert header.get_attribute("aria-sort") == order
        now = _column(browser, 4)
        if order == "none":
            assert now == before
            continue
        for body, wanted in zip(now, expected, strict=True):
            assert body[-1] == ""  # the measurement, which has no such number
            read = [float(v) for v in body[:-1]]
            assert read == (wanted if order == "ascending" else wanted[::-1])
    others = browser.find_elements(By.CSS_SELECTOR, "#results th[aria-sort=ascending]")
    assert others == []


def test_table_sorts_by_name(browser):
    browser.find_element(By.CSS_SELECTOR, "#results th button").click()
    names = _column(browser, 0)
    assert names[0].index("CMI+DPS") < names[0].index("DPS") < names[0].index("measurement A⁺y")


def test_filter_and_comparison(browser):
    shown = "return [...document.querySelectorAll('#results tbody')].map((b) => b.offsetHeight > 0)"
    choice = Select(browser.find_element(By.ID, "task-filter"))
    tasks = ["random inpainting, 90 %", "box inpainting, 14×14"]
    assert [option.text for option in choice.options] == ["all", *tasks]
    choice.select_by_index(2)
    assert browser.execute_script(shown) == [False, True]
    choice.select_by_index(0)
    assert browser.execute_script(shown) == [True, True]

    cell = browser.find_element(By.CSS_SELECTOR, "tr.cmi td[data-base]")
    _show(browser, cell)
    colour = cell.value_of_css_property("background-color")
    first = cell.text
    browser.execute_script("document.querySelector('#against input[value=base]').focus()")
    _press(browser, Keys.ARROW_RIGHT)
    assert cell.text != first
    if cell.get_attribute("data-base") != cell.get_attribute("data-equal"):
        assert cell.value_of_css_property("background-color") != colour


def test_histogram_metric_and_curves_are_chosen(browser):
    shown = "return [...document.querySelectorAll('[data-shown]')].map((p) => p.offsetHeight > 0)"
    assert browser.execute_script(shown) == [True, False, False]
    browser.execute_script("document.querySelector('[name=histogram]').focus()")
    _press(browser, Keys.ARROW_RIGHT)
    assert browser.execute_script(shown) == [False, True, False]

    line = browser.find_element(By.CSS_SELECTOR, ".curve.m1")
    assert line.value_of_css_property("display") != "none"
    button = browser.find_element(By.CSS_SELECTOR, ".legend [data-group=m1]")
    _show(browser, button)
    button.click()
    assert line.value_of_css_property("display") == "none"
    assert button.get_attribute("aria-pressed") == "false"


def _brightness(driver: Any) -> float:
    colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    numbers = [float(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(numbers) / len(numbers)


def test_dark_mode_by_system_and_by_button(browser, results):
    toggle = browser.find_element(By.ID, "theme")
    assert _brightness(browser) > 200
    assert toggle.get_attribute("aria-pressed") == "false"
    _scheme(browser, "dark")
    assert _brightness(browser) < 60
    _wait(browser, lambda: toggle.get_attribute("aria-pressed") == "true")  # told by an event
    toggle.click()
    assert _brightness(browser) > 200
    browser.get(results["page"])
    assert _brightness(browser) > 200  # remembered
    browser.execute_script("document.querySelector('#theme').focus()")
    _press(browser, Keys.SPACE)
    assert _brightness(browser) < 60


CONTRAST = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map(
    (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .99) return c;
  }
};
return [...document.querySelectorAll(arguments[0])].filter((e) => e.offsetHeight).map((e) => {
  const a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, scheme):
    _scheme(browser, scheme)
    ratios = browser.execute_script(
        CONTRAST, "p, h1, h2, h3, td .mean, td .diff, th, .key, .counts span, small, figcaption, a"
    )
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_does_not_scroll_sideways(browser, results, width):
    _screen(browser, width, mobile=width < 1000)
    browser.get(results["page"])
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    page, inner = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert page <= inner <= width
    if width == 360:
        assert inner == 360
        box, table = browser.execute_script(
            "const b = document.querySelector('.scroll');"
            "b.scrollLeft = 200; const t = b.querySelector('tr.cmi th');"
            "return [b.getBoundingClientRect().left, t.getBoundingClientRect().left]"
        )
        assert browser.execute_script("return document.querySelector('.scroll').scrollLeft") == 200
        assert abs(box - table) <= 2  # the first column stays


def test_keyboard_reaches_everything_with_visible_focus(browser):
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('button, summary, select, .stage input, .scroll')]"
        ".filter((e) => e.offsetHeight).length"
    )
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    seen, visible = [], []
    for _ in range(wanted * 3):
        _press(browser, Keys.TAB)
        here = browser.execute_script(
            "const e = document.activeElement; if (e === document.body) return null;"
            "const shown = e.closest('.stage') ?? (e.type === 'radio' ? e.nextElementSibling : e);"
            "const counted = e.matches('button, summary, select, .stage input, .scroll');"
            "return [counted, getComputedStyle(shown).outlineStyle, e.outerHTML.slice(0, 80)]"
        )
        if here is None:
            break
        seen.append(here[0])
        visible.append((here[1] in ("solid", "auto"), here[2]))
    assert sum(seen) == wanted
    assert [name for ok, name in visible if not ok] == []


def test_without_scripts_the_table_and_images_are_there(started, results):
    started.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        started.get(results["page"])
        started.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        shown = started.execute_script(
            "return ['#results tr.cmi td', '.plate img', '.bars svg'].map((s) =>"
            "[...document.querySelectorAll(s)].filter("
            "(e) => e.getBoundingClientRect().height).length)"
        )
        assert shown[0] == 2 * 3 * 7
        assert shown[1] == 2 * 5
        assert shown[2] == 2 * 3 * 3
        assert not started.find_element(By.CSS_SELECTOR, "#compare").is_displayed()
    finally:
        started.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
