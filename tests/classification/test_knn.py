import numpy as np
import pytest
import torch
from PIL import Image

from crossmae_det.classification import knn_accuracy, labeled_features


def naive_accuracy(train, test, neighbors):
    (train_x, train_y), (test_x, test_y) = train, test
    mean, deviation = train_x.mean(0), train_x.std(0)
    train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation
    right = 0
    for x, y in zip(test_x, test_y, strict=True):
        similarity = [float(x @ t / x.norm() / t.norm()) for t in train_x]
        nearest = sorted(range(len(train_x)), key=lambda i: -similarity[i])[:neighbors]
        votes = [0] * 4
        for index in nearest:
            votes[train_y[index]] += 1
        right += votes.index(max(votes)) == y
    return 100 * right / len(test_x)


@pytest.mark.parametrize("neighbors", [1, 5])
def test_neighbors_vote(neighbors):
    torch.manual_seed(0)
    centers = 1.5 * torch.randn(4, 6)
    labels = torch.arange(60) % 4
    # Channels of very different size: each counts the same.
    features = (centers[labels] + torch.randn(60, 6)) * torch.tensor([1, 10, 100, 1, 1, 0.1]) + 7
    train, test = (features[:40], labels[:40]), (features[40:], labels[40:])
    accuracy = knn_accuracy(train, test, neighbors)
    assert accuracy == pytest.approx(naive_accuracy(train, test, neighbors))
    assert 40 < accuracy < 100


def test_a_wrong_number_of_neighbors():
    data = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for neighbors in (0, 4):
        with pytest.raises(ValueError, match=f"1 .* 3 .*{neighbors}"):
            knn_accuracy(data, data, neighbors)


def test_features_of_a_folder_with_classes(tmp_path):
    for name, value in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = np.full((8 + index, 12, 3), value + index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")

    def encode(images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 4, 4)
        assert not torch.is_grad_enabled()
        return images[:, :, 0, 0]

    features, labels, classes = labeled_features(str(tmp_path), encode, 4, batch_size=4)
    assert features[:, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert classes == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        labeled_features(str(tmp_path / "a"), encode, 4)
