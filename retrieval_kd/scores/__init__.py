"""The teacher-score store: raw logits by id, and the named ways to normalise and combine them."""
