"""From tars of images to batches on a device."""
