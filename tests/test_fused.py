"""The kernel for GPUs: what it computes, by Triton's interpreter, and that it can be compiled for them."""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from synth_refine import refine_labels
from synth_refine.refine import paper as refine

pytest.importorskip("triton")

SHAPES = [(5, 3, 1), (6, 4, 37), (8, 6, 5)]  # images, features, classes


def cases():
    """Arrays with classes that are equally good and rows that cannot be scored."""
    rng = np.random.default_rng(0)
    for images, features, classes in SHAPES:
        shapes = (images, features), (images, classes), (classes, features)
        values, logits, prototypes = (torch.from_numpy(3 * rng.standard_normal(shape)).float() for shape in shapes)
        prototypes[-1] = prototypes[0]
        logits[:, -1] = logits[:, 0]
        values[0], logits[0, [0, -1]] = prototypes[0], 50.0
        logits[1, 0] = torch.nan
        logits[2, -1] = torch.inf
        values[3] = 0
        values[4, 0] = torch.nan
        yield values, logits, prototypes


def compare(decide):
    """`decide` against refine_labels on the CPU."""
    for arrays in cases():
        for weight in (0.5, 1.0):
            found, expected = decide(*arrays, weight), refine_labels(*arrays, 0.4, weight=weight)
            assert found.proposed.tolist() == expected.proposed.tolist()
            assert found.unscored == 4
            torch.testing.assert_close(found.confidence.cpu(), expected.confidence, equal_nan=True)
            ties = [{(row, one) for row, one in every.ties.tolist() if row not in (1, 2, 3, 4)}
                    for every in (found, expected)]  # fmt: skip
            assert ties[0] == ties[1]
            assert (0, 0) in ties[0] or arrays[1].shape[1] == 1


def interpreted():
    """On the CPU, in a process whose Triton interprets what it would compile."""
    from synth_refine.refine._fused import best_of_rows

    def decide(features, logits, prototypes, weight):
        with mock.patch.object(refine, "_fused", return_value=best_of_rows) as kernel:
            found = refine_labels(features, logits, prototypes, 0.4, weight=weight)
        kernel.assert_called()
        return found

    compare(decide)
    without = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    values, classes, finite = best_of_rows(without, None, torch.ones(1, 1), 5)
    assert values.tolist() == [[3, 3, 2, 1]]
    assert classes.tolist() == [[1, 2, 3, 0]]
    assert finite.tolist() == [[True]]


def test_what_the_kernel_computes():
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "import test_fused; test_fused.interpreted()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_is_one_that_gpus_can_run(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from synth_refine.refine._fused import _best_of_row

    pointers = dict.fromkeys(("scores", "logits", "scale", "values"), "*fp32")
    types = {**pointers, "classes": "*i64", "finite": "*i1", "num_classes": "i32", "logits_stride": "i32"}
    constants = {"TOP": 2, "BLOCK": 1024, "CLASSIFIED": True}
    signature = {name: types.get(name, "constexpr") for name in _best_of_row.arg_names}
    source = ASTSource(_best_of_row, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_a_gpu():
    def decide(*arrays_and_weight):
        *arrays, weight = arrays_and_weight
        return refine_labels(*(values.cuda() for values in arrays), 0.4, weight=weight)

    assert refine._fused(torch.device("cuda"), torch.float32, 10) is not None
    compare(decide)


def test_without_triton_a_gpu_takes_the_slower_way():
    refine._fused.cache_clear()
    with (
        mock.patch.dict(sys.modules, {"synth_refine.refine._fused": None}),
        pytest.warns(UserWarning, match="no fused kernel on cuda"),
    ):
        assert refine._fused(torch.device("cuda"), torch.float32, 10) is None
    refine._fused.cache_clear()


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float64)])
def test_where_the_kernel_is_not_asked_for(device, dtype):
    assert refine._fused(torch.device(device), dtype, 10) is None
