"""A small drawn world in which every fact is known: sample a scene, draw it, describe it."""
