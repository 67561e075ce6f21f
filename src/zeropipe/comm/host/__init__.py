"""Ranks that share a host, and so a memory: who they are, and how they read each other's."""
