"""What several commands share: lists of numbers."""


def parse_ints(text: str, limit: int = 1_000_000) -> list[int]:
    """Integers and ranges, each once and in order: '0-3,7,2' → [0, 1, 2, 3, 7].

    Raises:
        ValueError: It is not such a list, or holds more than `limit` numbers.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ValueError(f"{text!r} is not a list of numbers; expected e.g. 0-35,40")
        span = range(int(low), int(high or low) + 1)
        if len(span) + len(numbers) > limit:
            raise ValueError(f"{text!r} holds more than {limit:,} numbers")
        numbers.update(dict.fromkeys(span))
    return list(numbers)
