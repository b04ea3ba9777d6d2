"""Building a student from an encoder."""
