"""The gallery: every packaged task on a photograph, docs/gallery/<task>.jpg, and numbers.json.

    python benchmarks/gallery.py           all tasks, some minutes of one core
    python benchmarks/gallery.py denoise   these

A test photograph of 128×128 pixels on the prior photos-64, each task another one. A picture has the
truth, the measurement as an image, and the restoration, from left to right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cmi_lightning import configs
from cmi_lightning.callbacks.drawing import beside, to_tile
from cmi_lightning.data.pictures import psnr
from cmi_lightning.predict.options import prediction_cli

FOLDER = Path(__file__).parents[1] / "docs" / "gallery"
STEPS = 50
METHODS = {"motion_blur": "solver/ddnm", "super_resolution": "solver/ddrm"}
METHODS |= {"phase_retrieval": "solver/daps"}
USUAL = "guidance/pigdm"
PHOTOGRAPHS = ("photos-test", 128)  # folder, side


def restore(task: str, index: int) -> dict:
    """Restore a photograph, write its picture, and return what was measured."""
    method = METHODS.get(task, USUAL)
    folder, side = PHOTOGRAPHS
    options = [f"--data.folder={folder}", f"--data.size={side}", f"--model.num_steps={STEPS}"]
    cli = prediction_cli(["-c", f"task/{task}", "-c", method, *options])
    cli.datamodule.setup("predict")
    image = cli.datamodule.images[index % len(cli.datamodule.images)]
    result = cli.model.predict_step({"x": image["x"][None], "id": [image["id"]]})
    shown = [image["x"], result["measurement"][0], result["restored"][0]]
    pictures = [to_tile(x) for x in shown]
    FOLDER.mkdir(exist_ok=True)
    beside(pictures).save(FOLDER / f"{task}.jpg", quality=88, subsampling=0)
    seen, restored = (round(float(psnr(x[None], image["x"][None])), 1) for x in shown[1:])
    return {"method": method, "photograph": image["id"], "seen": seen, "restored": restored}


def main() -> None:
    tasks = [name.removeprefix("task/") for name in configs.summaries() if name[:5] == "task/"]
    path = FOLDER / "numbers.json"
    numbers = json.loads(path.read_text()) if path.is_file() else {}
    for task in sys.argv[1:] or tasks:
        numbers[task] = restore(task, tasks.index(task))
        print(task, numbers[task], flush=True)
        kept = {task: numbers[task] for task in tasks if task in numbers}
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
