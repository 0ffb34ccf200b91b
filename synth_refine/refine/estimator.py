"""Refining labels as a scikit-learn estimator: features and labels of any kind in, labels of the same kind out.

Letters in shapes: N real images, M synthetic images, D features, C classes.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from synth_refine._io.check import InputError
from synth_refine.refine.front import refine

try:
    from sklearn.base import BaseEstimator  # type: ignore[import-untyped]
    from sklearn.utils import Tags, TransformerTags, check_array, column_or_1d  # type: ignore[import-untyped]
    from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]
    from sklearn.utils.validation import check_is_fitted, validate_data  # type: ignore[import-untyped]
except ImportError as missing:
    raise ImportError("LabelRefiner needs scikit-learn; pip install 'synth-refine[sklearn]'") from missing


class LabelRefiner(BaseEstimator):  # type: ignore[misc]
    """Refine the labels of images by the features of synthetic images, in scikit-learn's manner.

    `fit` refines, `transform` hands the refined labels out. It is no step of a pipeline, whose steps pass features on:
    it changes labels, and only those that it was fitted to, since other images have no given labels to refine.

    Args:
        refiner: "anchored" or "paper".
        threshold: Smallest score of a new label; "auto" calibrates one per class, None is the refiner's own default.
        force: For the anchored refiner: change labels although a check advises against it.
        seed: Same seed, same result.

    Attributes:
        classes_: The classes, (C,), sorted, as they occur among given and synthetic labels.
        refinement_: What was decided, in the numbers of `classes_`.
        labels_: The refined labels, (N,).
        n_features_in_: D.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> true = np.repeat(["cat", "dog"], 100)
        >>> given = np.where(rng.random(200) < 0.3, true[::-1], true)  # 30 % wrong
        >>> images, synthetic = (rng.normal(size=(n, 4)) + 4 * np.repeat([[0], [1]], n // 2, axis=0) for n in (200, 20))
        >>> refiner = LabelRefiner()
        >>> refiner = refiner.fit(
        ...     images, given, synthetic_features=synthetic, synthetic_labels=np.repeat(["cat", "dog"], 10)
        ... )
        >>> bool((refiner.transform(given) != true).mean() < 0.05)
        True
    """

    def __init__(
        self,
        *,
        refiner: str = "anchored",
        threshold: float | str | None = None,
        force: bool = False,
        seed: int = 0,
    ) -> None:
        self.refiner = refiner
        self.threshold = threshold
        self.force = force
        self.seed = seed

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags, tags.target_tags.required = TransformerTags(), True
        return tags

    def fit(
        self, features: Any, given: Any, *, synthetic_features: Any = None, synthetic_labels: Any = None
    ) -> LabelRefiner:
        """Decide on every given label. Doubts about the evidence are warnings.

        Args:
            features: Features of the real images, (N, D), of any frozen encoder; finite.
            given: Given labels, (N,), numbers or texts.
            synthetic_features: Features of the synthetic images by the same encoder, (M, D), some of every class.
            synthetic_labels: Their intended classes, (M,), of the kind of the given labels.

        Raises:
            InputError: As `refine_anchored`, or no synthetic images.
        """
        features, given = validate_data(self, features, given, dtype=(np.float64, np.float32))
        check_classification_targets(given)
        for name, value in (("synthetic_features", synthetic_features), ("synthetic_labels", synthetic_labels)):
            if value is None:
                raise InputError(f"{name}: expected those of synthetic images, by which labels are refined, got None")
        synthetic = check_array(synthetic_features, dtype=features.dtype, input_name="synthetic_features")
        intended = column_or_1d(synthetic_labels)
        self.classes_ = np.unique(np.concatenate([given, intended]))
        self.refinement_ = refine(
            features,
            np.searchsorted(self.classes_, given),
            refiner=self.refiner,
            synthetic_features=synthetic,
            synthetic_labels=np.searchsorted(self.classes_, intended),
            num_classes=len(self.classes_),
            threshold=self.threshold,
            force=self.force,
            seed=self.seed,
            say=lambda doubt: warnings.warn(doubt, UserWarning, stacklevel=3),
        )
        self.labels_ = self.transform(given)
        return self

    def transform(self, given: Any) -> NDArray[Any]:
        """The refined labels, (N,), for the given ones that were fitted, which stay as they are.

        Raises:
            InputError: Labels that are not among `classes_`, or another number of them.
            WrongBase: Other labels than those that `fit` saw.
        """
        check_is_fitted(self, "refinement_")
        labels = column_or_1d(given)
        unknown = ~np.isin(labels, self.classes_)
        if unknown.any():
            raise InputError(f"given: expected the labels that were fitted, got {labels[unknown][0]!r}")
        numbers = self.refinement_.apply(np.searchsorted(self.classes_, labels))
        return cast("NDArray[Any]", self.classes_[numbers])
