"""Fine-tune ResNet and ViT experts, merge them, and explain the result.

Nothing is imported here: each public name is imported from the layer that owns it.
"""

__version__ = "0.1.0"
