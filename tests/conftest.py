"""One thread per test process, and small arrays that the benchmarks' command lines run on."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start

import numpy as np
import pytest


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """Three classes of Gaussian features, with the paths of the arrays and of given labels that confuse 1 with 2."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    means = 4 * np.eye(3, 8, dtype=np.float32)
    parts = {}
    for name, count in (("train", 240), ("test", 90), ("synthetic", 60)):
        labels = np.arange(count) % 3
        noise = rng.standard_normal((count, 8)).astype(np.float32)
        parts |= {name: means[labels] + noise + (name == "synthetic"), f"{name}_labels": labels}
    np.savez(folder / "blobs.npz", **parts)
    given = parts["train_labels"][:200].copy()
    flipped = rng.random(200) < 0.4
    given[flipped & (given > 0)] = 3 - given[flipped & (given > 0)]
    np.save(folder / "confused.npy", given)
    config = "encoder: given\nrefiners: [none, paper]\nthreshold: 0.0\ninitial: {epochs: 3, warmup: 0}\nmethods:\n"
    config += "  standard: {epochs: 2, warmup: 0}\n  relabel: {epochs: 2}\n  plc: {epochs: 4, warmup: 2, window: 2}\n"
    (folder / "quick.yaml").write_text(config)
    return folder


def command(arrays, out, *more):
    """Arguments of a quick run."""
    files = ["--data", f"{arrays}/blobs.npz", "--given", f"{arrays}/confused.npy", "--config", f"{arrays}/quick.yaml"]
    return [*files, "--out", str(out), "--device", "cpu", *more]
