"""MkDocs hooks: formulas become MathML and docstrings Markdown, and notebooks are run.

With QUICK=1 in the environment, notebooks run on the small settings that they name.
"""

from __future__ import annotations

import ast
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import nbformat
import yaml
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

from cmi_lightning import configs

PACKAGE = Path(__file__).parents[1] / "cmi_lightning"
FOLDER = Path(__file__).parent / "methods"
GALLERY = Path(__file__).parent / "gallery"
CONTRACTS = {"Guidance", "Solver", "LLETraining", "residual_gradient"}


INDEX = """# Gallery

What every packaged task does to a photograph, and what is made of it: the truth, the measurement
as an image, and one restoration. `photos-64` has seen none of these photographs. Each page has the
command.

"""
PAGE = """# {title}

{line}

{picture}

From left to right: a photograph of 128×128 pixels (`{photograph}`), its measurement as an image
({seen} dB), and a restoration by `{method}` in 50 steps ({restored} dB). It is one draw, not the
best of several.

```bash
cmi-lightning predict -c task/{task} -c {method} --data.folder photos-test --data.size 128 \\
  --model.num_steps 50
```

{code}The forward model is [{name}][cmi_lightning.operators.{name}]. The picture is made by
`python benchmarks/gallery.py {task}`.
"""
PYTHON = """```python
from cmi_lightning import example, restore
from cmi_lightning.operators import {name}

restore(example("{photograph}"), {operator}, method="{short}", steps=50{sigma}, simulate=True)
```

"""


def methods() -> dict[str, str]:
    """Return {class: package} of every method, from the packages' __all__."""
    found = {}
    for package in ("guidance", "solvers"):
        for node in ast.parse((PACKAGE / package / "__init__.py").read_text("utf-8")).body:
            if isinstance(node, ast.Assign):
                found |= {name: package for name in ast.literal_eval(node.value)}
    kept = {name: found[name] for name in found if name not in CONTRACTS}
    return dict(sorted(kept.items(), key=lambda item: item[0].lower()))


def pictures(name: str) -> str:
    """Return a line of the pictures of a class's sections; see benchmarks/method_pictures.py."""
    shown = []
    for collection in ("guidance", "solver"):
        sections = (PACKAGE.parent / "configs" / f"{collection}.yaml").read_text("utf-8")
        for section, options in yaml.safe_load(sections).items():
            picture = f"{collection}-{section}.png"
            if f".{name}'" in str(options) and (FOLDER / picture).is_file():
                shown += [f"![{collection}/{section}]({picture})"]
    if not shown:
        return ""
    return " ".join(["![truth](truth.png) ![measurement](measurement.png)", *shown]) + "\n\n"


def on_config(config: Any) -> Any:
    """List a page for every method."""
    (chapter,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    chapter += [{name: f"methods/{name}.md"} for name in methods()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make every method's page from its docstring."""
    for name, package in methods().items():
        text = f"# {name}\n\n{pictures(name)}::: cmi_lightning.{package}.{name}\n"
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    for name, text in gallery().items():
        files.append(File.generated(config, f"gallery/{name}.md", content=text))
    for name, (text, shown) in tutorials(bool(os.environ.get("QUICK"))).items():
        files.append(File.generated(config, f"tutorials/{name}.md", content=text))
        for picture, content in shown.items():
            files.append(File.generated(config, f"tutorials/{picture}", content=content))
    return files


def gallery() -> dict[str, str]:
    """Return a page for every task in the gallery, and their index; see benchmarks/gallery.py."""
    pages, shown = {}, []
    for task, found in json.loads((GALLERY / "numbers.json").read_text("utf-8")).items():
        model = configs.sections("task")[task]["model"]
        name = model["operator"]["class_path"].rpartition(".")[2]
        options = model["operator"].get("init_args", {}).items()
        operator = f"{name}({', '.join(f'{key}={value!r}' for key, value in options)})"
        title, line = task.replace("_", " ").capitalize(), configs.summaries()[f"task/{task}"]
        picture = f"![{title}: truth, measurement, restoration]({task}.jpg)"
        noise, sigma = model.get("noise", {}), ""
        if "sigma" in noise:
            sigma = f", sigma={noise['sigma'] / 2:g}"
        found["short"] = found["method"].partition("/")[2]
        code = PYTHON.format(operator=operator, sigma=sigma, name=name, **found)
        pages[task] = PAGE.format(
            title=title,
            line=line,
            picture=picture,
            task=task,
            name=name,
            code="" if "class_path" in noise else code,
            **found,
        )
        shown.append(f"## [{title}]({task}.md)\n\n{line}\n\n{picture}\n")
    pages["index"] = INDEX + "\n".join(shown)
    return pages


@cache
def tutorials(quick: bool) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Run the notebooks, one after the other; return each as Markdown, with what it shows."""
    paths = sorted(FOLDER.with_name("tutorials").glob("*.ipynb"))
    notebooks = {path.stem: nbformat.read(path, 4) for path in paths}
    whole = nbformat.v4.new_notebook()  # one process, because imports take most of the time
    for notebook in notebooks.values():
        whole.cells += [*notebook.cells, nbformat.v4.new_code_cell("%reset -f")]
    for cell in whole.cells:
        if quick and "quick" in cell.metadata:
            cell.source = cell.metadata["quick"]
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(whole, resources={"metadata": {"path": folder}}).execute()
    for cell in whole.cells:  # progress bars say nothing on a page
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    made = {}
    for name, notebook in notebooks.items():
        where = {"output_files_dir": name, "unique_key": "shown"}
        page, resources = MarkdownExporter().from_notebook_node(notebook, where)
        title, _, rest = page.partition("\n\n")
        link = f"[Download this notebook]({name}.ipynb)"
        made[name] = f"{title}\n\n{link}\n\n{rest}", resources["outputs"]
    return made


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every $$…$$ by MathML."""
    return re.sub(
        r"\$\$(.+?)\$\$",
        lambda match: convert(match[1].strip(), display="block").replace("\n", ""),
        markdown,
        flags=re.DOTALL,
    )


class Words(griffe.Extension):
    """Make Markdown of docstrings: no Sphinx roles, no emphasis from (B, *m)."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object before it is rendered."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"(?<=[(, ])\*(?=[\w,)])", r"\\*", text)
            text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
            fenced = r"```pycon\n\g<0>\n```"  # a doctest outside a section of examples
            text = re.sub(r"^>>> .*(?:\n.+)*", fenced, text, flags=re.MULTILINE)
            obj.docstring.value = text
