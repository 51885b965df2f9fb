"""The page: what it asks of the core, what it keeps to itself, and itself in a browser."""

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_report_browser import CHROMIUM, DRIVER, FLAGS

from cmi_lightning.cli import main
from cmi_lightning.errors import InputError
from cmi_lightning.studio import work
from cmi_lightning.studio.work import Choice

RNG = np.random.default_rng(0)
PHOTOGRAPH = Image.fromarray(RNG.integers(0, 256, (48, 64, 3), np.uint8))
QUICK = {"side": 64, "steps": 2}


def painted(size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("L", size)
    image.paste(255, (10, 10, 30, 25))
    return image


# What it asks of the core ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"damage": "torn"},
        {"method": "os.system"},
        {"method": "cmi_lightning.guidance.DPS"},
        {"missing": "../../etc/passwd"},
        {"side": 4096},
        {"steps": 10**9},
        {"steps": "5; ls"},
        {"samples": -1},
        {"sigma": float("nan")},
        {"factor": [2]},
        {"kernel": {"class_path": "x"}},
    ],
)
def test_nothing_but_what_the_page_offers(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))} must be"):
        Choice(**options)


@pytest.mark.parametrize("kind", work.KERNELS)
def test_kernels(kind):
    wide, narrow = (Choice(damage="blurry", kernel=kind, width=w).kernel_values() for w in (4, 1))
    for values in (wide, narrow):
        assert float(values.sum()) == pytest.approx(1)
        assert torch.allclose(values, values.flip(0, 1), atol=1e-6)  # no shift
    assert float(wide.max()) < float(narrow.max())
    if kind == "motion":
        level = Choice(damage="blurry", kernel=kind, width=4, angle=0).kernel_values()
        assert int((level.sum(1) > 1e-3).sum()) == 1  # one row


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"side": 64}, (64, 48)),
        ({"side": 128}, (64, 48)),  # never enlarged
        ({"side": 64, "damage": "small", "factor": 3}, (63, 48)),
        ({"side": 64, "damage": "small", "factor": 2, "sound": False}, (32, 24)),
    ],
)
def test_the_size_that_is_restored(options, size):
    assert Choice(**options).fitted(PHOTOGRAPH).size == size


def test_masks():
    known = Choice(missing="painted").mask((64, 48), painted())
    assert int((~known).sum()) == 20 * 15
    assert float((~Choice(missing="random").mask((50, 40))).float().mean()) == pytest.approx(0.9)
    for nothing in (None, Image.new("L", (64, 48))):
        with pytest.raises(InputError, match="Nothing is painted"):
            Choice(missing="painted").mask((64, 48), nothing)
    with pytest.raises(InputError, match="Everything is painted"):
        Choice(missing="painted").mask((64, 48), Image.new("L", (64, 48), 255))
    with pytest.raises(InputError, match="too narrow"):
        Choice(side=64).fitted(Image.new("RGB", (1000, 20)))


@pytest.mark.parametrize(
    "options",
    [
        {"damage": "missing", "method": "dps+cmi"},
        {"damage": "blurry", "width": 1.0},
        {"damage": "blurry", "kernel": "disc", "sound": False},
        {"damage": "small", "sound": False, "samples": 2},
        {"damage": "noisy", "sound": False, "estimate": True, "method": "pigdm"},
    ],
    ids=["missing", "soft", "disc", "small", "noisy"],
)
def test_the_command_and_the_code_give_the_pages_pixels(tmp_path, monkeypatch, options):
    choice = Choice(**{**QUICK, "side": 64, **options})
    (*_, last) = work.restore(choice, PHOTOGRAPH, painted())
    assert last.result is not None
    shown = np.asarray(last.result.image)
    choice.files(tmp_path, PHOTOGRAPH, painted())
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(choice.as_python(), scope)
    assert np.array_equal(np.asarray(scope["result"].image), shown)
    words = shlex.split(choice.as_command().replace("\\\n", " "))
    quiet = ["--trainer.logger=false", "--trainer.callbacks=[ImageWriter]"]
    quiet += ["--trainer.accelerator=cpu", "--trainer.default_root_dir=out"]
    assert main([*words[1:], *quiet]) == 0
    assert np.array_equal(np.asarray(Image.open("out/restored/photograph.png")), shown)


def test_pictures_on_the_way_are_few(monkeypatch):
    """One in a second: making and sending it takes 4 % of the time."""
    now = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(work.time, "monotonic", lambda: float(next(now)))
    steps = list(work.restore(Choice(**{**QUICK, "steps": 12, "missing": "box"}), PHOTOGRAPH))
    assert 2 <= len(steps) <= 5
    assert steps[-1].result is not None


# What it keeps to itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The page's address and process, started as a person does; it leaves nothing behind."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "cmi_lightning", "studio", "--port", "0"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told.startswith("The studio is at http://127.0.0.1:"), told
        assert len(list(temporary.glob("cmi-lightning-studio-*"))) == 1
        yield told.split()[4], process.pid
        process.terminate()
        process.wait(60)
    assert not list(temporary.glob("cmi-lightning-studio-*"))


@pytest.fixture(scope="module")
def address(studio) -> str:
    return studio[0]


def _get(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_this_machine_alone(studio):
    import psutil

    connections = psutil.Process(studio[1]).net_connections("tcp")
    listening = [c.laddr.ip for c in connections if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


def test_no_file_of_the_machine_is_served(address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    here = Path(__file__).resolve()
    assert _get(address) == 200
    for path in ("/etc/passwd", here, tmp_path / "secret.txt", "../../../etc/passwd", "README.md"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            assert _get(f"{address}{route}{path}") in (403, 404, 405), (route, path)


def test_there_is_no_other_way_in(address):
    """No named endpoint, and nothing that takes a path for a picture."""
    with urllib.request.urlopen(f"{address}gradio_api/info") as answer:
        info = json.load(answer)
    assert not info["named_endpoints"]
    assert not info["unnamed_endpoints"]


def test_uploads_are_bounded(address):
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body += bytes(21 * 2**20) + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{address}gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    try:
        with urllib.request.urlopen(request) as answer:
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (urllib.error.URLError, ConnectionError):  # it hung up
        code = 413
    assert code == 413


def test_an_example_is_sound_whichever_is_chosen():
    """The editor may tell of the last example after the next one is chosen."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from cmi_lightning.studio.pictures import edited, is_example, photograph

    assert all(is_example(edited(photograph(name))) for name in ("beach1", "water8"))
    assert not is_example(edited(PHOTOGRAPH))
    assert not is_example(edited(photograph("beach1").rotate(180)))
    assert not is_example({"background": None, "layers": [], "composite": None})


# In a browser ----------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
PATIENCE = 60  # seconds


class Page:
    """A tab with the page, and what a person does there."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address
        driver.get(address)
        self.wait(lambda: self.one("#editor canvas") and self.one("#run"))

    def one(self, selector: str) -> Any:
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found else None

    def wait(self, what: Any) -> Any:
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            try:
                if value := what():
                    return value
            except Exception as error:  # an element that is replaced just now
                if "stale" not in str(error):
                    raise
            time.sleep(0.1)
        raise AssertionError(f"waited in vain: {self.status()}")

    def status(self) -> str:
        return str(self.driver.execute_script("return document.querySelector('#status').innerText"))

    def click(self, selector: str) -> None:
        element = self.wait(lambda: self.one(selector))
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        places: list[Any] = [None]  # until it stands still
        self.wait(lambda: places.append(element.rect) or places[-1] == places[-2])
        element.click()

    def choose(self, group: str, text: str) -> None:
        def chosen() -> bool:
            for label in self.driver.find_elements("css selector", f"{group} label"):
                if label.text.strip() == text:
                    center = "arguments[0].scrollIntoView({block: 'center'})"
                    self.driver.execute_script(center, label)
                    label.click()
                    return bool(label.find_element("css selector", "input").is_selected())
            return False

        self.wait(chosen)

    def number(self, group: str, value: int) -> None:
        box = self.wait(lambda: self.one(f"{group} input[type=number]"))
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true}));",
            *(box, value),
        )

    def quick(self, steps: int = 2) -> None:
        if not self.one("#steps input[type=number]"):
            self.click("#method button")
            self.wait(lambda: self.one("#steps input[type=number]"))
        self.number("#steps", steps)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # The editor draws by WebGL.
    flags = [*(f for f in FLAGS if f != "--disable-gpu"), "--enable-unsafe-swiftshader"]
    for flag in (*flags, "--use-angle=swiftshader", "--window-size=1280,1400"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    made.set_script_timeout(60)
    yield made
    made.quit()


@needs_browser
def test_a_box_is_restored_and_compared(driver, address):
    page = Page(driver, address)
    foreign = driver.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
        ".filter((name) => /^https?:/.test(name) && !name.startsWith(arguments[0]))",
        address,
    )
    assert foreign == []  # offline
    page.choose("#missing", "A box in the middle")
    page.quick()
    page.click("#run")
    page.wait(lambda: "PSNR" in page.status())
    assert "96×128" in page.status() or "128×96" in page.status()
    images = page.wait(
        lambda: len(found := driver.find_elements("css selector", "#compare img")) >= 2 and found
    )
    page.click("#copy button")
    page.wait(lambda: page.one("#command") and "num_steps 2" in page.one("#command").text)
    assert "cmi-lightning predict" in page.one("#command").text
    assert "restore(" in page.wait(lambda: page.one("#python")).text
    # The slider's handle moves what is seen.
    before = page.one("#compare").screenshot_as_png
    from selenium.webdriver import ActionChains

    handle = page.one("#compare .slider-wrap, #compare [role=slider], #compare .inner")
    ActionChains(driver).drag_and_drop_by_offset(handle or images[0], 100, 0).perform()
    page.wait(lambda: page.one("#compare").screenshot_as_png != before)


@needs_browser
def test_paint_over_a_photograph_of_ones_own(driver, address, tmp_path):
    from selenium.webdriver import ActionChains

    PHOTOGRAPH.save(tmp_path / "own.png")
    page = Page(driver, address)
    page.quick()
    page.click("#run")
    page.wait(lambda: "Nothing is painted" in page.status())
    text = page.one("body").text
    assert not any(word in text for word in ("Traceback", "Error:", ".py"))
    clear = page.one("#editor [aria-label='Clear canvas'], #editor [title='Clear canvas']")
    if clear:
        clear.click()
    upload = page.wait(lambda: page.one("#editor input[type=file]"))
    upload.send_keys(str(tmp_path / "own.png"))
    # The page has it, and says so by the tick that it takes away; the editor has drawn it.
    sound = "[...document.querySelectorAll('label')].find((e) => /is sound/.test(e.innerText))"
    page.wait(lambda: not driver.execute_script(f"return {sound}.querySelector('input').checked"))
    canvas, seen = page.wait(lambda: page.one("#editor canvas")), [b""]
    page.wait(lambda: seen.append(canvas.screenshot_as_png) or seen[-1] == seen[-2])
    strokes = ActionChains(driver).move_to_element_with_offset(canvas, -20, 0).click_and_hold()
    for _ in range(5):
        strokes = strokes.move_by_offset(8, 2)
    strokes.release().perform()
    page.click("#run")
    page.wait(lambda: "64×48" in page.status())


@needs_browser
def test_a_run_is_cancelled_and_another_tab_waits_its_turn(driver, address):
    page = Page(driver, address)
    page.choose("#missing", "90 % at random")
    page.quick(1000)
    page.click("#run")
    page.wait(lambda: "Step" in page.status())
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = Page(driver, address)
    second.choose("#missing", "A box in the middle")
    second.quick()
    second.click("#run")
    second.wait(lambda: second.status().startswith("queue: 1/1"))
    other = driver.current_window_handle
    driver.switch_to.window(first)
    page.click("#stop")
    page.wait(lambda: "Cancelled" in page.status())
    driver.switch_to.window(other)
    second.wait(lambda: "PSNR" in second.status())
    driver.close()
    driver.switch_to.window(first)
    assert "Cancelled" in page.status()


@needs_browser
def test_on_a_phone_and_by_keyboard_alone(driver, address):
    """From the example to the comparison: Tab, arrows, Enter and digits."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(driver, address)
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360

        def press(*keys: str) -> None:
            for key in keys:
                ActionChains(driver).send_keys(key).perform()

        def reach(selector: str) -> None:
            for _ in range(80):
                if driver.execute_script(
                    "return document.activeElement.matches(arguments[0]"
                    " + ', ' + arguments[0] + ' *')",
                    selector,
                ):
                    return
                press(Keys.TAB)
            raise AssertionError(f"Tab does not reach {selector}")

        def chosen(group: str) -> str:
            return str(page.one(f"{group} input:checked").get_attribute("value"))

        def choose(group: str, key: str, value: str) -> None:
            reach(f"{group} input[type=radio]")
            while chosen(group) != value:
                before = chosen(group)
                press(key)
                page.wait(lambda before=before: chosen(group) != before)

        reach("#example input")
        press(Keys.ARROW_DOWN, Keys.ENTER)
        page.wait(lambda: page.one("#example input").get_attribute("value") != "beach1")
        choose("#damage", Keys.ARROW_LEFT, "noisy")
        choose("#damage", Keys.ARROW_RIGHT, "missing")
        page.wait(lambda: page.one("#missing input:checked"))
        choose("#missing", Keys.ARROW_DOWN, "box")
        reach("#method button")
        press(Keys.ENTER)
        page.wait(lambda: page.one("#steps input[type=number]"))
        reach("#steps input[type=number]")
        press(Keys.CONTROL + "a" + Keys.NULL, "2", Keys.TAB)
        reach("#run")
        press(Keys.ENTER)
        page.wait(lambda: "PSNR" in page.status())
        page.wait(lambda: page.one("#compare [role=slider]"))
        reach("#compare [role=slider]")

        def told(name: str) -> int:
            return int(page.one("#compare [role=slider]").get_attribute(f"aria-value{name}"))

        assert (told("min"), told("now"), told("max")) == (0, 50, 100)
        press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        page.wait(lambda: told("now") == 60)
        press(Keys.END)
        page.wait(lambda: told("now") == 100)
        press(Keys.ARROW_LEFT)
        page.wait(lambda: told("now") == 95)
        for held in (Keys.CONTROL, Keys.ALT, Keys.META):  # the browser's own
            ActionChains(driver).key_down(held).send_keys(Keys.ARROW_DOWN).key_up(held).perform()
        assert told("now") == 95
        assert "50%" not in page.one("#compare img.fixed").get_attribute("style")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_command_names_what_is_missing(capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name)
    )
    assert main(["studio"]) == 2
    assert "pip install 'cmi-lightning[studio]'" in capsys.readouterr().err
    assert main(["studio", "--port", "many"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
