"""The gRPC service and its client; nothing here imports torch."""
