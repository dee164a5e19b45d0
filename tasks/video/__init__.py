"""Temporal action detection: AFSD heads on STPT and other video backbones."""
