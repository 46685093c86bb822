"""How the parts of a checkpoint lie to the parts of a model, which may be of another kind."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from crossmae_det.checkpoint.names import RELATIVE_POSITION

# Beside a trunk: detectron2's parts have two names ("roi_heads.mask_head"), a decoder has one. The
# norm after MAE's encoder is a part of its own: files of encoders have it, and no decoder.
PART = re.compile(r"decoder\.encoder_norm|decoder|[^.]+(\.[^.]+)?")


@dataclass(frozen=True)
class Parts:
    """Where tensors of a file go in a model. Names are native.

    Attributes:
        source: prefix of the trunk in the file.
        target: prefix of the trunk in the model.
        inside: names inside the model's trunk.
        same_kind: whether what is beside the trunk means the same in both: only then is it loaded.
        in_file: parts beside the trunk that the file has.
        in_model: parts beside the trunk that the model has.
    """

    source: str
    target: str
    inside: frozenset[str]
    same_kind: bool
    in_file: frozenset[str]
    in_model: frozenset[str]

    @classmethod
    def of(
        cls, file: Mapping[str, Tensor], source: str, model: Mapping[str, Tensor], target: str
    ) -> "Parts":
        """The parts of a file and a model, by their names and the prefixes of their trunks."""
        return cls(
            source,
            target,
            frozenset(_trunk_names(model, target)),
            source == target and _decoder_kind(file) in (_decoder_kind(model), None),
            frozenset(_part(name) for name in file if not name.startswith(source)),
            frozenset(_part(name) for name in model if not name.startswith(target)),
        )

    def place(self, name: str) -> str | None:
        """The name in the model of a tensor of the file; None where there is none."""
        if name.startswith(self.source):
            inside = name.removeprefix(self.source)
            return self.target + inside if inside in self.inside else None
        return name if self.same_kind else None

    def may_be_dropped(self, name: str) -> bool:
        """Whether the model's lack of a tensor of the file is in the nature of the two.

        A model for maps has no class token; what is beside the trunk is of use to the same kind of
        model only, and there if it has that part at all.
        """
        if name.startswith(self.source):
            return name == f"{self.source}cls_token"
        return not (self.same_kind and _part(name) in self.in_model)

    def may_be_missing(self, name: str) -> bool:
        """Whether the file's lack of a tensor of the model is in the nature of the two.

        Relative positions start from zeros after pretraining, which has none.
        """
        if name.startswith(self.target) and name.removeprefix(self.target) in self.inside:
            return RELATIVE_POSITION.search(name) is not None
        return not (self.same_kind and _part(name) in self.in_file)


def _trunk_names(model: Mapping[str, Tensor], prefix: str) -> Iterable[str]:
    inside = re.compile(r"(cls_token|pos_embed|patch_embed\..+|blocks\..+)$")
    names = (name.removeprefix(prefix) for name in model if name.startswith(prefix))
    return (name for name in names if inside.match(name))


def _part(name: str) -> str:
    match = PART.match(name)
    return match[0] if match else name


def _decoder_kind(state: Mapping[str, Tensor]) -> str | None:
    """CrossMAE's decoder and MAE's share names, but not what they stand for."""
    for kind, mark in (("crossmae", "decoder.feature_"), ("mae", "decoder.embed.")):
        if any(name.startswith(mark) for name in state):
            return kind
    return None
