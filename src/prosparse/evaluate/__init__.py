"""Measuring models through the calls every runner offers."""
