"""What training and scoring read: prepared data sets, augmentation and batching."""
