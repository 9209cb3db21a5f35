"""How well two classes of prompts come apart, layer by layer (A.9).

`layerwise` reads every block in one pass and applies the `measures` to it.
"""

from dcr.separability.layerwise import (
    LayerScores,
    analyse,
    encoded,
    features,
    group_names,
    layerwise,
)
from dcr.separability.measures import (
    classical_mds,
    fisher_ratio,
    kmeans_accuracy,
    linear_probe,
    probe_auroc,
    silhouette,
    transfer_auroc,
)

__all__ = [
    "LayerScores",
    "analyse",
    "classical_mds",
    "encoded",
    "features",
    "fisher_ratio",
    "group_names",
    "kmeans_accuracy",
    "layerwise",
    "linear_probe",
    "probe_auroc",
    "silhouette",
    "transfer_auroc",
]
