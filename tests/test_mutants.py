"""Every reader of files of users on a thousand damaged ones: a result or one line, no traceback, no hang."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import data, noise, shard
from safetensors.torch import save_file

from benchmarks.train_glyph_clip import FOLDER
from synth_refine import InputError
from synth_refine._io.csv import csv_bytes, read_csv
from synth_refine._io.untrusted import read_json, read_npy, read_yaml
from synth_refine.images.decode import decode
from synth_refine.images.encoders import open_clip_encoder
from synth_refine.images.foreign import check_model_folder
from synth_refine.images.listing import read_classes
from synth_refine.images.sources import open_images
from synth_refine.images.weights import read_weights

MUTANTS = 1_000


def mutants(whole: bytes, count: int) -> Iterator[bytes]:
    """The file with bytes changed, cut out, doubled or cut off; more of them in its first kilobyte."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        made = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            reach = len(made) if rng.random() < 0.5 else min(len(made), 1024)
            place, length = int(rng.integers(max(reach, 1))), int(rng.integers(1, 40))
            match rng.integers(4):
                case 0:
                    made[place : place + 1] = bytes([rng.integers(256)])
                case 1:
                    del made[place : place + length]
                case 2:
                    made[place:place] = made[place : place + length]
                case _:
                    made[place : place + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        yield bytes(made[: rng.integers(len(made) + 1)]) if rng.random() < 0.2 else bytes(made)


def tar(folder: Path) -> bytes:
    parts = [(f"{row}.png", data(noise(row))) for row in range(3)] + [(f"{row}.cls", b"0") for row in range(3)]
    shard(folder / "a.tar", dict(parts))
    return (folder / "a.tar").read_bytes()


def parquet(folder: Path) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    note = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [data(noise(row)) for row in range(3)], "label": [0, 1, 1]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(note).encode()}), folder / "a.parquet")
    return (folder / "a.parquet").read_bytes()


def weights(folder: Path, zipped: bool) -> bytes:
    tensors = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3, dtype=torch.float16)}
    torch.save({"state_dict": tensors}, folder / "a.pt") if zipped else save_file(tensors, folder / "a.pt")
    return (folder / "a.pt").read_bytes()


def npy(_: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(12.0).reshape(3, 4))
    return file.getvalue()


def images_of(path: Path) -> None:
    images = open_images(path)
    for row in range(len(images.ids)):
        images.image(row)


READERS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], Any]]] = {
    "png": ("a.png", lambda _: data(noise(0, 40, 30)), decode),
    "jpeg": ("a.png", lambda _: data(noise(0, 40, 30), "JPEG"), decode),
    "gif": ("a.png", lambda _: data(noise(0, 40, 30), "GIF"), decode),
    "webp": ("a.png", lambda _: data(noise(0, 40, 30), "WEBP"), decode),
    "tiff": ("a.png", lambda _: data(noise(0, 40, 30), "TIFF", compression="tiff_lzw"), decode),
    "tar": ("a.tar", tar, images_of),
    "parquet": ("a.parquet", parquet, images_of),
    "csv": ("a.csv", lambda _: csv_bytes({"path": ["x.png", "y.png"], "label": [0, 1]}), open_images),
    "table": ("a.csv", lambda _: csv_bytes({"id": ["x", "y"], "label": ["a", "b"]}), lambda path: read_csv("x", path)),
    "classes": ("a.yaml", lambda _: b"n01: tabby cat\nn02: 'a dog'\n? [x]\n: y\n", read_classes),
    "yaml": ("a.yaml", lambda _: b"seed: 1\nday: 2020-01-01\nlist: [1, 2.5, yes]\n", lambda path: read_yaml("x", path)),
    "npy": ("a.npy", npy, lambda path: np.asarray(read_npy("x", path)).sum()),
    "safetensors": ("a.pt", lambda folder: weights(folder, False), read_weights),
    "torch zip": ("a.pt", lambda folder: weights(folder, True), read_weights),
    "json": ("a.json", lambda _: (FOLDER / "open_clip_config.json").read_bytes(), lambda path: read_json("x", path)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_a_result_or_one_line(tmp_path: Path, kind: str) -> None:
    name, make, read = READERS[kind]
    lines = []
    for content in mutants(make(tmp_path), MUTANTS):
        (tmp_path / name).write_bytes(content)
        signal.alarm(10)  # kills the process where a reader hangs
        try:
            read(tmp_path / name)
        except InputError as error:
            lines.append(str(error))
        finally:
            signal.alarm(0)
    assert len(lines) > MUTANTS // 10
    assert not [line for line in lines if "\n" in line or len(line) > 1000]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_encoder_folder_is_an_encoder_or_one_line(tmp_path: Path) -> None:
    lines = []
    (tmp_path / "open_clip_model.safetensors").symlink_to(FOLDER / "open_clip_model.safetensors")
    for content in mutants((FOLDER / "open_clip_config.json").read_bytes(), 60):
        (tmp_path / "open_clip_config.json").write_bytes(content)
        try:
            check_model_folder("model", tmp_path)
            open_clip_encoder(str(tmp_path))
        except InputError as error:
            lines.append(str(error))
    assert len(lines) > 10
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("shape", [(1,) * 65, (1 << 62, 0), (0, 1 << 61)])
def test_an_array_of_impossible_shape_is_one_line(tmp_path: Path, shape: tuple[int, ...]) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (1000 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "a.npy").write_bytes(content + bytes(4 * int(np.prod(shape) if len(shape) > 60 else 0)))
    with pytest.raises(InputError, match="x: .* damaged header: the shape"):
        read_npy("x", tmp_path / "a.npy")


def test_a_bomb_of_aliases_is_one_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{row}: &a{row} [{', '.join([f'*a{row - 1}'] * 9)}]" for row in range(1, 12)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    for read in (read_classes, lambda path: read_yaml("x", path)):
        with pytest.raises(InputError, match="alias") as caught:
            read(tmp_path / "a.yaml")
        assert len(str(caught.value)) < 400
