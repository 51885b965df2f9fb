"""What comes from outside (files, names, checkpoints, configurations) does no harm."""

import gzip
import io
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_files import black_png
from PIL import Image, ImageFile
from predicting import cli, ready, restore

from cmi_lightning.callbacks import ImageWriter, RestorationMetrics, SamplingProgress
from cmi_lightning.callbacks.drawing import save_png
from cmi_lightning.cli import main
from cmi_lightning.data import FashionMNIST, ImageFolderData, MeasurementFolderData
from cmi_lightning.data.extras import read_kernel
from cmi_lightning.data.images import read_image
from cmi_lightning.denoisers.checkpoints import read_checkpoint as read_weights
from cmi_lightning.errors import InputError, printable
from cmi_lightning.paths import inside, safe_name
from cmi_lightning.predict.module import PosteriorSampler

ROOT = Path(__file__).parent.parent
IDS = ["../up", "../../../../etc/passwd", "/etc/passwd", "//host/share", "a/../../b", "a/./b", ".."]
IDS += [".", "", "/", "a/", "x" * 300, "é" * 300, "d/" * 3000 + "deep", "d" * 300 + "/x"]
IDS += ["nul\0byte", "line\nbreak", "\x1b[31mred", "back\\slash", "..\\up", "half\udcff"]
IDS += ["e\u0301"]  # é of two characters


# File names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IDS)
def test_no_id_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "deep" / "out"
    path = inside(folder, name, ".png")
    assert path.resolve().is_relative_to(folder.resolve())
    save_png(Image.new("L", (2, 2)), path)  # the file system takes it
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written == [path]
    assert len(path.relative_to(folder).as_posix().encode()) < 1100
    assert path.name.isprintable()


def test_ids_that_look_alike_keep_files_of_their_own():
    names = [*IDS, "up", "etc/passwd", "a/b", "b", "_", "é", "back_slash", "x" * 299, "x" * 301]
    names += [safe_name(name) for name in names]  # and ids that look as if they had been changed
    names = list(dict.fromkeys(names))
    assert len({safe_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["00001", "a/b c/ü", "日本語", "été.v2", "a~b", ".x", "😀"])
def test_usual_ids_are_kept(tmp_path, name):
    assert inside(tmp_path, name, ".png") == tmp_path / f"{name}.png"


def test_a_folder_is_no_file_of_another_id(tmp_path):
    for name in ("a", "a.png/b", "a.PNG/c"):
        save_png(Image.new("L", (2, 2)), inside(tmp_path, name, ".png"))
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 3


def test_links_in_the_output_folder_are_not_followed(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (out / "sub").symlink_to(other)
    with pytest.raises(InputError, match=r"'.*out/sub' leads out of the folder '.*out' by a link"):
        inside(out, "sub/x", ".png")
    (other / "kept.png").write_bytes(b"kept")
    (out / "x.png").symlink_to(other / "kept.png")
    save_png(Image.new("L", (2, 2)), inside(out, "x", ".png"))
    assert (other / "kept.png").read_bytes() == b"kept"  # the link was replaced, not followed
    assert not (out / "x.png").is_symlink()
    (tmp_path / "alias").symlink_to(out)  # the output folder itself may be one
    save_png(Image.new("L", (2, 2)), inside(tmp_path / "alias", "y", ".png"))
    assert (out / "y.png").is_file()


def test_names_of_data_files_end_up_in_the_output_folder(tmp_path, prior, monkeypatch):
    """Names as a file system holds them, links in the data folder, and all that is written."""
    outside, data, out = (tmp_path / name for name in ("outside", "data", "out"))
    for folder in (outside, data / "sub"):
        folder.mkdir(parents=True)
    Image.new("L", (32, 32)).save(outside / "secret.png")
    names = ["日本", "e\u0301", "..png", "a\\..\\b", "l\nf", "=1+1", "[red]x[bold]", "n" * 251]
    for name in names:
        Image.new("L", (32, 32)).save(data / "sub" / f"{name}.png")
    raw = os.fsencode(data) + b"/latin\xe9.png"
    Path(os.fsdecode(raw)).write_bytes((outside / "secret.png").read_bytes())
    (data / "link.png").symlink_to(outside / "secret.png")  # read: links to images are fine
    (data / "folder").symlink_to(outside)  # not entered
    before = {p for p in tmp_path.rglob("*") if not p.is_relative_to(out)}
    sampler = PosteriorSampler(prior, num_steps=1)
    folder = ImageFolderData(str(data))
    writers = [SamplingProgress(), ImageWriter(), RestorationMetrics(lpips=None, fid=False)]
    restore(out, sampler, folder, *writers)
    ids = [name for name, _ in folder.images.files]
    assert len(ids) == 9 + 1 - names.count("..png")  # "..png" is hidden
    assert "sub/é" in ids
    assert "latin\\udce9" in ids
    after = {p for p in tmp_path.rglob("*") if not p.is_relative_to(out)}
    assert after == before
    images = [p for p in (out / "restored").rglob("*") if p.is_file()]
    assert len(images) == len(ids)
    assert all(p.resolve().is_relative_to(out) for p in images)


def test_printable_text_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\n\u202egnp\udcff") == "a\\x1b[2Jb\\n\\u202egnp\\udcff"
    assert printable("日本 é\u3000😀") == "日本 é\u3000😀"
    printable("\udcff").encode()


def test_messages_and_tables_show_names_as_they_are(tmp_path, capsys):
    """No markup, control or line break of a name reaches the terminal."""
    folder = tmp_path / "[bold red]f[blink]\x1b[2J"
    folder.mkdir()
    (folder / "x\n\x1b[31m.png").write_bytes(b"nonsense")
    assert main(["predict", f"--data.folder={folder}"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert len(error.strip().splitlines()) == 1
    Image.new("L", (32, 32)).save(folder / "y.png")
    mask = tmp_path / "[bold]m[blink].png"
    Image.new("L", (32, 32), 255).save(mask)
    command = "predict -c prior/fashion_mnist -c guidance/none --data=MeasurementFolderData"
    command += f" --data.kind=inpaint --model.num_steps=1 --trainer.default_root_dir={tmp_path}/out"
    given = [f"--data.measurements={folder}", f"--data.masks={mask}"]
    assert cli(command, *given) == 3  # done, but for one image
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert len(output.err.strip().splitlines()) == 2
    printed = re.sub(r"[\s│]+", "", output.out)
    assert "[bold]m[blink].png" in printed


# Images and arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", [9_600, 20_000])  # Pillow warns of the first, refuses the second
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, side):
    (tmp_path / "bomb.png").write_bytes(black_png(side))
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", None)  # it is not decoded at all
        limit = r"bomb\.png' has more pixels than Pillow's limit of 894"
        with pytest.raises(InputError, match=limit):
            ready(ImageFolderData(str(tmp_path), strict=True))
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    assert list(ready(ImageFolderData(str(tmp_path))).skipped) == [str(tmp_path / "bomb.png")]


def test_pillows_limit_is_kept():
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PPM"])
def test_other_formats_are_not_decoded_whatever_the_suffix(tmp_path, kind):
    """Among Pillow's decoders is PostScript's, which starts a program."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, kind)
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="Cannot read the image"):
        read_image(tmp_path / "x.png")


class Payload:
    """Unpickled, makes the file "owned"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def test_kernels_run_no_code_and_allocate_nothing_by_their_header(tmp_path):
    owned, path = tmp_path / "owned", tmp_path / "k.npy"
    for array in (np.array([[Payload(owned)]]), np.array([[1.0, 2.0]])):
        np.save(path, array, allow_pickle=True)
        if array.dtype == object:
            with pytest.raises(InputError, match="Cannot read the kernel"):
                read_kernel(path)
    path.write_bytes(pickle.dumps(Payload(owned)))
    with pytest.raises(InputError, match="Cannot read the kernel"):
        read_kernel(path)
    assert not owned.exists()
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d, %d), }"
    for side in (10**5, 10**9, 10**30):
        path.write_bytes(npy(header % (side, side), bytes(64)))
        with pytest.raises(InputError, match="Cannot read the kernel"):
            read_kernel(path)
    start = npy(header % (6_000, 6_000))
    path.write_bytes(start)
    os.truncate(path, len(start) + 8 * 6_000**2)  # zeros that are there, but take no room
    tracemalloc.start()
    with pytest.raises(InputError, match=r"shape \(6000, 6000\)"):
        read_kernel(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    np.savez(tmp_path / "z", np.ones((3, 3)))
    (tmp_path / "z.npz").rename(path)
    with pytest.raises(InputError, match="archive"):
        read_kernel(path)


def test_fashion_mnist_decompresses_no_more_than_its_size(tmp_path):
    name = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (gzip.compress(bytes(50_000_000)), gzip.compress(bytes(100)), b"\x1f\x8bnone"):
        name.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(InputError, match="fetch it again"):
            FashionMNIST(False, str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 25e6
    damaged = bytearray(gzip.compress(np.random.default_rng(0).bytes(784 * 4 + 16)))
    damaged[40:60] = bytes(20)
    name.write_bytes(damaged)
    with pytest.raises(InputError, match="fetch it again"):
        FashionMNIST(False, str(tmp_path))


# Checkpoints and configurations ---------------------------------------------------------------


def test_checkpoints_run_no_code(tmp_path, capsys):
    owned, path = tmp_path / "owned", tmp_path / "bad.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Payload(owned)}, path)
    with pytest.raises(InputError, match="weights_only=True"):
        read_weights(path)
    root = f"--trainer.default_root_dir={tmp_path / 'out'}"
    assert main(["fit", "-c", "fit/fashion_mnist", f"--ckpt_path={path}", root]) == 2
    assert "weights_only=True" in capsys.readouterr().err
    weights = f"--model.denoiser.init_args.weights={path}"
    assert main(["predict", weights, root]) == 2
    assert not owned.exists()
    torch.load(path, weights_only=False)  # the payload is live
    assert owned.exists()


def test_nothing_is_ever_unpickled():
    for folder in ("cmi_lightning", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", source):
                assert "weights_only=True" in call, path
            unpickles = re.search(
                r"^\s*(import|from) (pickle|dill|joblib|marshal|shelve)", source, re.M
            )
            # One file is read by an unpickler that knows arrays alone (tests/test_fetch.py).
            assert (unpickles is None) == (path.name != "fetch.py")
            assert not re.search(r"pickle\.(loads?|_Unpickler)\b", source)
            assert "allow_pickle=True" not in source
            assert "weights_only=False" not in source
            assert "MAX_IMAGE_PIXELS =" not in source
            assert not re.search(r"yaml\.(unsafe_load|full_load|load\()", source)


EVIL = [
    b'model: !!python/object/apply:os.system ["touch owned"]',
    b"model: !!python/name:os.system",
]


@pytest.mark.parametrize(
    "content", [*EVIL, b"model: \xff\xfe", b"model: {seed: 1\0}", b"{" * 500, b"\t\tmodel"]
)
def test_yaml_is_read_as_data(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(content)
    assert main(["predict", "-c", "bad.yaml", f"--trainer.default_root_dir={tmp_path / 'o'}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_the_security_page_says_that_a_class_path_runs_code(tmp_path, monkeypatch):
    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    assert "class_path runs code" in text.replace("`", "")
    (tmp_path / "mine_that_runs.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    config = {"model": {"operator": {"class_path": "mine_that_runs.Nothing"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["predict", "-c", "c.yaml"]) == 2
    assert (tmp_path / "ran").exists()  # the sentence is true


def test_the_data_folder_is_never_written_to(tmp_path):
    for i in range(3):
        Image.new("L", (32, 32), i).save(tmp_path / f"{i}.png")
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*")}
    for data in (ImageFolderData(str(tmp_path)), MeasurementFolderData(str(tmp_path))):
        list(ready(data).predict_dataloader())
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*")} == before


def test_records_and_images_are_named_alike(tmp_path):
    assert inside(tmp_path, "../a", ".json").stem == inside(tmp_path, "../a", ".png").stem
