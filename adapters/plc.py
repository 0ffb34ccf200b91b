"""Progressive Label Correction behind one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.base import Outcome, Task
from adapters.network import build_network, measure_on, named_accuracies, resolve
from third_party import plc


def run(task: Task, labels: Tensor, options: Mapping[str, Any], seed: int, checkpoint: Path | None = None) -> Outcome:
    """Train a fresh network on `labels`, which PLC corrects on its way.

    The options are those of `third_party.plc.Config` and the network's.
    """
    config, network = resolve("plc", plc.Config(), options)
    model = build_network(task, network, seed)
    result = plc.train(
        model, task.train.inputs, labels, config, measure=measure_on(task), seed=seed, checkpoint=checkpoint
    )
    settings = dataclasses.asdict(config) | dataclasses.asdict(network)
    return Outcome(named_accuracies(result.history), result.labels, result.history, settings)
