"""Names, URLs and functions of the user's own: where a network comes from."""
