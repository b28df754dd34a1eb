"""The data path, from tars of images to batches on a device."""
