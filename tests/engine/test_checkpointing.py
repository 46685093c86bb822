import pytest
import torch
from shorthand import one_line
from torch import nn

from crossmae_det.engine import checkpointing
from crossmae_det.engine.checkpointing import Checkpointer, PeriodicCheckpointer


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_resume_brings_back_the_model_and_all_beside_it(tmp_path):
    model, counter = nn.Linear(2, 2), Counter()
    counter.count = 5
    Checkpointer(model, str(tmp_path), counter=counter).save("model_0000004")
    other, fresh = nn.Linear(2, 2), Counter()
    Checkpointer(other, str(tmp_path), counter=fresh).resume()
    assert torch.equal(other.weight, model.weight) and fresh.count == 5


def test_what_was_not_on_when_the_run_started_cannot_be_resumed(tmp_path):
    model = nn.Linear(2, 2)
    Checkpointer(model, str(tmp_path)).save("model_0000004")
    with pytest.raises(ValueError, match="it has no 'counter'"):
        Checkpointer(model, str(tmp_path), counter=Counter()).resume()
    resumed = Checkpointer(model, str(tmp_path), ema=Counter()).resume(optional=["ema"])
    assert resumed.missing == ["ema"]


def test_a_process_that_does_not_save_writes_nothing(tmp_path):
    Checkpointer(nn.Linear(2, 2), str(tmp_path), save_to_disk=False).save("model_0000004")
    assert not list(tmp_path.iterdir())


def test_a_number_that_comes_again_is_the_newest(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path))

    def steps(hook, iterations):
        hook.max_iter = 100
        for iteration in iterations:
            hook.step(iteration)
        return {path.stem for path in tmp_path.glob("model_*.pth")}

    hook = PeriodicCheckpointer(checkpointer, 2, max_to_keep=2)
    assert steps(hook, range(6)) == {"model_0000003", "model_0000005"}
    # As after a change of the batch size: 6 iterations are now 2.
    hook = PeriodicCheckpointer(checkpointer, 2, max_to_keep=2)
    hook.resume()
    assert steps(hook, [2, 3]) == {"model_0000003", "model_0000005"}
    assert steps(hook, [4, 5, 6, 7]) == {"model_0000005", "model_0000007"}
    assert checkpointer.get_checkpoint_file().endswith("model_0000007.pth")


def test_only_a_checkpoint_of_a_run_is_resumed(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "last_checkpoint").write_text("weights.pth")
    with pytest.raises(ValueError) as error:
        Checkpointer(nn.Linear(2, 2), str(tmp_path)).resume()
    assert "weights.pth" in one_line(error) and "train.init_checkpoint" in one_line(error)


def test_all_processes_see_the_checkpoint_or_none(tmp_path, monkeypatch):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path))
    assert not checkpointer.has_run()
    monkeypatch.setattr(checkpointing.comm, "all_gather", lambda seen: [True, seen])
    with pytest.raises(ValueError) as error:
        checkpointer.has_run()
    assert str(tmp_path) in one_line(error)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert checkpointer.has_run()
