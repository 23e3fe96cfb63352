"""Backbones by name, their structure and norm statistics, and heads: torch, timm, torchvision."""
