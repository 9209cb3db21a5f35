"""How well two classes of prompts come apart, layer by layer (A.9).

`features` reads every block in one pass, `clusters` measures without labels, `probes` with a linear
classifier on groups it has not seen, `scaling` draws, and `layerwise` puts them together.
"""

from dcr.separability.clusters import fisher_ratio, kmeans_accuracy, silhouette
from dcr.separability.features import encoded, features
from dcr.separability.layerwise import LayerScores, analyse, group_names, layerwise
from dcr.separability.probes import linear_probe, probe_auroc, transfer_auroc
from dcr.separability.scaling import classical_mds

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
