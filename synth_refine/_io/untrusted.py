"""Read files of users: .npy and CIFAR-N's .pt, checked byte by byte and never unpickled."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import pickle
import pickletools
import stat
import struct
import zipfile
from typing import Any, BinaryIO, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from synth_refine._io.check import InputError

MAX_HEADER_BYTES = 10_000
"""NumPy's own limit for the header of a .npy file."""

MAX_PICKLE_BYTES = 1 << 26
"""CIFAR-N's largest file has 3.6 MB."""

NPY_MAGIC = b"\x93NUMPY"

_KINDS = {
    NPY_MAGIC: "a NumPy array",
    b"PK\x03\x04": "a zip archive, as .npz and .pt files are; write its array with numpy.save",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"\xfd7zXZ\x00": "xz-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"PAR1": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, not the file itself; fetch it with `git annex get`",
    b"<!doctype": "an HTML page, probably the error page of a download",
    b"<html": "an HTML page, probably the error page of a download",
    b"<?xml": "an XML document, probably the error page of a download",
}


def what_is(head: bytes) -> str | None:
    """What a file is by its first bytes, None when they are none of the known kinds.

    Example:
        >>> what_is(b"<!DOCTYPE html><title>404</title>")
        'an HTML page, probably the error page of a download'
    """
    if not head:
        return "empty (0 bytes)"
    if not head.strip(b"\0"):
        return "all zero bytes, as an interrupted download leaves behind"
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return "a Python pickle, which could run code and is never loaded"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, kind in _KINDS.items():
        if head.startswith(magic) or (magic[:1] in b"<v/" and text.startswith(magic)):
            return kind
    return None


def open_plain(name: str, path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a folder, a pipe or a device is refused before it can block.

    Raises:
        InputError: There is no such file, or it is not a regular one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise InputError(f"{name}: {error}: {path!r}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read, {error.strerror or error}: {path}") from error
    there = os.fstat(descriptor)
    if stat.S_ISREG(there.st_mode) and there.st_size:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(there.st_mode):  # empty, or one of the system's, which may have no end
        return io.BytesIO()
    kind = "a folder" if stat.S_ISDIR(there.st_mode) else "a device"
    raise InputError(f"{name}: expected a file, got {kind}: {path}")


def read_json(name: str, path: str | os.PathLike[str], most_bytes: int = 1 << 24) -> Any:
    """The content of a .json file, of bounded size and depth.

    Raises:
        InputError: No such file, too large, or no JSON.
    """
    with open_plain(name, path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise InputError(f"{name}: expected at most {most_bytes} bytes of JSON in {path}, got more")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: {path} is no JSON: {str(error)[:100]}") from error


def read_yaml(name: str, path: str | os.PathLike[str], *, text: bool = False, most_bytes: int = 1 << 22) -> Any:
    """The content of a .yaml file of plain values, without aliases, which can stand for any number of values.

    With `text` every value stays the text that it is written as: 007, no and 12:30 are names.

    Raises:
        InputError: No such file, too large, no YAML, or an alias in it.
    """
    with open_plain(name, path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise InputError(f"{name}: expected at most {most_bytes} bytes of YAML in {path}, got more")
    try:
        loader = (_Text if text else _Plain)(data)
        return loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: {path} is no YAML: {' '.join(str(error).split())[:160]}") from error


class _NoAliases(yaml.composer.Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            raise yaml.YAMLError("it has an alias (*name), which is not read")
        return super().compose_node(parent, index)


class _Plain(_NoAliases, yaml.SafeLoader):
    pass


class _Text(_NoAliases, yaml.BaseLoader):
    pass


def read_npy(name: str, path: str | os.PathLike[str], kinds: str = "iuf") -> NDArray[Any]:
    """Map a .npy file of plain numbers into memory, read-only, after checking every byte count.

    Args:
        name: The argument the file was given for; it begins every message.
        path: The file.
        kinds: NumPy's letters of the kinds of number to accept: b, i, u, f.

    Returns:
        The array, a read-only memory map; features larger than the memory will do.

    Raises:
        InputError: Not a .npy file (the message says what it is), truncated or too long, or an array of Python
            objects, records, text or another unwanted type.
    """
    with open_plain(name, path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if not head.startswith(NPY_MAGIC):
            raise InputError(f"{name}: expected a .npy file, but {path} is {_kind(head + file.read(500))}")
        if len(head) < 12 or head[6] not in (1, 2, 3):
            raise InputError(f"{name}: {path} is a truncated or damaged .npy file")
        start, length = (10, *struct.unpack("<H", head[8:10])) if head[6] == 1 else (12, *struct.unpack("<I", head[8:]))
        if length > min(MAX_HEADER_BYTES, size - start):
            raise InputError(f"{name}: {path} is a truncated or damaged .npy file: its header claims {length} bytes")
        file.seek(start)
        dtype, shape, fortran = _npy_header(name, path, file.read(length))
    if dtype.hasobject:
        raise InputError(
            f"{name}: {path} holds Python objects, which only unpickling could read; it is never loaded "
            "(CIFAR-N's ordered .npy files are of this kind and are in another order: use the .pt files)"
        )
    if dtype.kind not in kinds:
        wanted_kind = {"iu": "integers", "f": "floats"}.get(kinds, "numbers")
        raise InputError(f"{name}: expected {wanted_kind}, but {path} holds {dtype}")
    wanted, found = math.prod(shape) * dtype.itemsize, size - start - length
    if found != wanted:
        what = "truncated" if found < wanted else "too long"
        raise InputError(f"{name}: {path} is {what}: its header promises {wanted} bytes of data, {found} follow")
    if not wanted:
        return np.empty(shape, dtype)
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype=dtype, mode="r", offset=start + length, shape=shape, order=order)


def _npy_header(name: str, path: str | os.PathLike[str], header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    try:
        fields = _literal(header)
        if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
            raise ValueError("the fields are not descr, fortran_order and shape")
        shape, fortran = fields["shape"], fields["fortran_order"]
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"the shape is {shape!r}")
        if len(shape) > 32 or (0 in shape and math.prod(max(n, 1) for n in shape) >= 1 << 60):
            raise ValueError(f"the shape has {len(shape)} dimensions, or is too large for an empty array")
        if not isinstance(fortran, bool):
            raise ValueError(f"fortran_order is {fortran!r}")
        if not isinstance(fields["descr"], str):
            raise ValueError("the elements are records")
        return np.dtype(fields["descr"]), shape, fortran
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {path} is a .npy file with a damaged header: {str(error)[:100]}") from error


def _literal(header: bytes) -> object:
    try:
        return ast.literal_eval(header.decode("latin1").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("it is no dict of plain values") from error


def _kind(head: bytes) -> str:
    return what_is(head) or "something else"


class _Array:
    """Stands in for a pickled NumPy array: collects what the pickle says, and checks it before building one."""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), (int() as length,), _Dtype() as kind, bool(), bytes() as data):
                dtype = np.dtype(kind.code).newbyteorder(cast(Any, kind.byteorder))
                if dtype.kind not in "iu" or length * dtype.itemsize != len(data):
                    raise pickle.UnpicklingError(f"an array of {length} {dtype} in {len(data)} bytes")
                self.values = np.frombuffer(data, dtype).astype(np.int64)
            case _:
                raise pickle.UnpicklingError("an array that is no (N,) array of integers")


class _Dtype:
    def __init__(self, code: str, *_flags: object) -> None:
        if code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.code, self.byteorder = code, "="

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), "<" | ">" | "|" | "=" as byteorder, *_):
                self.byteorder = byteorder
            case _:
                raise pickle.UnpicklingError("a damaged array type")


def _rebuild(*_arguments: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_OPCODES = {
    *(
        "PROTO",
        "MARK",
        "STOP",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
    ),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "BINUNICODE", "EMPTY_TUPLE", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}
"""What these files are made of. Others could ask for gigabytes in a few bytes."""


def _check_opcodes(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "BINPERSID":
            raise pickle.UnpicklingError("it holds torch tensors; write them with numpy.save(path, tensor.numpy())")
        if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and cast(int, argument) > len(data)):
            raise pickle.UnpicklingError(f"the instruction {opcode.name}, which label files do not need")


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the four names of CIFAR-N's files, each replaced by a stand-in of ours."""

    def find_class(self, module: str, name: str) -> Any:
        match (module.replace("numpy._core", "numpy.core"), name):
            case ("numpy.core.multiarray", "_reconstruct"):
                return _rebuild
            case ("numpy", "ndarray"):
                return _Array
            case ("numpy", "dtype"):
                return _Dtype
            case ("_codecs", "encode"):
                return _encode
        raise pickle.UnpicklingError(f"the name {module}.{name}, which label files do not need")


def read_pt(name: str, path: str | os.PathLike[str]) -> dict[str, NDArray[np.int64]]:
    """The label arrays of one of CIFAR-N's .pt files, read without torch.load and without running anything.

    Args:
        name: The argument the file was given for; it begins every message.
        path: A zip archive with one uncompressed pickle of a dict of integer arrays or lists.

    Returns:
        Every entry of the dict, (N,) int64.

    Raises:
        InputError: Not such an archive, truncated, compressed (a bomb would be), or a pickle that asks for any other
            name, be it a harmless one.
    """
    with open_plain(name, path) as file:
        head = file.read(512)
        if not head.startswith(b"PK\x03\x04"):
            raise InputError(f"{name}: expected a .pt file, but {path} is {_kind(head)}")
        try:
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if info.filename.split("/")[-1] == "data.pkl"]
                if len(members) != 1 or ".." in members[0].filename.split("/"):
                    raise ValueError(f"{len(members)} members are called data.pkl")
                member = members[0]
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"data.pkl is compressed or larger than {MAX_PICKLE_BYTES} bytes")
                data = archive.read(member)
            _check_opcodes(data)
            content = _RestrictedUnpickler(io.BytesIO(data)).load()
            if not isinstance(content, dict) or not content:
                raise ValueError(f"it holds {type(content).__name__}, not a dict of arrays")
            return {str(key): _pt_labels(str(key), value) for key, value in content.items()}
        # A damaged pickle can fail in any way an interpreter can; none of them is a reason to go on.
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{name}: {path} is no label file that can be read safely: {text[:200]}") from error


def _pt_labels(key: str, value: object) -> NDArray[np.int64]:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, list) and all(type(item) is int for item in value):
        return np.array(value, dtype=np.int64)
    raise ValueError(f"{key} is no array or list of integers")
