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
import numpy as np
from PIL import Image

from cmi_lightning.api import examples
from cmi_lightning.data.pictures import Picture, as_images, psnr
from cmi_lightning.errors import InputError, first_line, one_sentence
from cmi_lightning.studio import work
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
                    _editor(_example(FIRST)),
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
                example = gr.Dropdown(
                    list(examples()),
                    value=FIRST,
                    label="Example photographs",
                    elem_id="example",
                )
                damage = gr.Radio(
                    list(DAMAGE_NAMES.items()),
                    value="missing",
                    label="What is wrong",
                    elem_id="damage",
                )
                with gr.Group():
                    missing = gr.Radio(
                        list(MISSING_NAMES.items()),
                        value="painted",
                        label="What is missing",
                        elem_id="missing",
                    )
                    with gr.Row(visible=False) as blur:
                        with gr.Column():
                            kernel = gr.Radio(
                                list(KERNEL_NAMES.items()), value="gaussian", label="Blur"
                            )
                            width = gr.Slider(0.5, 12, 2, step=0.5, label="Width in pixels")
                            angle = gr.Slider(
                                0, 180, 30, step=5, label="Direction in degrees", visible=False
                            )
                        shape = gr.Image(
                            _kernel("gaussian", 2, 30),
                            label="Kernel",
                            height=160,
                            interactive=False,
                            buttons=[],
                            elem_id="kernel",
                        )
                    factor = gr.Radio([2, 3, 4], value=2, label="Enlarge by", visible=False)
                    estimate = gr.Checkbox(
                        False, label="Estimate the noise from the photograph", visible=False
                    )
                    sigma = gr.Slider(
                        0, 0.5, 0.025, step=0.005, label="Noise (0 is none, 1 is white to black)"
                    )
                    sound = gr.Checkbox(
                        True, label="The photograph is sound: damage it first, then compare"
                    )
                with gr.Accordion("Method", open=False, elem_id="method"):
                    method = gr.Dropdown(list(work.methods()), value="pigdm", label="Method")
                    steps = gr.Slider(1, 1000, 100, step=1, label="Steps", elem_id="steps")
                    samples = gr.Slider(1, 16, 1, step=1, label="Draws", elem_id="draws")
                    side = gr.Dropdown(
                        list(work.SIDES), value=128, label="Longer side in pixels", elem_id="side"
                    )
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            with gr.Column():
                with gr.Row():
                    run = gr.Button("Restore", variant="primary", elem_id="run")
                    stop = gr.Button("Cancel", interactive=False, elem_id="stop")
                status = gr.HTML(_status(""), elem_id="status")
                live = gr.Image(
                    label="On the way",
                    format="jpeg",  # a thirteenth of the time that WebP takes
                    visible=False,
                    interactive=False,
                    buttons=[],
                    height=380,
                    elem_id="live",
                )
                compare = gr.ImageSlider(
                    label="Before | after",
                    format="png",
                    interactive=False,
                    height=380,
                    elem_id="compare",
                )
                spread = gr.Image(
                    label="Uncertainty: where the draws differ (bright)",
                    format="png",
                    visible=False,
                    interactive=False,
                    buttons=["download"],
                    height=240,
                    elem_id="spread",
                )
                with gr.Accordion("Copy as a command, or as Python", open=False, elem_id="copy"):
                    command = gr.Code(language="shell", label="Command", elem_id="command")
                    python = gr.Code(language="python", label="Python", elem_id="python")
                    files = gr.Files(label="Files that both read", visible=False, elem_id="files")
        parts: dict[str, Any] = dict(
            damage=damage, missing=missing, kernel=kernel, width=width, angle=angle, factor=factor,
            sigma=sigma, estimate=estimate, sound=sound, side=side, method=method, steps=steps,
            samples=samples, seed=seed,
        )  # fmt: skip
        inputs = list(parts.values())
        outputs = [status, live, compare, spread, run, stop, files]

        def restored(photograph: Any, *values: Any) -> Iterator[tuple[Any, ...]]:
            yield from _restore(photograph, dict(zip(parts, values, strict=True)))

        def code(*values: Any) -> tuple[str, str]:
            try:
                choice = Choice(**dict(zip(parts, values, strict=True)))
            except (InputError, TypeError) as error:
                return f"# {one_sentence(error)}", ""
            return choice.as_command(), choice.as_python()

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        running = run.click(
            restored,
            [editor, *inputs],
            outputs,
            concurrency_limit=1,
            concurrency_id="run",
            **hidden,
        )
        stop.click(_stopped, None, outputs, cancels=[running], queue=False, **hidden)
        example.input(
            lambda name: (_editor(_example(name)), True), example, [editor, sound], **hidden
        )
        editor.upload(_is_example, [editor, example], sound, **hidden)
        damage.change(
            lambda what: (
                gr.update(visible=what == "missing"),
                gr.update(visible=what == "blurry"),
                gr.update(visible=what == "small"),
            ),
            damage,
            [missing, blur, factor],
            **hidden,
        )
        sound.change(lambda yes: gr.update(visible=not yes), sound, estimate, **hidden)
        for part in (kernel, width, angle):
            part.change(
                lambda kind, width, angle: (
                    _kernel(kind, width, angle),
                    gr.update(visible=kind == "motion"),
                ),
                [kernel, width, angle],
                [shape, angle],
                **hidden,
            )
        gr.on(
            [page.load, *(part.change for part in inputs)],
            code,
            inputs,
            [command, python],
            **hidden,
        )
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    return page


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


def _restore(photograph: Any, values: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield what the page shows while it restores: status, live, compare, spread, run and stop."""
    busy, free = gr.update(interactive=False), gr.update(interactive=True)
    try:
        choice = Choice(**values)
        image, painted = _layers(photograph)
        yield (
            *(_status("Starting …", 0.0), gr.skip(), gr.update(visible=True)),
            *(gr.update(visible=False), busy, free, gr.skip()),
        )
        for step in work.restore(choice, image, painted):
            if step.result is None:
                told = _status(f"Step {step.done} of {step.total}", step.done / step.total)
                shown = gr.update(value=_large(step.image), visible=True)
                yield told, shown, gr.update(visible=False), gr.skip(), busy, free, gr.skip()
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
            pair = (_large(result.pil("before")), _large(result.pil("after")))
            maps = gr.update(visible=False)
            if "std" in result.pixels:
                maps = gr.update(value=_large(result.pil("std")), visible=True)
            yield (
                *(_status(told, wrong=" ".join(result.notes)), gr.update(visible=False)),
                *(gr.update(value=pair, visible=True), maps, free, busy),
                gr.update(value=_files(choice, image, painted), visible=True),
            )
    except (InputError, TypeError) as error:
        yield _failed(one_sentence(error))
    except Exception as error:
        log.exception("The studio could not restore a photograph.")
        yield _failed(f"It did not work ({type(error).__name__}: {first_line(error)}).")


def _failed(told: str) -> tuple[Any, ...]:
    free, busy = gr.update(interactive=True), gr.update(interactive=False)
    return (
        _status("", wrong=told),
        gr.update(visible=False),
        gr.skip(),
        gr.skip(),
        free,
        busy,
        gr.skip(),
    )


def _stopped() -> tuple[Any, ...]:
    """Return what the page shows after a run was cancelled."""
    free, busy = gr.update(interactive=True), gr.update(interactive=False)
    shown = gr.update(visible=True)
    return _status("Cancelled."), gr.update(visible=False), shown, gr.skip(), free, busy, gr.skip()


def _status(told: str, share: float | None = None, wrong: str = "") -> str:
    """Return the line that says what is going on, and is read out."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    wrong = f'<p class="wrong" role="alert">{html.escape(wrong)}</p>' if wrong else ""
    return f'<div aria-live="polite"><p>{html.escape(told)}</p>{bar}{wrong}</div>'


def _layers(value: Any) -> tuple[Image.Image, Image.Image | None]:
    """Return the photograph of the editor, and what was painted on it, as gray values."""
    background = (value or {}).get("background")
    if background is None:
        raise InputError("There is no photograph: drop one on the page, or choose an example.")
    if background.width * background.height > work.MOST:
        raise InputError(f"The photograph has more than {work.MOST // 10**6} million pixels.")
    white = Image.new("RGBA", background.size, "white")
    photograph = Image.alpha_composite(white, background.convert("RGBA")).convert("RGB")
    painted = [layer.getchannel("A") for layer in value.get("layers") or [] if layer is not None]
    if not painted:
        return photograph, None
    total = np.max([np.asarray(p.resize(photograph.size)) for p in painted], axis=0)
    return photograph, Image.fromarray(total)


def _files(choice: Choice, image: Image.Image, painted: Image.Image | None) -> list[str]:
    """Return the paths of what the command and the code read, in the folder of this process."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    return [str(path) for path in choice.files(folder, image, painted)]


def _example(name: str) -> Image.Image:
    if name not in examples():
        raise gr.Error("There is no such example.")
    return Image.open(examples()[name]).convert("RGB")


def _editor(image: Image.Image) -> Any:
    return {"background": image, "layers": [], "composite": image}


def _is_example(photograph: Any, name: str) -> bool:
    """Whether the editor holds an example, which is sound, and no photograph of one's own."""
    background = (photograph or {}).get("background")
    if background is None:
        return False
    example = np.asarray(_example(name))
    shown = np.asarray(background.convert("RGB"))
    return shown.shape == example.shape and bool((shown == example).all())


def _kernel(kind: str, width: float, angle: float) -> Image.Image | None:
    """Return a picture of the blur's kernel, black to white."""
    try:
        values = Choice(damage="blurry", kernel=kind, width=width, angle=angle).kernel_values()
    except (InputError, TypeError):
        return None
    return _large(as_images((2 * values / values.max() - 1)[None, None])[0], 160)


def _large(image: Image.Image, side: int = 512) -> Image.Image:
    """Return a picture enlarged to about ``side`` pixels, each pixel a square."""
    times = max(1, side // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
