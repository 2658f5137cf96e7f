"""The speaker encoder: speech to one vector that says who speaks (CAM++)."""
