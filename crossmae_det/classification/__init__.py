"""Image classification with the ViT."""

from crossmae_det.classification.knn import knn_accuracy, labelled_features

__all__ = ["knn_accuracy", "labelled_features"]
