"""From an image to panoptic results and pictures."""
