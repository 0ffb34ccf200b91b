"""Other methods that find and replace wrong labels, each written from its paper's description: evidence in, labels out.

Letters in shapes: N real images, D features, C classes, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence import Evidence
from synth_refine import class_prototypes
from synth_refine.refine.front import given_logits
from synth_refine.refine.neighbours import nearest

COMPONENTS = 128  # principal components that neighbours and heads of `ssr`, `wann` and `clipcleaner` use
COSINE_SCALE = 10.0  # of neighbours' weights, exp(COSINE_SCALE * cosine)
AGREEMENT = 0.8  # of `clipcleaner`: share of the largest probability that a clean label has
NEAREST, FARTHEST = 11, 51  # smallest and largest neighbourhood of `wann`


def knn_vote(evidence: Evidence, neighbours: int = 10) -> Tensor:
    """The commonest given label among the nearest images and the image itself (SimiFeat).

    Zhu, Dong, Liu, ICML 2022, https://arxiv.org/abs/2110.06283. Ties go to the given label, then to the lower class.
    """
    indices, _ = nearest(evidence.features, neighbours)
    own = F.one_hot(evidence.given, evidence.num_classes)
    return (_votes(evidence, indices) + 1.5 * own).argmax(dim=1)


def ssr(evidence: Evidence, neighbours: int = 200) -> Tensor:
    """Labels that a vote of the neighbours confirms are clean; a head trained on them renames all others.

    Feng, Tzimiropoulos, Patras, "SSR: An Efficient and Robust Framework for Learning with Unknown Label Noise",
    BMVC 2022, https://arxiv.org/abs/2111.11288. One round on frozen features, where the paper trains the encoder.
    """
    features = components(evidence)
    indices, cosines = nearest(features, neighbours)
    votes = _votes(evidence, indices, (COSINE_SCALE * cosines).exp())
    return _rename(evidence, features, votes.argmax(dim=1) == evidence.given)


def wann(evidence: Evidence) -> Tensor:
    """A vote of an adaptive number of neighbours, weighted by the reliability of their labels.

    Di Salvo, Doerrich, Rieger, Ledig, "An Embedding is Worth a Thousand Noisy Labels", TMLR 2025,
    https://arxiv.org/abs/2408.14358. The reliability of a label is one over the smallest neighbourhood, of 11 to 51
    images, whose commonest label it is; one over 51 where there is none. That neighbourhood is also the one that votes.
    """
    indices, _ = nearest(components(evidence), FARTHEST)
    size = torch.full_like(evidence.given, min(FARTHEST, indices.shape[1]))
    for count in range(size[0], NEAREST - 1, -1):
        confirmed = _votes(evidence, indices[:, :count]).argmax(dim=1) == evidence.given
        size[confirmed] = count
    reach = torch.arange(indices.shape[1], device=size.device) < size[:, None]  # (N, K)
    return _votes(evidence, indices, reach / size[indices]).argmax(dim=1)


def clipcleaner(evidence: Evidence) -> Tensor:
    """Labels that prototypes and a head both find probable are clean; a head trained on them renames all others.

    Feng, Tzimiropoulos, Patras, "CLIPCleaner: Cleaning Noisy Labels with CLIP", ACM MM 2024,
    https://arxiv.org/abs/2408.10012. Prototypes of synthetic images take the place of the paper's text prompts.
    """
    features = components(evidence)
    synthetic = _standard(evidence.synthetic)
    prototypes = class_prototypes(synthetic, evidence.synthetic_labels, evidence.num_classes)
    cosines = F.normalize(_standard(evidence.features), dim=1) @ F.normalize(prototypes, dim=1).T
    clean = torch.ones_like(evidence.given, dtype=torch.bool)
    head = logistic(features, evidence, clean)
    for probabilities in ((COSINE_SCALE * cosines).softmax(dim=1), head):
        own = probabilities.gather(1, evidence.given[:, None])[:, 0]
        clean &= own >= AGREEMENT * probabilities.amax(dim=1)
    return _rename(evidence, features, clean)


def cleanlab(evidence: Evidence) -> Tensor:
    """Confident learning: the issues that cleanlab finds get the class that a cross-fitted head says.

    The head is the anchored refiner's, trained on the given labels and without the synthetic images.
    """
    from cleanlab.filter import find_label_issues  # type: ignore[import-untyped]

    arrays = evidence.features.float(), evidence.given, evidence.synthetic.float()
    logits, _ = given_logits(*arrays, evidence.num_classes, seed=evidence.seed, epochs=2)
    probabilities = logits.double().softmax(dim=1)
    issues = find_label_issues(evidence.given.cpu().numpy(), probabilities.cpu().numpy(), n_jobs=1)
    return torch.where(torch.from_numpy(issues).to(evidence.given.device), logits.argmax(dim=1), evidence.given)


def components(evidence: Evidence) -> Tensor:
    """The leading principal components of the standardized real features, (N, COMPONENTS) or as many as there are."""
    real = _standard(evidence.features)
    directions: Tensor = torch.linalg.eigh(real.T @ real / len(real)).eigenvectors  # in the order of rising variance
    return real @ directions[:, -COMPONENTS:]


def logistic(features: Tensor, evidence: Evidence, rows: Tensor) -> Tensor:
    """Probabilities, (N, C), of logistic regressions on the given labels of `rows`, each image's by one without it.

    Two folds; multinomial, with an L2 penalty of one over the images of a fold, which is scikit-learn's default.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(evidence.seed)).to(features.device)
    inputs = F.pad(_standard(features), (0, 1), value=1.0)  # (N, K + 1), the last for the bias
    probabilities = features.new_empty(len(features), evidence.num_classes)
    for fold in (0, 1):
        others = order[1 - fold :: 2]
        others = others[rows[others]]
        weight = _fitted(inputs[others], evidence.given[others], evidence.num_classes)
        probabilities[order[fold::2]] = (inputs[order[fold::2]] @ weight).softmax(dim=1)
    return probabilities


def _fitted(inputs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    weight = inputs.new_zeros(inputs.shape[1], num_classes, requires_grad=True)
    if not len(labels):
        return weight.detach()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        penalty = weight[:-1].square().sum() / (2 * len(labels))
        value = F.cross_entropy(inputs @ weight, labels) + penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def _rename(evidence: Evidence, features: Tensor, clean: Tensor) -> Tensor:
    probabilities = logistic(features, evidence, clean)
    return torch.where(clean, evidence.given, probabilities.argmax(dim=1))


def _standard(features: Tensor) -> Tensor:
    features = features.float() - features.float().mean(dim=0)
    return features / features.std(dim=0).clamp_min(1e-6)


def _votes(evidence: Evidence, indices: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weights of each row's neighbours, summed by their given labels, (N, C)."""
    weights = torch.ones_like(indices, dtype=torch.float32) if weights is None else weights
    votes = torch.zeros(len(indices), evidence.num_classes, device=indices.device)
    return votes.scatter_add_(1, evidence.given[indices], weights)
