"""What is written as DICOM: predictions as segmentations, synthetic images as secondary capture."""
