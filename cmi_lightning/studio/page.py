"""The page itself, on gradio: what is shown, and what happens when something is chosen."""

from __future__ import annotations

import atexit
import html
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from cmi_lightning.data.pictures import Picture, psnr
from cmi_lightning.errors import InputError, cause, one_sentence
from cmi_lightning.paths import examples
from cmi_lightning.studio import work
from cmi_lightning.studio.pictures import edited, is_example, large, layers, of_kernel, photograph
from cmi_lightning.studio.work import Choice

log = logging.getLogger(__name__)
LARGEST = "20mb"  # of an upload
WAITING = 8  # runs that may wait for their turn
MISSING_NAMES = {
    "What I paint": "painted",
    "A box in the middle": "box",
    "90 % at random": "random",
}
DAMAGE_NAMES = {"Parts are missing": "missing", "It is blurry": "blurry"}
DAMAGE_NAMES |= {"It is small": "small", "It is noisy": "noisy"}
KERNEL_NAMES = {"Soft (Gaussian)": "gaussian", "Moved (line)": "motion", "Out of focus": "disc"}
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_sm,
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
FIRST = "beach1"


def build() -> gr.Blocks:
    """Return the page; uploads go to a folder of this process, which goes with it."""
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="cmi-lightning-studio-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with gr.Blocks(title="cmi-lightning studio", analytics_enabled=False) as page:
        gr.Markdown(
            "# Restore a photograph\n\nChoose one or drop your own, say what is wrong with it, and "
            "paint over what is missing. Nothing leaves this machine."
        )
        with gr.Row():
            with gr.Column():
                editor = gr.ImageEditor(
                    edited(photograph(FIRST)),
                    label="Photograph",
                    show_label=False,
                    type="pil",
                    image_mode="RGBA",
                    format="png",  # what is restored is what was dropped
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=12, colors=["#e11d48"], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=12),
                    height=300,  # an image of 4:3 then fits in the width as well
                    elem_id="editor",
                )
                label = "Example photographs"
                example = gr.Dropdown(list(examples()), value=FIRST, label=label, elem_id="example")
                damage = _choice(DAMAGE_NAMES, "What is wrong", "damage")
                with gr.Group():
                    missing = _choice(MISSING_NAMES, "What is missing", "missing")
                    with gr.Row(visible=False) as blur:
                        with gr.Column():
                            kernel = _choice(KERNEL_NAMES, "Blur")
                            width = gr.Slider(0.5, 12, 2, step=0.5, label="Width in pixels")
                            label = "Direction in degrees"
                            angle = gr.Slider(0, 180, 30, step=5, label=label, visible=False)
                        shape = _picture(
                            "Kernel", "kernel", 160, value=of_kernel("gaussian", 2, 30)
                        )
                    factor = gr.Radio([2, 3, 4], value=2, label="Enlarge by", visible=False)
                    label = "Estimate the noise from the photograph"
                    estimate = gr.Checkbox(False, label=label, visible=False)
                    label = "Noise (0 is none, 1 is white to black)"
                    sigma = gr.Slider(0, 0.5, 0.025, step=0.005, label=label)
                    label = "The photograph is sound: damage it first, then compare"
                    sound = gr.Checkbox(True, label=label)
                with gr.Accordion("Method", open=False, elem_id="method"):
                    method = gr.Dropdown(list(work.methods()), value="pigdm", label="Method")
                    steps = gr.Slider(1, 1000, 100, step=1, label="Steps", elem_id="steps")
                    samples = gr.Slider(1, 16, 1, step=1, label="Draws", elem_id="draws")
                    sides, label = list(work.SIDES), "Longer side in pixels"
                    side = gr.Dropdown(sides, value=128, label=label, elem_id="side")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Column():
                with gr.Row():
                    run = gr.Button("Restore", variant="primary", elem_id="run")
                    stop = gr.Button("Cancel", interactive=False, elem_id="stop")
                status = gr.HTML(_status(""), elem_id="status")
                # JPEG takes a thirteenth of the time that WebP takes.
                live = _picture("On the way", "live", 380, format="jpeg", visible=False)
                compare = gr.ImageSlider(
                    label="Before | after",
                    format="png",
                    interactive=False,
                    height=380,
                    elem_id="compare",
                )
                label = "Uncertainty: where the draws differ (bright)"
                spread = _picture(label, "spread", 240, visible=False, buttons=["download"])
                with gr.Accordion("Copy as a command, or as Python", open=False, elem_id="copy"):
                    command = gr.Code(language="shell", label="Command", elem_id="command")
                    python = gr.Code(language="python", label="Python", elem_id="python")
                    files = gr.Files(label="Files that both read", visible=False, elem_id="files")
        asked: dict[str, Any] = dict(
            damage=damage, missing=missing, kernel=kernel, width=width, angle=angle, factor=factor,
            sigma=sigma, estimate=estimate, sound=sound, side=side, method=method, steps=steps,
            samples=samples, seed=seed,
        )  # fmt: skip
        told: dict[str, Any] = dict(
            status=status, live=live, compare=compare, spread=spread, run=run, stop=stop,
            files=files,
        )  # fmt: skip
        inputs, outputs = list(asked.values()), list(told.values())

        cancelled: set[str | None] = set()  # sessions

        def restored(request: gr.Request, edit: Any, *values: Any) -> Iterator[dict[Any, Any]]:
            cancelled.discard(request.session_hash)
            for shown in _restore(edit, dict(zip(asked, values, strict=True))):
                if ended := request.session_hash in cancelled:
                    shown = _ready(_status("Cancelled.")) | {"compare": gr.update(visible=True)}
                yield {told[name]: value for name, value in shown.items()}
                if ended:
                    return

        def cancel(request: gr.Request) -> None:
            """The run tells that it has ended: after another event's word came its last step's."""
            cancelled.add(request.session_hash)

        def code(*values: Any) -> tuple[str, str]:
            try:
                choice = Choice(**dict(zip(asked, values, strict=True)))
            except (InputError, TypeError) as error:
                return f"# {one_sentence(error)}", ""
            return choice.as_command(), choice.as_python()

        def blurred(kind: str, width: float, angle: float) -> tuple[Any, Any]:
            return of_kernel(kind, width, angle), gr.update(visible=kind == "motion")

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "run"}
        run.click(restored, [editor, *inputs], outputs, **alone, **hidden)
        stop.click(cancel, None, None, queue=False, **hidden)
        own: list[Any] = [editor, sound]
        example.input(lambda name: (edited(photograph(name)), True), example, own, **hidden)
        editor.upload(is_example, editor, sound, **hidden)
        parts = {"missing": missing, "blurry": blur, "small": factor}
        damage.change(
            lambda what: [gr.update(visible=what == part) for part in parts],
            *(damage, list(parts.values())),
            **hidden,
        )
        sound.change(lambda yes: gr.update(visible=not yes), sound, estimate, **hidden)
        of_blur: list[Any] = [kernel, width, angle]
        gr.on([part.change for part in of_blur], blurred, of_blur, [shape, angle], **hidden)
        every = [page.load, *(part.change for part in inputs)]
        gr.on(every, code, inputs, [command, python], **hidden)
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    return page


def _choice(names: dict[str, str], label: str, name: str | None = None) -> gr.Radio:
    """Return buttons of which the first is chosen."""
    first = next(iter(names.values()))
    return gr.Radio(list(names.items()), value=first, label=label, elem_id=name)


def _picture(label: str, name: str, height: int, **options: Any) -> gr.Image:
    """Return a place for a picture that the page makes."""
    options = {"format": "png", "buttons": []} | options
    return gr.Image(label=label, elem_id=name, height=height, interactive=False, **options)


def serve(port: int, share: bool = False, browser: bool = False, wait: bool = True) -> gr.Blocks:
    """Serve the page on this machine, at 127.0.0.1; ``share`` alone opens it to others.

    Args:
        port: where; 0 takes any free one.
        share: ask gradio for a public address.
        browser: open the page.
        wait: until Ctrl-C.

    Raises:
        InputError: if the port is taken.
    """
    page = build()
    style, keys = (Path(__file__).with_name(n).read_text("utf-8") for n in ("style.css", "keys.js"))
    try:
        _, address, shared = page.launch(
            server_name="127.0.0.1",
            server_port=port or None,
            share=share,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            max_file_size=LARGEST,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=THEME,
            css=style,
            js=keys,
        )
    except OSError as error:
        raise InputError(
            f"--port: {port} is taken ({one_sentence(error)}); give another."
        ) from error
    print(f"The studio is at {shared or address} (Ctrl-C ends it).", flush=True)
    if wait:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # tidily
        page.block_thread()
    return page


def _restore(editor: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the page shows while it restores, by the names of its parts."""
    busy = {"run": gr.update(interactive=False), "stop": gr.update(interactive=True)}
    busy |= {"compare": gr.update(visible=False)}
    try:
        choice = Choice(**values)
        image, painted = layers(editor)
        started = {"live": gr.update(visible=True), "spread": gr.update(visible=False)}
        yield {"status": _status("Starting …", 0.0)} | started | busy
        for step in work.restore(choice, image, painted):
            if step.result is None:
                told = _status(f"Step {step.done} of {step.total}", step.done / step.total)
                live = gr.update(value=large(step.image), visible=True)
                yield {"status": told, "live": live} | busy
                continue
            result = step.result
            height, width = result.pixels["after"].shape[-2:]
            told = f"{width}×{height} pixels in {result.seconds:.0f} s. "
            told += f"The measurement fits to {result.residual[0]:.2f} of its noise."
            if choice.estimates:
                told += f" Its noise is estimated at {result.sigma[0]:.3f}."
            if choice.sound:
                seen = result.image, choice.fitted(image.convert("RGB"))  # of 8 bits
                told += f" PSNR {float(psnr(*(Picture.of(i).x for i in seen))):.1f} dB."
            shown = _ready(_status(told, wrong=" ".join(result.notes)))
            pair = (large(result.pil("before")), large(result.pil("after")))
            shown["compare"] = gr.update(value=pair, visible=True)
            if "std" in result.pixels:
                shown["spread"] = gr.update(value=large(result.pil("std")), visible=True)
            yield shown | {"files": gr.update(value=_files(choice, image, painted), visible=True)}
    except (InputError, TypeError) as error:
        yield _ready(_status("", wrong=one_sentence(error)))
    except Exception as error:
        log.exception("The studio could not restore a photograph.")
        told = f"It did not work ({cause(error)})."
        yield _ready(_status("", wrong=told))


def _ready(status: str) -> dict[str, Any]:
    """Return what the page shows when nothing runs, with its status."""
    run, stop = gr.update(interactive=True), gr.update(interactive=False)
    return {"status": status, "live": gr.update(visible=False), "run": run, "stop": stop}


def _status(told: str, share: float | None = None, wrong: str = "") -> str:
    """Return the line that says what is going on, and is read out."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    wrong = f'<p class="wrong" role="alert">{html.escape(wrong)}</p>' if wrong else ""
    return f'<div aria-live="polite"><p>{html.escape(told)}</p>{bar}{wrong}</div>'


def _files(choice: Choice, image: Image.Image, painted: Image.Image | None) -> list[str]:
    """Return the paths of what the command and the code read, in the folder of this process."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    return [str(path) for path in choice.files(folder, image, painted)]
