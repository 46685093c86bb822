"""The classes of a model and the categories of a data set, matched by name."""

from collections.abc import Mapping

from detectron2.data import MetadataCatalog

from crossmae_det.data.coco_json import CocoInfo


def category_indices(
    own: Mapping[int, str],
    classes: Mapping[int, str],
    source: str,
    reference: str = "the model",
) -> dict[int, int]:
    """Map the category ids of a data set to the classes of a model, by name.

    Ids and their order are the exporter's choice and may differ; names may not.

    Args:
        own: category id -> name of the data set.
        classes: id -> name, in the order of the model's classes.
        source: the data set, for messages.
        reference: whose ``classes`` they are, for messages.

    Returns:
        Category id of the data set -> index of the class.

    Raises:
        ValueError: a name is missing or new, or is there twice; one line that names it.
    """
    for names, owner in ((own, source), (classes, reference)):
        if len(set(names.values())) < len(names):
            values = list(names.values())
            twice = next(name for name in values if values.count(name) > 1)
            raise ValueError(
                f"{owner}: two categories are named {twice!r}, so that they cannot be matched by "
                "name; rename one of them"
            )
    indices = {name: index for index, name in enumerate(classes.values())}
    new = {id_: name for id_, name in own.items() if name not in indices}
    missing = {id_: name for id_, name in classes.items() if name not in own.values()}
    if new or missing:
        parts = [f"it lacks {_first(missing)}"] * bool(missing) + [f"it adds {_first(new)}"] * bool(
            new
        )
        raise ValueError(
            f"{source}: its categories are not those of {reference}: {' and '.join(parts)}; use "
            "data with the same category names (ids may differ), or train a model for these"
        )
    return {id_: indices[name] for id_, name in own.items()}


def dataset_categories(name: str, info: CocoInfo | None) -> dict[int, str]:
    """Category id -> name of a registered data set, in the order of its classes.

    Args:
        name: the registered name; its metadata decide, as they do in detectron2.
        info: the COCO json of the data set, where it has one.

    Raises:
        ValueError: neither has names.
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if info is not None:
        ids_of = {category: id_ for id_, category in info.categories.items()}
        if classes is None:
            return dict(info.categories)
        if sorted(classes) == sorted(ids_of):  # ids may have changed since it was registered
            return {ids_of[category]: category for category in classes}
    if classes is None:
        raise ValueError(
            f"data set {name!r} has no class names; set MetadataCatalog.get(name).thing_classes"
        )
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        return dict(enumerate(classes))
    # Several dataset ids may share a class: the first of them stands for it.
    first = {contiguous: id_ for id_, contiguous in sorted(ids.items(), reverse=True)}
    return {first[contiguous]: classes[contiguous] for contiguous in sorted(first)}


def json_indices(name: str, info: CocoInfo, own: Mapping[int, str]) -> dict[int, int]:
    """Map the category ids of a json to the classes of the data set that was registered with it.

    Args:
        name: the registered name.
        info: its COCO json.
        own: its categories, from `dataset_categories`.

    Returns:
        Category id -> index of the class. Several ids may share a class, and categories that the
        data set leaves out are left out, where its metadata say so.

    Raises:
        ValueError: the metadata have other classes than the json, and do not say which is which.
    """
    if own.keys() == info.categories.keys() and set(own.values()) == set(info.categories.values()):
        return {id_: index for index, id_ in enumerate(own)}
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    indices = {id_: ids[id_] for id_ in info.categories if id_ in ids}
    if not indices:
        raise ValueError(
            f"{info.path}: its categories are not those that {name} is registered with; "
            "give the data set as JSON:IMAGE_FOLDER instead"
        )
    return indices


def _first(categories: Mapping[int, str], count: int = 3) -> str:
    shown = [f"{name!r} (id {id_})" for id_, name in list(categories.items())[:count]]
    more = f" and {len(categories) - count} more" if len(categories) > count else ""
    return ", ".join(shown) + more
