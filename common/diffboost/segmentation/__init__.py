"""Segmentation networks, augmentation arms, the random merge mask and evaluation."""
