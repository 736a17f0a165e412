"""Saving, documenting and pushing of trained models: config file, model card, Hub, reports."""
