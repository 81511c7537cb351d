"""What a study costs, counted before it runs: FLOPs, memory, images, disk and hours a stage."""
