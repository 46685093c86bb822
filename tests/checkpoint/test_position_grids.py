"""Position embeddings of grids that are no squares, and of grids with as many positions."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_models import SIZES, Detector, autoencoder, save

from crossmae_det.checkpoint import convert, inspect, load, read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.modeling import ViT

SQUARE, WIDE = {"img_size": 48}, {"img_size": (32, 72)}  # 6 x 6 and 4 x 9 patches


def resampled(table, old, new):
    grid = table[:, 1:].view(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic")
    return grid.flatten(2).transpose(1, 2)


def randomized(model):
    """With tables that are none of sines, as a detector's are after training."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("pos_embed"):
                tensor.normal_()
    return model


@pytest.mark.parametrize("random", [True, False])
def test_a_square_table_is_resampled_to_a_grid_with_as_many_positions(tmp_path, random):
    source, target = ViT(**(SIZES | SQUARE)), ViT(**(SIZES | WIDE))
    if random:
        randomized(source)
    table = source.pos_embed.detach().clone()
    report = load(target, save(tmp_path, source.state_dict()))
    assert report.resampled == ["pos_embed"]
    torch.testing.assert_close(target.pos_embed[:, 1:], resampled(table, (6, 6), (4, 9)))
    # Also without a row for the class token.
    state = source.state_dict() | {"pos_embed": table[:, 1:]}
    load(target, save(tmp_path, state))
    torch.testing.assert_close(target.pos_embed[:, 1:], resampled(table, (6, 6), (4, 9)))
    # Into its own grid it goes as it is.
    same = ViT(**(SIZES | SQUARE))
    assert "pos_embed" in load(same, save(tmp_path, source.state_dict())).loaded
    assert torch.equal(same.pos_embed, table)


def test_checkpoints_of_runs_tell_their_grid(tmp_path):
    source = randomized(Detector(pretrain_img_size=WIDE["img_size"]))
    Checkpointer(source, str(tmp_path)).save("model_final")
    path = tmp_path / "model_final.pth"
    table = source.backbone.net.pos_embed.detach()
    for image_size, grid in ((WIDE["img_size"], (4, 9)), (48, (6, 6)), ((16, 40), (2, 5))):
        target = Detector(pretrain_img_size=image_size)
        report = load(target, path)
        name = "backbone.net.pos_embed"
        assert name in (report.loaded if grid == (4, 9) else report.resampled)
        expected = table[:, 1:] if grid == (4, 9) else resampled(table, (4, 9), grid)
        torch.testing.assert_close(target.backbone.net.pos_embed[:, 1:], expected)
    assert inspect(path).img_size == (32, 72)
    with pytest.raises(ValueError, match="pos_embed"):
        load(Detector(pretrain_img_size=48), path, whole=True, exact=True)
    # Converted, it still does.
    convert(path, tmp_path / "vitdet.pkl", "vitdet")
    assert read_checkpoint(tmp_path / "vitdet.pkl")["position_grid"] == [4, 9]


def test_a_pretraining_run_is_known_by_its_table_of_sines(tmp_path):
    """A file without its grid: of other tools, or of an earlier version."""
    source, target = autoencoder(**WIDE), autoencoder(**WIDE)
    report = load(target, save(tmp_path, source.state_dict()), whole=True)
    assert not report.resampled
    half = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    assert not load(target, save(tmp_path, half), whole=True).resampled


def test_resuming_a_file_without_its_grid_takes_it_as_it_is(tmp_path):
    source, target = (randomized(autoencoder(**WIDE)) for _ in range(2))
    load(target, save(tmp_path, source.state_dict()), whole=True, exact=True)
    assert torch.equal(target.encoder.pos_embed, source.encoder.pos_embed)


@pytest.mark.parametrize("grid", [[4, 8], [0, 36], "4x9", [[4], 9], [-4, -9]])
def test_a_grid_that_is_none_of_the_table_is_not_believed(tmp_path, grid):
    source, target = ViT(**(SIZES | SQUARE)), ViT(**(SIZES | SQUARE))
    report = load(target, save(tmp_path, source.state_dict(), position_grid=grid))
    assert "pos_embed" in report.loaded
