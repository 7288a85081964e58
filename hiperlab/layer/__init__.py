"""Bricks of trainable networks. They know tensors, never a method."""
