"""Names of classes for people."""


def class_name(label: int, names: tuple[str, ...] | None) -> str:
    """The name of a class, or its number where it has none."""
    return names[label] if names is not None and label < len(names) else str(label)
