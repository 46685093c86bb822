"""Image classification with the ViT."""

from crossmae_det.classification.knn import knn_accuracy, labeled_features

__all__ = ["knn_accuracy", "labeled_features"]
