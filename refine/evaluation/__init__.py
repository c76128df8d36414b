"""Two networks compared, and the page that shows it."""
