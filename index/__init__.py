"""Offline index builds: versions on disk, published by rename, searched mapped."""
