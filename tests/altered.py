"""Data sets of images with a part exchanged, for tests."""

import dataclasses


def altered(dataset, **changes):
    """With other arrays (train_inputs, test_labels, train_true), fields of its info (mean), or fields of its own."""
    parts = {part: dict(getattr(dataset, part)) for part in ("train", "test")}
    info = {}
    for name, value in changes.items():
        part, _, leaf = name.partition("_")
        if part in parts:
            parts[part][leaf] = value
        elif name != "meta":
            info[name] = value
    rest = {"meta": changes["meta"]} if "meta" in changes else {}
    as_many = getattr(parts["train"]["labels"], "shape", ())[:1] == (dataset.examples,)
    index = dataset.index if as_many else None
    return dataclasses.replace(dataset, **parts, index=index, info=dataclasses.replace(dataset.info, **info), **rest)
