"""``cmi-lightning studio``: the page, on this machine alone unless ``--share`` is given."""

from __future__ import annotations

import argparse
import importlib.util

from cmi_lightning.checked import check_value
from cmi_lightning.errors import InputError
from cmi_lightning.predict.messages import nearest


def studio(args: list[str]) -> int:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        "cmi-lightning studio",
        description="Restore photographs on a page in your browser.",
        exit_on_error=False,
    )
    parser.add_argument("--port", type=int, default=7860, help="port on this machine")
    parser.add_argument("--share", action="store_true", help="a public address, for 72 hours")
    parser.add_argument("--browser", action="store_true", help="open the page in the browser")
    try:
        asked, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(f"studio: {error}; --help lists the options.") from error
    if rest:
        options = ["--port", "--share", "--browser"]
        raise InputError(f"There is no option {rest[0]}{nearest(rest[0], options)}")
    check_value("--port", asked.port, int, "[0, 65535]")  # 0: any free one
    if importlib.util.find_spec("gradio") is None:
        raise InputError("The studio needs gradio: pip install 'cmi-lightning[studio]'.")
    from cmi_lightning.studio.page import serve

    serve(asked.port, asked.share, asked.browser)
    return 0
