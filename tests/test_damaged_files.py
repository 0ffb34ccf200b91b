"""Damaged, mistaken and hostile files: a named error in one line, never a wrong array, and never code that runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synth_refine import InputError
from synth_refine._io.csv import csv_bytes, read_csv
from synth_refine._io.untrusted import read_npy, read_pt
from synth_refine.cli import main
from synth_refine.labels.artifact import read_artifact, record, write_artifact
from synth_refine.labels.files import read_labels, read_labels_and_ids

LABELS = np.array([3, 1, 2, 0] * 50)
HTML = b"\n <!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 400128\n"
CSV = csv_bytes({"id": [f"{row}.png" for row in range(200)], "label": LABELS.tolist()})


def npy(array: Any = LABELS, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_with_header(header: bytes, version: int = 1, data: bytes = LABELS.tobytes()) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def fields(descr: str = "'<i8'", order: str = "False", shape: str = "(200,)") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def pt(content: Any = None, *, raw: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    data = raw if raw is not None else pickle.dumps(content, protocol=2)
    return archive({"labels/data.pkl": data, "labels/version": b"3\n"}, compression)


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


class Poison:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


GOOD_PT = pt({"worse_label": LABELS, "clean_label": LABELS.tolist()})
DATA_START = len(npy()) - LABELS.nbytes

# name: (suffix, content, part of the message)
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "empty npy": (".npy", b"", r"is empty \(0 bytes\)"),
    "empty csv": (".csv", b"", r"is empty \(0 bytes\)"),
    "empty pt": (".pt", b"", r"is empty \(0 bytes\)"),
    "html as npy": (".npy", HTML, "is an HTML page"),
    "html as csv": (".csv", HTML, "is an HTML page"),
    "html as pt": (".pt", HTML, "is an HTML page"),
    "html with a byte-order mark": (".csv", b"\xef\xbb\xbf" + HTML, "is an HTML page"),
    "xml": (".csv", b"<?xml version='1.0'?><Error>AccessDenied</Error>\n", "is an XML document"),
    "git lfs pointer as npy": (".npy", POINTER, "is a Git LFS pointer"),
    "git lfs pointer as csv": (".csv", POINTER, "is a Git LFS pointer"),
    "git lfs pointer as pt": (".pt", POINTER, "is a Git LFS pointer"),
    "git annex pointer": (".npy", b"/annex/objects/SHA256E-s400128--ab.npy\n", "is a git-annex pointer"),
    "zeros": (".npy", bytes(4096), "is all zero bytes"),
    "pickle as npy": (".npy", pickle.dumps(LABELS), "is a Python pickle"),
    "pickle as csv": (".csv", pickle.dumps(LABELS), "is a Python pickle"),
    "pickle as pt": (".pt", pickle.dumps({"a": LABELS}), "is a Python pickle"),
    "npz as npy": (".npy", archive({"label.npy": npy()}), "is a zip archive"),
    "npy as csv": (".csv", npy(), "is a NumPy array"),
    "npy as pt": (".pt", npy(), "is a NumPy array"),
    "csv as npy": (".npy", CSV, "is something else"),
    "gzip": (".csv", gzip.compress(CSV), "is gzip-compressed"),
    "parquet": (".csv", b"PAR1" + bytes(100), "is a Parquet file"),
    "hdf5": (".npy", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "jpeg": (".npy", b"\xff\xd8\xff\xe0JFIF", "is a JPEG image"),
    "object array": (".npy", npy(np.array([1, "a", None], dtype=object), allow_pickle=True), "holds Python objects"),
    "ordered cifar-n": (".npy", npy(np.array({"a": LABELS}), allow_pickle=True), "in another order: use the .pt files"),
    "record array": (".npy", npy(np.zeros(3, [("a", "i8")])), "damaged header: the elements are records"),
    "float labels": (".npy", npy(LABELS.astype(float)), "expected integers, but .* holds float64"),
    "nan labels": (".npy", npy(np.full(3, np.nan)), "holds float64"),
    "complex labels": (".npy", npy(LABELS.astype(complex)), "holds complex128"),
    "bool labels": (".npy", npy(LABELS > 1), "holds bool"),
    "text labels": (".npy", npy(LABELS.astype(str)), "holds <U"),
    "dates": (".npy", npy(LABELS.astype("M8[s]")), "holds datetime64"),
    "two dimensions": (".npy", npy(LABELS.reshape(2, 100)), r"labels: expected shape \(N,\), got \(2, 100\)"),
    "no dimension": (".npy", npy(np.array(3)), r"labels: expected shape \(N,\), got \(\)"),
    "negative label": (".npy", npy(np.array([0, -1])), "expected class indices from 0 on in .*, got -1 to 0"),
    "wrong byte order": (".npy", npy().replace(b"<i8", b">i8"), "expected class indices from 0 on"),
    "truncated in the magic": (".npy", npy()[:4], "is something else"),
    "truncated in the length": (".npy", npy()[:9], "truncated or damaged"),
    "truncated in the header": (".npy", npy()[:60], "truncated or damaged .*: its header claims"),
    "truncated data": (".npy", npy()[:-8], "is truncated: its header promises 1600 bytes of data, 1592 follow"),
    "no data": (".npy", npy()[:DATA_START], "is truncated: .*, 0 follow"),
    "too much data": (".npy", npy() + b"\0", "is too long: .*, 1601 follow"),
    "unknown version": (".npy", b"\x93NUMPY\x09\x00" + npy()[8:], "truncated or damaged"),
    "header of a gigabyte": (
        ".npy",
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + bytes(99),
        "header claims 107374",
    ),
    "header over numpy's limit": (".npy", npy_with_header(b" " * 20_000 + fields()), "header claims"),
    "a claim of exabytes": (".npy", npy_with_header(fields(shape="(1 << 60,)")), "damaged header"),
    "a huge shape": (".npy", npy_with_header(fields(shape="(1152921504606846976,)")), "is truncated"),
    "negative shape": (".npy", npy_with_header(fields(shape="(-200,)")), "damaged header: the shape is"),
    "shape of booleans": (".npy", npy_with_header(fields(shape="(True,)")), "damaged header: the shape is"),
    "code in the header": (".npy", npy_with_header(fields(shape="__import__('os').mkdir('x')")), "damaged header"),
    "nested header": (".npy", npy_with_header(b"(" * 9000), "damaged header"),
    "missing field": (".npy", npy_with_header(b"{'descr': '<i8'}\n"), "damaged header: the fields are not"),
    "unknown type": (".npy", npy_with_header(fields(descr="'<q9'")), "damaged header"),
    "order is no boolean": (".npy", npy_with_header(fields(order="2")), "damaged header: fortran_order is 2"),
    "header in version 3": (".npy", npy_with_header("{'\u00e4'".encode(), 3), "damaged header"),
    "csv without its last line ending": (".csv", b"id,label\na,1", "is truncated: its last line has no line ending"),
    "csv cut in a row": (".csv", b"id,label\na,1\nb\n", "expected 2 cells in row 3 of .*, got 1"),
    "csv with too many cells": (".csv", b"id,label\na,1,2\n", "expected 2 cells in row 2 of .*, got 3"),
    "csv with an empty line": (".csv", b"id,label\n\na,1\n", "row 2 of .* is blank; delete it"),
    "csv without the column": (".csv", b"id,class\na,1\n", "expected the column label in .*, got id, class"),
    "csv without a header": (".csv", b"a,1\nb,2\n", "expected the column label in .*, got a, 1"),
    "csv with a column twice": (".csv", b"id,label,label\na,1,2\n", "expected every column once"),
    "csv with an id twice": (".csv", b"id,label\na,1\na,2\n", "expected every id once, got 'a' 2 times"),
    "csv with a float": (".csv", b"id,label\na,3.0\n", "expected a class index from 0 on in row 2 of .*, got '3.0'"),
    "csv with nan": (".csv", b"id,label\na,nan\n", "got 'nan'"),
    "csv with a negative label": (".csv", b"id,label\na,-1\n", "got '-1'"),
    "csv with an empty label": (".csv", b"id,label\na,\n", "got ''"),
    "csv with a formula": (".csv", b"id,label\na,=1+1\n", "got '=1[+]1'"),
    "csv with underscores": (".csv", b"id,label\na,1_0\n", "got '1_0'"),
    "csv with other digits": (".csv", "id,label\na,\u0663\n".encode(), "got '\u0663'"),
    "csv with a huge label": (".csv", b"id,label\na,99999999999999999999\n", "expected a class index"),
    "csv in utf-16": (".csv", "id,label\na,1\n".encode("utf-16"), "is UTF-16 text"),
    "csv in latin-1": (".csv", b"id,label\n\xe4,1\n", "is no UTF-8 table"),
    "csv with zero bytes": (".csv", b"id,label\na\0,1\n", "holds zero bytes"),
    "csv with an open quote": (".csv", b'id,label\n"a,1\n', "is no UTF-8 table: unexpected end of data"),
    "csv with a giant cell": (".csv", b"id,label\n" + b"a" * 200_000 + b",1\n", "is no UTF-8 table: field larger"),
    "truncated pt": (".pt", GOOD_PT[:-30], "is no label file that can be read safely"),
    "pt without its directory": (".pt", GOOD_PT[:200], "File is not a zip file"),
    "pt with a flipped byte": (".pt", GOOD_PT.replace(b"worse", b"worsf", 1), "Bad CRC-32"),
    "pt of another thing": (".pt", archive({"a.txt": b"a"}), "0 members are called data.pkl"),
    "pt with two pickles": (".pt", archive({"a/data.pkl": b"", "b/data.pkl": b""}), "2 members are called data.pkl"),
    "pt outside": (".pt", archive({"../data.pkl": pickle.dumps({"a": LABELS}, 2)}), "1 members are called data.pkl"),
    "zip bomb": (".pt", pt(raw=bytes(1 << 24), compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed"),
    "pt of a list": (".pt", pt([1, 2]), "it holds list, not a dict"),
    "pt of nothing": (".pt", pt({}), "it holds dict, not a dict"),
    "pt with a forbidden name": (
        ".pt",
        pt({"a": Poison(Path("x"))}),
        "the name .*mkdir, which label files do not need",
    ),
    "pt with an allowed module": (".pt", pt({"a": np.savez}), "the name numpy.savez, which"),
    "pt with floats": (".pt", pt({"a": LABELS.astype(float)}), "an array of type 'f8'"),
    "pt with objects": (".pt", pt({"a": np.array([None])}), "an array of type 'O8'"),
    "pt with two dimensions": (".pt", pt({"a": LABELS.reshape(2, 100)}), "an array that is no"),
    "pt with text": (".pt", pt({"a": "b"}), "a is no array or list of integers"),
    "pt with a wrong length": (
        ".pt",
        pt({"a": LABELS}).replace(b"K\xc8", b"K\xc9"),
        "no label file that can be read safely",
    ),
    "pt that is cut": (".pt", pt(raw=pickle.dumps({"a": LABELS}, 2)[:-20]), "no label file that can be read safely"),
    "pt with a giant claim": (".pt", pt(raw=b"\x80\x02\x96" + struct.pack("<Q", 1 << 62) + b"."), "no label file"),
    "pt with a giant memo": (".pt", pt(raw=b"\x80\x02}r\xff\xff\xff\x7f."), "the instruction LONG_BINPUT"),
    "pt in a newer protocol": (".pt", pt(raw=pickle.dumps({"a": [1]}, 4)), "the instruction FRAME, which"),
    "pt without the key": (".pt", GOOD_PT, "has the entries worse_label, clean_label; name one of them, got None"),
    "other kind of file": (".txt", CSV, "expected a .npy, .csv, .json, .npz or .pt file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    suffix, content, message = DAMAGED[kind]
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600

    with pytest.raises(InputError) as again:  # a refused file stays refused
        read_labels_and_ids(path)
    assert str(again.value) == str(caught.value)
    assert main(["diff", str(path), str(path)]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"synth-refine: {caught.value}\n"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_folders_pipes_and_missing_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "loop.npy").symlink_to(tmp_path / "loop.npy")
    for name, message in {
        "pipe.npy": "expected a file, got a device",
        "folder.npy": "expected a file, got a folder",
        "missing.npy": "cannot be read, No such file or directory",
        "loop.npy": "cannot be read, Too many levels of symbolic links",
        "zero\0byte.npy": "embedded null byte",
    }.items():
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / name)


READERS: dict[str, Callable[[Path], object]] = {
    "read_labels": read_labels,
    "read_labels with a key": lambda path: read_labels(path, key="a"),
    "read_labels_and_ids": read_labels_and_ids,
    "read_npy": lambda path: read_npy("labels", path, "biufO"),
    "read_pt": lambda path: read_pt("labels", path),
    "read_csv": lambda path: read_csv("labels", path),
    "read_artifact of the folder": lambda path: read_artifact(path.parent),
    "diff": lambda path: main(["diff", str(path), str(path)]),
    "apply": lambda path: main(["apply", str(path.parent), "--given", str(path), "--out", "out.npy"]),
    "revert": lambda path: main(["revert", str(path.parent), "--labels", str(path), "--out", "out.npy", "--key", "a"]),
    "export": lambda path: main(["export", str(path), "--format", "csv", "--out", "out.csv"]),
    "verify": lambda path: main(["verify", str(path.parent), "--labels", str(path), "--key", "a"]),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_poisoned_pickle_leaves_no_trace(tmp_path: Path, reader: str) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "artifact"
    poison = Poison(marker)
    contents = {
        "plain pickle": pickle.dumps(poison),
        "old pickle": pickle.dumps(poison, protocol=0),
        "object array": npy(np.array([poison], dtype=object), allow_pickle=True),
        "torch archive": pt({"a": poison}),
        "in a list": pt({"a": [poison]}),
        "as a type": pt({"a": LABELS}).replace(b"cnumpy\ndtype\n", b"cposix\nmkdir\n"),
        "behind a good entry": pt({"a": LABELS, "b": poison}),
        "npz": archive({"label.npy": npy(np.array([poison], dtype=object), allow_pickle=True)}),
    }
    for content in contents.values():
        for name in ("labels.npy", "labels.csv", "labels.pt", "run.json"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            try:
                result = READERS[reader](folder / name)
                assert result != 0, "a poisoned file was accepted"
            except InputError:
                pass
            assert not marker.exists()
            (folder / name).unlink()
    pickle.loads(contents["plain pickle"])
    assert marker.exists()  # the poison works


def test_the_poison_in_a_file_of_an_artifact_leaves_no_trace(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", record(np.array([0, 1]), np.array([1, 1])))
    for name in ("labels.npy", "changes.csv", "run.json"):
        good = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes(pickle.dumps(Poison(tmp_path / "marker")))
        with pytest.raises(InputError):
            read_artifact(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(good)
    assert not (tmp_path / "marker").exists()
    read_artifact(tmp_path / "a")


def test_cifar_n_files_are_read_without_torch_load(tmp_path: Path) -> None:
    """The four names, in the spelling of either NumPy; arrays of several types and plain lists."""
    content = {"clean_label": LABELS.tolist(), "worse_label": LABELS.astype("<i4"), "big": LABELS.astype(">u2")}
    data = pickle.dumps(content, protocol=2)
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    new = old.replace(b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    assert old != new
    for raw in (old, new):
        (tmp_path / "labels.pt").write_bytes(pt(raw=raw))
        for key in content:
            assert read_labels(tmp_path / "labels.pt", key=key).tolist() == LABELS.tolist()


def test_saved_tensors_are_told_how_to_come(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"it holds torch tensors; write them with numpy\.save"):
        read_labels(tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"write its array with numpy\.save"):
        read_npy("features", tmp_path / "a.pt")


SMALL = np.arange(12) % 5


def _same_or_named_error(path: Path, content: bytes, key: str | None = None) -> None:
    path.write_bytes(content)
    labels = _read_or_named_error(path, key)
    assert labels is None or labels[0].tolist() == SMALL.tolist()


def _read_or_named_error(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None] | None:
    try:
        return read_labels_and_ids(path, key=key)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert message.startswith("labels")
    return None


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_a_file_cut_anywhere_never_gives_a_wrong_array(tmp_path: Path, suffix: str) -> None:
    content = npy(SMALL) if suffix == ".npy" else pt({"a": SMALL})
    for length in range(0, len(content), 1 if suffix == ".npy" else 7):
        (tmp_path / f"labels{suffix}").write_bytes(content[:length])
        with pytest.raises(InputError):
            read_labels(tmp_path / f"labels{suffix}", key="a")


def test_a_csv_cut_inside_a_line_never_gives_a_wrong_array(tmp_path: Path) -> None:
    content = csv_bytes({"id": [f"{row}.png" for row in range(12)], "label": (SMALL + 10).tolist()})
    for length in range(len(content)):
        if content[length - 1 : length] != b"\n":
            (tmp_path / "labels.csv").write_bytes(content[:length])
            with pytest.raises(InputError):
                read_labels(tmp_path / "labels.csv")


@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), suffix=st.sampled_from([".npy", ".pt"]))
@settings(deadline=None, max_examples=150)
def test_a_changed_byte_never_gives_a_wrong_array(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, suffix: str
) -> None:
    """In a .npy file only the header can be checked; a .pt file has a checksum."""
    content = bytearray(npy(SMALL) if suffix == ".npy" else pt({"a": SMALL}))
    content[place % (len(content) - SMALL.nbytes if suffix == ".npy" else len(content))] = byte
    _same_or_named_error(tmp_path_factory.getbasetemp() / f"changed{suffix}", bytes(content), "a")


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".npy", ".pt", ".csv"]), magic=st.booleans())
@settings(deadline=None, max_examples=150)
def test_arbitrary_bytes_never_give_a_wrong_array(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, magic: bool
) -> None:
    start = {".npy": b"\x93NUMPY\x01\x00", ".pt": b"PK\x03\x04", ".csv": b"id,label\n"}[suffix] if magic else b""
    path = tmp_path_factory.getbasetemp() / f"noise{suffix}"
    path.write_bytes(start + content)
    if (read := _read_or_named_error(path, "a")) is not None:
        labels, ids = read
        assert suffix == ".csv"
        assert labels.min(initial=0) >= 0
        assert ids is None or len(set(ids)) == len(labels)


@given(content=st.binary(max_size=120))
@settings(deadline=None, max_examples=150)
def test_arbitrary_pickles_never_run(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "pickle.pt"
    path.write_bytes(pt(raw=b"\x80\x02" + content))
    with pytest.raises(InputError, match="no label file that can be read safely"):
        read_pt("labels", path)
