"""Ten thousand damaged checkpoints, each of which is rejected or loads what the file says.

Pickles and files of torch before 1.6 have no checksums: a damaged byte may be another number, or
name another tensor of the same shape.
"""

import io
import pickle
import random

import pytest
import safetensors.torch
import torch

from crossmae_det.checkpoint import load, read_checkpoint, to_native, to_published
from crossmae_det.checkpoint.reading import extract_state_dict
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import CrossMAE

# Of each damage, in each of four formats: 10,000 together.
EACH = {"bytes": 2000, "tensors": 500}


def build():
    backbone = ViT(16, 8, embed_dim=8, depth=1, num_heads=2)
    return CrossMAE(backbone, decoder_dim=4, decoder_depth=1, decoder_num_heads=1, mask_ratio=0.5)


def torch_file(state, **options):
    data = io.BytesIO()
    torch.save({"model": state, "epoch": 3}, data, **options)
    return data.getvalue()


def pickle_file(state):
    return pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}})


WRITERS = {
    "torch": torch_file,
    "old torch": lambda state: torch_file(state, _use_new_zipfile_serialization=False),
    "pickle": pickle_file,
    "safetensors": safetensors.torch.save,
}


def damaged_bytes(data, rng):
    """Some bytes of a file flipped, or a piece of it cut out, doubled or zeroed."""
    data = bytearray(data)
    kind = rng.choice(["flip", "flip", "flip", "end", "cut", "double", "zero"])
    begin = rng.randrange(len(data))
    # Where the structure is, as often as where the numbers are.
    if rng.random() < 0.5:
        begin = rng.choice([begin % 512, len(data) - 1 - begin % 2048])
    end = min(len(data), begin + rng.randint(1, 64))
    if kind == "flip":
        for _ in range(rng.randint(1, 4)):
            data[begin] ^= 1 << rng.randrange(8)
            begin = rng.randrange(len(data))
    elif kind == "end":
        del data[begin:]
    elif kind == "cut":
        del data[begin:end]
    elif kind == "double":
        data[begin:begin] = data[begin:end]
    else:
        data[begin:end] = bytes(end - begin)
    return bytes(data)


def damaged_state(state, rng):
    """A tensor renamed, lost, of another shape or type, or one too many."""
    state = dict(state)
    name = rng.choice(sorted(state))
    tensor = state[name]
    kind = rng.choice(["rename", "lose", "shape", "transpose", "type", "add"])
    if kind == "rename":
        place = rng.randrange(len(name))
        state[name[:place] + rng.choice("abcxyz0189._") + name[place + 1 :]] = state.pop(name)
    elif kind == "lose":
        del state[name]
    elif kind == "shape":
        side = rng.randrange(tensor.ndim)
        state[name] = tensor.repeat_interleave(rng.randint(0, 3), dim=side)
    elif kind == "transpose":
        state[name] = tensor.transpose(0, -1).contiguous()
    elif kind == "type":
        state[name] = tensor.to(rng.choice([torch.float64, torch.int32, torch.bool]))
    else:
        state[name + rng.choice([".extra", "0", ".0.weight"])] = tensor.clone()
    return state


@pytest.mark.filterwarnings("ignore")  # torch's, about what the damage made of a file
@pytest.mark.parametrize("damage", EACH)
@pytest.mark.parametrize("format", WRITERS)
def test_a_damaged_file_is_rejected_or_loads_what_it_says(tmp_path, format, damage):
    rng = random.Random(f"{format} {damage}")
    torch.manual_seed(0)
    state = {name: torch.randn_like(t) for name, t in build().state_dict().items()}
    path, write, model = tmp_path / "a.pth", WRITERS[format], build()
    names = to_published(state, "crossmae")
    whole = write(names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rejected = loaded = 0
    for _ in range(EACH[damage]):
        if damage == "bytes":
            data, saved = damaged_bytes(whole, rng), names
        else:
            saved = damaged_state(names, rng)
            data = write(saved)
        path.write_bytes(data)
        now = model.state_dict()
        try:
            report = load(model, path)
        except ValueError as error:
            rejected += 1
            assert str(path) in str(error) and "\n" not in str(error)
            assert all(torch.equal(now[name], before[name]) for name in before)
            continue
        loaded += 1
        assert not report.initialized and not report.dropped
        wrong = [name for name in before if not torch.equal(now[name], state[name])]
        if damage == "bytes" and format == "torch":
            assert not wrong  # its checksums tell
        elif damage == "bytes" and format == "safetensors":
            # Without checksums, numbers may be others, but no others than the damaged ones.
            assert sum((now[name] != state[name]).sum().item() for name in wrong) <= 2 * 64
        elif damage == "bytes" and wrong:
            in_file = to_native(extract_state_dict(read_checkpoint(path), path))
            for name in wrong:
                torch.testing.assert_close(
                    now[name], in_file[name].to(now[name].dtype), rtol=0, atol=0, equal_nan=True
                )
        elif damage == "tensors":
            # Resampled where it has another shape; else right, whatever its type.
            published = to_published(now, "crossmae")
            for name in published.keys() & saved.keys():
                if published[name].shape == saved[name].shape:
                    assert torch.equal(published[name], saved[name].float())
        model.load_state_dict(before)
    assert rejected > EACH[damage] / 3 and rejected + loaded == EACH[damage]
