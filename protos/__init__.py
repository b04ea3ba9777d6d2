"""The wire protocol and the modules generated from it."""
