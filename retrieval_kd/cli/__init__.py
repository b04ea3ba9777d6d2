"""The ``rkd`` command: one thin module for each verb; nothing imports this package."""
