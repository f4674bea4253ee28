"""Requests in pairs: the same words around something harmful and around something harmless."""
