"""The recipe schema, its strict loader, and the recipes shipped with the package."""
