"""A night: generate with the champion, measure, compare with earlier nights, publish."""
