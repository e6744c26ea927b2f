"""Data sets: the built-in world, COCO panoptic folders, augmentation and batching."""
